"""The fourth site of `benchmarks.refit`: virtual patients of the external hospital, and the machine that reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from osteo_daemon.inference.bundle import ModelBundle
from train.cohort import ARRAYS, CohortConfig, make_cohort
from train.data import VoiRow, VoiSet, open_set, write_table
from train.features import encode_rows
from train.judging import Index
from train.replay import Replay, load_network
from train.routed import Routed
from train.shrink import SPACING_MM, shrink_cohort
from train.site_data import as_known_at_site
from train.site_pool import Pool
from train.truth import PATIENT_ERROR, READING_SD_G_CM2, diagnosis, t_score

SEED: Final = 20912
FACTOR: Final = 1.05
OFFSET_G_CM2: Final = 0.02
"""Of the fourth machine: within the 4-7 % that cross-calibration leaves (train.truth). An assumption."""

SCANNER: Final = ("FOURTH", "VIRTUAL")
"""Maker and model that the headers of the site's CTs would give; no other site has that scanner."""
_ROWS: Final = 256


def machine_says(sbmd: float) -> float:
    """The fourth machine without chance."""
    return FACTOR * sbmd + OFFSET_G_CM2


def measured(rows: tuple[VoiRow, ...]) -> list[VoiRow]:
    """Readings of the fourth machine: chance of the patient on it and of each measurement (`train.truth`)."""
    found = []
    for number, row in enumerate(rows):
        if row.sbmd_g_cm2 is None:
            continue
        digits = int("".join(c for c in row.patient if c.isdigit())[-9:])
        person = 1.0 + np.random.default_rng([SEED, digits]).normal(0.0, PATIENT_ERROR)
        reading = float(machine_says(row.sbmd_g_cm2) * person)
        reading += float(np.random.default_rng([SEED, digits, number]).normal(0.0, READING_SD_G_CM2))
        found.append(
            replace(
                row,
                site="fourth",
                device="Fourth",
                vendor=SCANNER[0],
                scanner_model=SCANNER[1],
                reading_g_cm2=reading,
                target_sbmd_g_cm2=reading,
                machine_sbmd_g_cm2=machine_says(row.sbmd_g_cm2),
                diagnosis=diagnosis(t_score(reading, row.level)),
            )
        )
    return found


def site_of(folder: Path) -> tuple[VoiSet, Index]:
    """The external patients' measured vertebrae with their new readings, and the rows of ``folder`` that they are."""
    data = open_set(folder)
    index = np.array(
        [i for i, r in enumerate(data.rows) if r.part == "external" and r.sbmd_g_cm2 is not None], dtype=np.int64
    )
    return replace(data, rows=tuple(measured(tuple(data.rows[i] for i in index)))), index


def rendered(folder: Path, bundle: ModelBundle, patients: int, workers: int) -> Path:
    """Render external patients on the bundle's grid."""
    make_cohort(CohortConfig.read(patients=patients, external_share=1.0, seed=SEED), folder / "cohort", workers)
    if load_network(bundle).config.voi_spacing_mm != SPACING_MM:
        return folder / "cohort"
    shrink_cohort(folder / "cohort", folder / "small", workers)
    return folder / "small"


def enlarged(folder: Path, work: Path, bundle: ModelBundle, patients: int, workers: int) -> Path:
    """A cohort's external patients, and newly rendered ones until they are ``patients``; the cohort if it has enough.

    Raises:
        ValueError: ``work`` holds those of another cohort.
    """
    own = open_set(folder)
    kept = own.indices("external")
    lacking = patients - len({own.rows[i].patient for i in kept})
    if lacking <= 0:
        return folder
    more = open_set(rendered(work, bundle, lacking, workers))
    rows = [*(own.rows[i] for i in kept), *more.rows]
    config = {**own.config, "enlarged_by": more.config["sha256"], "patients": patients}
    target = work / "joined"
    if (target / "table.json").exists():
        if open_set(target).config != config:
            raise ValueError(f"{target} holds another cohort; remove it")
        return target
    target.mkdir(exist_ok=True)
    for name in ARRAYS:
        first, second = (data.hu if name == "voi" else getattr(data, name) for data in (own, more))
        if first is None or second is None:
            continue
        shape = (len(rows), *first.shape[1:])
        array = np.lib.format.open_memmap(target / f"{name}.npy", mode="w+", dtype=first.dtype, shape=shape)
        for start in range(0, len(kept), _ROWS):
            chosen = kept[start : start + _ROWS]
            array[start : start + len(chosen)] = first[chosen]
        array[len(kept) :] = second
        array.flush()
    write_table(target, rows, config)
    return target


class Site:
    """The fourth site on features of a parent.

    Args:
        bundle: the parent.
        folder: a cohort with external rows.
        replay: of the parent.
        test_patients: to judge with.
    """

    def __init__(self, bundle: ModelBundle, folder: Path, replay: Replay, test_patients: int) -> None:
        self.folder, self.bundle, self.network = folder, bundle, load_network(bundle)
        data, self.rows_in_cohort = site_of(folder)
        whole = open_set(folder)
        features = encode_rows(self.network, whole, self.rows_in_cohort, torch.device("cpu"))
        levels = {"levels": list(self.network.config.levels)}
        self.data = replace(data, rows=tuple(map(as_known_at_site, data.rows)), config={**data.config, **levels})
        self.machine = np.array([row.machine_sbmd_g_cm2 for row in data.rows], dtype=np.float64)
        self.machine_class = np.array(
            [diagnosis(t_score(v, r.level)) for v, r in zip(self.machine, data.rows, strict=True)], dtype=np.int64
        )
        self.rehearsed, self.held = replay.halves()
        rows = self.data.rows
        self.patients = np.array([row.patient for row in rows])
        self.target = np.array([row.target_sbmd_g_cm2 for row in rows], dtype=np.float64)
        self.deployed = Routed.of_bundle(bundle)
        self.scanners = frozenset(row.scanner for row in rows)
        self.pool = Pool(
            parent=self.network,
            copied=(None,),
            expert_of=torch.full((len(rows),), self.network.config.expert_count),
            features=features,
            target=torch.from_numpy(self.target).float(),
            classes=torch.tensor([row.diagnosis for row in rows]),
            patients=self.patients,
            rehearsed=self.rehearsed,
            fits_classes=True,
            scoped=True,
            data=self.data,
            index=np.arange(len(rows)),
        )
        names = list(dict.fromkeys(self.patients.tolist()))
        self.names = names[test_patients:]
        self.test = np.flatnonzero(np.isin(self.patients, names[:test_patients]))

    def labelled(self, vertebrae: int) -> Index:
        """Whole patients with about that many vertebrae."""
        per_patient = len(self.patients) / len(np.unique(self.patients))
        return np.flatnonzero(np.isin(self.patients, self.names[: round(vertebrae / per_patient)]))
