"""Where every benchmark and evaluation writes its figures: ``docs/results/NAME.json``.

One command makes one file: date, commit, hardware, command, figures. Documents take their numbers from these files
(`benchmarks.tables`), so none is typed by hand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def write_result(name: str, figures: Mapping[str, Any], *, command: str | None = None, quick: bool = False) -> Path:
    """Write ``docs/results/NAME.json`` (``NAME.quick.json`` for the quick form of a benchmark).

    Args:
        name: of the result, in lower case with hyphens.
        figures: JSON values; units stand in the names. What is no number (the AUC of a class that nobody has) is null.
        command: that makes this file again; by default the running one.
        quick: the quick form, which shows that the benchmark runs; its figures are no claim.

    Raises:
        SystemExit: the quick form measures what the committed one doesn't, or gives no number where that has one.
    """
    figures = _told(figures)
    whole = RESULTS / f"{name}.json"
    if quick and whole.exists():
        wrong = differences(figures, json.loads(whole.read_text(encoding="utf-8"))["figures"])
        if wrong:
            raise SystemExit(f"{name}: not what docs/results/{name}.json was made by: {', '.join(wrong)}; run it anew")
    document = {
        "schema": "osteo-figures/1",
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware(),
        "command": command or _command(),
        "quick": quick,
        "figures": figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def differences(quick: Any, committed: Any, place: str = "") -> list[str]:
    """Places of a quick form's figures that the committed ones don't have, or where only those hold a number.

    The quick form may leave out what takes long and say null of what so few cases don't tell. Lists are compared by
    their first element.
    """
    if isinstance(quick, Mapping) and isinstance(committed, Mapping):
        missing = [f"{place}{key}" for key in quick if key not in committed]
        shared = (key for key in quick if key in committed)
        return missing + [
            found for key in shared for found in differences(quick[key], committed[key], f"{place}{key}/")
        ]
    if isinstance(quick, list) and isinstance(committed, list):
        return differences(quick[0], committed[0], place) if quick and committed else []
    if _is_number(committed) and quick is not None and not _is_number(quick):
        return [place.rstrip("/")]
    return []


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _told(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GB and Python of this machine; no name of it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_gb),
        "python": platform.python_version(),
    }


def _commit() -> str:
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or "unknown"


def _command() -> str:
    arguments = sys.orig_argv[1:]
    return " ".join(["python", *arguments])
