"""Virtual patients of the story: their CTs, their densitometry, and cheaper patients straight in the archive."""

from __future__ import annotations

import csv
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import torch

from osteo_daemon.archive.export import export_dataset
from osteo_daemon.archive.key import Identity
from osteo_daemon.archive.record import StudyVois
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.network.config import BmdScale
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from tests.refits import OFFSET_G_CM2
from train.data import open_set
from train.replay import load_network, replay_of
from train.truth import LEVEL_OFFSET_G_CM2, MAKERS, diagnosis, draw_readings, draw_truth, from_sbmd, t_score, to_sbmd

LEVELS: Final = tuple(LEVEL_OFFSET_G_CM2)
MAKER: Final = "Hologic"
CT_DAY: Final = "20260105"
_YOUNG_G_CM2: Final = {"L1": 0.974, "L2": 1.054, "L3": 1.104, "L4": 1.124}
_YOUNG_SD_G_CM2: Final = 0.11
"""Of the maker's own reference: what its T-scores are made of."""
_DXA_DAY: Final = "2026-02-01"
_DENSITY_MG_CM3: Final = (40.0, 200.0)
_SPACING_MM: Final = 5.0
_CORE_HALF_MM: Final = (9.0, 11.0, 15.0)
"""Half sides (caudal, posterior, left) of the block of a body that is made denser."""

_REHEARSED: Final = ("L2", "L3")
"""Enough levels for a replay set that only has to be there."""

Readings = dict[str, dict[str, float]]
"""Patient ID and level to g/cm2 on the maker's scale."""


def patient_of(number: int, count: int) -> VirtualPatient:
    """Patient ``number`` of ``count``: their densities cover the range evenly, in no order."""
    low, high = _DENSITY_MG_CM3
    place = (0.5 + (7 * number) % count) / count
    return VirtualPatient(
        seed=8_100_000 + number,
        age_years=55 + (5 * number) % 30,
        sex="FM"[number % 2],  # type: ignore[arg-type]
        density_mg_cm3=low + place * (high - low),
    )


def render(patient: VirtualPatient, top: str) -> PhantomStudy:
    """The scan from ``top`` to the sacrum, coarse."""
    return render_study(patient, coarse_scanner(_SPACING_MM), top=top, bottom="S1", workers=1)


def write_ct(study: PhantomStudy, folder: Path, name: str) -> list[Path]:
    """The scan as files of the patient ``name``."""
    identity = SeriesIdentity(patient_id=name, accession_number=name, study_date=CT_DAY, salt=name)
    return write_series(study, folder / name, identity)


def readings_of(study: PhantomStudy, number: int, denser_mg_cm3: float = 0.0) -> dict[str, float]:
    """What the site's densitometer reads: the truth of the virtual cohort, and `OFFSET_G_CM2` that no formula knows."""
    measured = [vertebra for vertebra in study.vertebrae if vertebra.level in LEVELS]
    truth = draw_truth(
        np.random.default_rng([5, number]),
        age_years=study.patient.age_years,
        sex=study.patient.sex,
        osteophytes=0.2,
        density_mg_cm3=dict.fromkeys(LEVELS, 100.0)
        | {vertebra.level: vertebra.density_mg_cm3 + denser_mg_cm3 for vertebra in measured},
        depth_mm=dict.fromkeys(LEVELS, 35.0) | {vertebra.level: vertebra.size_mm[1] for vertebra in measured},
    )
    read = draw_readings(np.random.default_rng([6, number]), {k: v.sbmd_g_cm2 for k, v in truth.items()}, MAKER)
    offset = {level: from_sbmd(to_sbmd(value, MAKER) + OFFSET_G_CM2, MAKER) for level, value in read.items()}
    return {vertebra.level: offset[vertebra.level] for vertebra in measured}


