"""``osteo screen``: one study from a folder, no PACS and no store."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from osteo_daemon.domain.decision import decide
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.inference.screening import Screening, StudyScreener
from osteo_daemon.reporting import build_report, picture_language
from osteo_daemon.settings import Settings

STAGES = ("read headers", "decode", "find vertebrae", "measure", "predict", "build report")

REPORT_VARIANT = "comprehensive-3d+seg"
"""The one form of the structured report that a folder gets, whatever destinations the settings name."""

_FILE_NAMES: Mapping[str, str] = {"sr": "report.dcm", "seg": "segmentation.dcm", "sc": "picture.dcm"}


def screen_folder(settings: Settings, folder: Path, out: Path) -> Screening:
    """Screen the study below ``folder`` and write its results to ``out``.

    Raises:
        Damaged: no file, no readable DICOM object, several studies, or an undecodable slice.
        BundleError: a model bundle is missing or changed.
        ConfigurationError: ``out`` can't be written; found out before anything is computed.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "DICOMDIR")
    if not paths:
        raise Damaged(f"{folder} holds no file")
    _prepare(out)
    console = Console(stderr=True)
    if (drawn := picture_language(settings)) != settings.site.language:
        console.print(f"no installed font holds the characters of {settings.site.language}: the picture is in {drawn}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("load models", total=len(STAGES) + 1)

        def advance(stage: str) -> None:
            progress.update(task, advance=1, description=stage)

        screener = StudyScreener.load(settings)
        screening = screener.screen(paths, advance)
        advance(STAGES[-1])
        built = (
            None
            if screening.result.exclusion
            else build_report(screening, settings, datetime.now(UTC), variants=(REPORT_VARIANT,))
        )
        progress.update(task, advance=1)
    for stale in ("result.json", "manifest.json", "picture.png", *_FILE_NAMES.values()):
        (out / stale).unlink(missing_ok=True)  # an older run's picture beside a new result would mislead
    if built is not None:
        for entry in built.objects:
            _write(out / _FILE_NAMES[entry.kind], entry.data)
        if built.picture_png is not None:
            _write(out / "picture.png", built.picture_png)
    _write_json(out / "manifest.json", screening.manifest)
    _write_json(out / "result.json", screening.result.to_json())
    console.print(_line(screening), highlight=False, soft_wrap=True)
    return screening


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigurationError(f"--out {out} cannot be written ({error.strerror}); name another folder") from error


def _line(screening: Screening) -> str:
    result = screening.result
    if result.exclusion is not None:
        return f"not screened: {result.exclusion.code}: {result.exclusion.reason}"
    levels = ", ".join(
        f"{vertebra.level} {vertebra.attenuation_hu.mean:.0f} HU"
        for vertebra in result.vertebrae
        if vertebra.attenuation_hu is not None
    )
    index = decide(result.vertebrae, result.quality_flags).index_hu
    decided = "" if index is None else f" (decided by {index:.0f} HU, the mean of L1-L4's medians at 120 kVp)"
    return f"{result.category}{decided}; measured means: {levels}"


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader sees the old one or the new one, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    Path(part.name).chmod(0o644 & ~_umask())
    Path(part.name).replace(path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
