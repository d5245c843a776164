"""Where every benchmark and evaluation writes its figures: ``docs/results/NAME.json``.

One command makes one file: date, commit, hardware, command, figures. Documents take their numbers from these files
(`benchmarks.tables`), so none is typed by hand.
"""

from __future__ import annotations

import json
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
        figures: JSON values; units stand in the names.
        command: that makes this file again; by default the running one.
        quick: the quick form, which shows that the benchmark runs; its figures are no claim.
    """
    document = {
        "schema": "osteo-figures/1",
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware(),
        "command": command or _command(),
        "quick": quick,
        "figures": dict(figures),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


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