def write_labels(path: Path, readings: Readings) -> Path:
    """The densitometer's list."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "date", "maker", "model", "unit", "level", "bmd", "t_score"])
        for patient, by_level in readings.items():
            for level, value in by_level.items():
                score = (value - _YOUNG_G_CM2[level]) / _YOUNG_SD_G_CM2
                writer.writerow([patient, _DXA_DAY, MAKER, "Horizon A", "g/cm2", level, f"{value:.3f}", f"{score:.2f}"])
    return path


def seed_archive(archive: VoiArchive, study: PhantomStudy, count: int) -> Readings:
    """Further patients without their scans: the archived vertebrae of the one that was received, more and less dense.

    Args:
        archive: with that one study.
        study: what was received.
        count: of further patients.
    """
    (entry,) = archive.entries()
    kept = archive.read(entry)
    low, high = _DENSITY_MG_CM3
    found: Readings = {}
    for number in range(1, count + 1):
        denser = low + (high - low) * (number - 0.5) / count - study.vertebrae[0].density_mg_cm3
        name = f"STORY-{number:03d}"
        identity = Identity(name, "", "19500101", f"2.25.{number}", name, CT_DAY)
        assert archive.add(_denser(kept, denser, number), identity, 1, datetime.now(UTC).date())
        found[name] = readings_of(study, number, denser)
    return found


def _denser(kept: StudyVois, denser_mg_cm3: float, seed: int) -> StudyVois:
    """The same vertebrae with other HU in the trabecular core: at 120 kV about one HU for each mg/cm3."""
    centre = (np.asarray(kept.hu.shape[1:]) - 1) / 2
    half = np.asarray(_CORE_HALF_MM) / kept.spacing_mm
    place = np.stack(np.meshgrid(*(np.arange(n) for n in kept.hu.shape[1:]), indexing="ij"), axis=-1)
    core = (np.abs(place - centre) <= half).all(axis=-1)
    noise = np.random.default_rng([7, seed]).normal(0.0, 6.0, kept.hu.shape)
    hu = (kept.hu + np.rint(noise + core * denser_mg_cm3)).clip(-1024, 3071).astype(np.int16)
    moved = ("mean_hu", "median_hu", "corrected_hu")
    vertebrae = tuple(
        replace(
            entry,
            features={k: v + denser_mg_cm3 if k in moved else v for k, v in entry.features.items()},
        )
        for entry in kept.vertebrae
    )
    return replace(kept, hu=hu, vertebrae=vertebrae)


def write_replay(path: Path, archive: VoiArchive, parent: ModelBundle, readings: Readings) -> Path:
    """A replay set without rendering one: the same vertebrae as three other makers' patients, without the offset.

    Args:
        path: of the file.
        archive: with the seeded patients.
        parent: whose encoder makes the features.
        readings: at the site, by patient, whose offset is taken away again.
    """
    names = {entry.patient: who.patient_id for entry, who in archive.identities()}
    folder = path.with_suffix(".data")
    voi, scale = VoiSpec.from_json(parent.inference["voi"]), BmdScale.from_json(parent.inference["bmd_scale"])
    export_dataset(folder, archive=archive, labels=[], site="elsewhere", voi=voi, scale=scale, labelled_only=False)
    network = load_network(parent)
    data = open_set(folder)
    rows, chosen = [], []
    for index, row in enumerate(data.rows):
        if row.level in _REHEARSED:
            chosen.append(index)
        read = readings[names[row.patient]].get(row.level)
        number = int(names[row.patient].rpartition("-")[2])
        sbmd = None if read is None else to_sbmd(read, MAKER) - OFFSET_G_CM2
        known = -1 if sbmd is None else diagnosis(t_score(sbmd, row.level))
        rows.append(replace(row, device=MAKERS[number % len(MAKERS)], sbmd_g_cm2=sbmd, true_diagnosis=known))
    data = replace(data, rows=tuple(rows), config={**data.config, "levels": list(network.config.levels)})
    path.write_bytes(replay_of(network, data, list(MAKERS), torch.device("cpu"), np.array(chosen)).to_bytes())
    return path
