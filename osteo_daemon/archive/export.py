"""Archived vertebrae and their labels as the data set of a refit: docs/refit-data.md."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from osteo_daemon.archive.record import MARGIN_VOXELS, StudyVois, VertebraRecord
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.domain.densitometry import to_sbmd
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.jobs.archive_rows import ArchivedEntry, Label
from osteo_daemon.network.config import CLASSES, BmdScale

SCHEMA: Final = "osteo-refit-data/1"
MINIMUM_COVERAGE: Final = 0.8
"""As in screening: with less of the VOI inside the scan the rest repeats the scan's edge."""

_NO_LABEL: Final = -1
_UNKNOWN_AGE: Final = -1
_NORMAL_ABOVE, _OSTEOPOROSIS_FROM = -1.0, -2.5  # T-scores (WHO 1994)


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was written.

    Attributes:
        vertebrae, labelled, patients: rows, rows with a label, and patients among the rows.
        devices: makers of the densitometers, sorted.
        left_out: vertebrae that were not written, by reason.
    """

    vertebrae: int
    labelled: int
    patients: int
    devices: tuple[str, ...]
    left_out: Mapping[str, int]


def export_dataset(
    folder: Path,
    *,
    archive: VoiArchive,
    labels: list[Label],
    site: str,
    voi: VoiSpec,
    scale: BmdScale,
    labelled_only: bool = True,
) -> ExportSummary:
    """Write the data set; needs no key, for nothing of an identity is in it.

    Args:
        folder: must not hold a data set; what an interrupted export left there is written over.
        archive: with the VOIs.
        labels: of the job store.
        site: the name that rows bear.
        voi: grid of the bundle that is refitted.
        scale: its BMD scale, by which readings get their class.
        labelled_only: leave out vertebrae without a label.

    Raises:
        ConfigurationError: the folder holds a data set or cannot be written.
        Damaged: there is nothing to export, or an archived file is missing or has changed.
    """
    if (folder / "table.json").exists():
        raise ConfigurationError(f"{folder} holds a data set already")
    by_vertebra = {(label.entry, label.level): label for label in labels}
    entries = sorted(archive.entries(), key=lambda entry: (entry.patient, entry.entry))
    if labelled_only:
        named = {label.entry for label in labels}
        entries = [entry for entry in entries if entry.entry in named]
    left_out: Counter[str] = Counter()
    chosen: list[tuple[ArchivedEntry, int]] = []
    rows, more = [], []
    for entry in entries:
        study = archive.read(entry)
        for index, vertebra in sorted(enumerate(study.vertebrae), key=lambda pair: pair[1].level):
            label = by_vertebra.get((entry.entry, vertebra.level))
            reason = _why_not(vertebra, label, labelled_only)
            if reason is not None:
                left_out[reason] += 1
                continue
            chosen.append((entry, index))
            rows.append(_row(entry, study, vertebra, label, site, scale))
            more.append(
                {
                    "models": "" if label is None else label.model,
                    "entries": entry.entry,
                    "days_apart": None if label is None else label.days_apart,
                    "hu": vertebra.features.get("median_hu"),
                }
            )
    if not rows:
        raise Damaged("there is no archived vertebra to export; see osteo archive status and osteo labels status")
    shape = tuple(n + 2 * MARGIN_VOXELS for n in voi.shape)
    devices = tuple(sorted({str(row["device"]) for row in rows if row["device"]}))
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "site": site,
        "voi_shape": list(shape),
        "voi_spacing_mm": voi.spacing_mm,
        "margin_voxels": MARGIN_VOXELS,
        "devices": list(devices),
        "scale": scale.to_json(),
        "software": version("osteo-daemon"),
        **{name: [each[name] for each in more] for name in ("models", "entries", "days_apart", "hu")},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hu = np.lib.format.open_memmap(folder / "voi.npy", mode="w+", dtype=np.int16, shape=(len(rows), *shape))
        last: tuple[ArchivedEntry, StudyVois] | None = None
        for number, (entry, index) in enumerate(chosen):
            if last is None or last[0] != entry:
                last = entry, archive.read(entry)
            hu[number] = last[1].on_grid(index, voi)
        hu.flush()
        del hu
        _write_last(folder / "table.json", {"config": config, "rows": rows})
    except OSError as error:
        raise ConfigurationError(f"the data set could not be written to {folder} ({error.strerror})") from error
    return ExportSummary(
        vertebrae=len(rows),
        labelled=sum(row["diagnosis"] != _NO_LABEL for row in rows),
        patients=len({row["patient"] for row in rows}),
        devices=devices,
        left_out=dict(left_out),
    )


def diagnosis_of(sbmd_g_cm2: float, level: str, scale: BmdScale) -> int:
    """Index in `CLASSES` of a BMD on the scale's own, -1 for a level that its reference does not know."""
    t_score = scale.t_score(sbmd_g_cm2, level)
    if t_score is None:
        return _NO_LABEL
    if t_score <= _OSTEOPOROSIS_FROM:
        return CLASSES.index("osteoporosis")
    return CLASSES.index("osteopenia" if t_score <= _NORMAL_ABOVE else "normal")


def _why_not(vertebra: VertebraRecord, label: Label | None, labelled_only: bool) -> str | None:
    if labelled_only and label is None:
        return "no label"
    if vertebra.blocked:
        return "blocking flag"
    return "beyond the scan's edge" if vertebra.coverage < MINIMUM_COVERAGE else None


def _row(
    entry: ArchivedEntry, study: StudyVois, vertebra: VertebraRecord, label: Label | None, site: str, scale: BmdScale
) -> dict[str, Any]:
    """The keys of `train.data.VoiRow`."""
    about = study.acquisition
    target = None if label is None else to_sbmd(label.bmd_g_cm2, label.maker)
    return {
        "patient": entry.patient,
        "part": "train",
        "site": site,
        "device": "" if label is None else label.maker,
        "level": vertebra.level,
        "age_years": _UNKNOWN_AGE if about.age_years is None else about.age_years,
        "sex": about.sex or "",
        "kvp": about.kvp or 0.0,
        "thickness_mm": about.thickness_mm or 0.0,
        "kernel": about.kernel_class,
        "phase": about.phase,
        "density_mg_cm3": float("nan"),
        "sbmd_g_cm2": None,
        "reading_g_cm2": None if label is None else label.bmd_g_cm2,
        "target_sbmd_g_cm2": target,
        "diagnosis": _NO_LABEL if target is None else diagnosis_of(target, vertebra.level, scale),
        "true_diagnosis": _NO_LABEL,
        "visible_g_cm2": None,
        "machine_sbmd_g_cm2": None,
        "vendor": about.manufacturer,
        "scanner_model": about.model,
    }


def _write_last(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
