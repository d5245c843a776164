"""The labelled vertebrae of a site: what a refit accepts, what it refuses, and how patients are dealt into folds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from osteo_daemon.errors import RefitRefused
from osteo_daemon.inference.scope import ScannerName, labels_of
from osteo_daemon.network.config import CLASSES
from train.data import VoiRow, VoiSet

Index = npt.NDArray[np.int64]
Vec = npt.NDArray[np.float64]

MINIMUM_PATIENTS: Final = 12
MINIMUM_VERTEBRAE: Final = 40
"""Five folds of patients, each with enough to tell a machine's offset from chance: the SD of a reading against the CT
is some 0.07 g/cm2, so its mean over 12 patients is known within 0.02 g/cm2."""
MINIMUM_PATIENTS_PER_DEVICE: Final = 8
MINIMUM_PATIENTS_PER_SCANNER: Final = 8
MINIMUM_PATIENTS_PER_CLASS: Final = 3
BMD_RANGE_G_CM2: Final = (0.3, 2.2)
"""Areal BMD of single lumbar vertebrae on any maker's scale; what lies outside is a T-score or another unit."""
LEAST_CORRELATION: Final = 0.3
"""Of readings and the parent's BMD over patients. A parent that is blind to the site is of no use to start from, and
readings of shuffled patients give about zero."""
SLOPE_RANGE: Final = (0.5, 2.0)
"""Of readings over the parent's BMD: makers differ by some 15 %, units by 10 or 1000."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteData:
    """What may be learnt from.

    Attributes:
        data: the opened set; its rows stand for the hospital's truth: a reading is all that is known.
        index: (N,) labelled rows of levels that DXA measures.
        scanners: that a refit speaks for; None where none is named often enough, and it would speak for every one.
        devices: densitometers with enough patients for an expert of their own, in alphabetical order.
        fits_classes: at least two classes have enough patients.
        notes: what the reader of the verdict should know.
        sha256: of table and voxels.
    """

    data: VoiSet
    index: Index
    scanners: frozenset[ScannerName] | None
    devices: tuple[str, ...]
    fits_classes: bool
    notes: tuple[str, ...]
    sha256: str

    @property
    def rows(self) -> list[VoiRow]:
        """Of ``index``."""
        return [self.data.rows[i] for i in self.index]

    @property
    def scanner_of_rows(self) -> list[ScannerName]:
        """(N,) maker and model."""
        return [row.scanner for row in self.rows]

    @property
    def patients(self) -> npt.NDArray[np.str_]:
        """(N,) pseudonyms."""
        return np.array([row.patient for row in self.rows])

    @property
    def target(self) -> Vec:
        """(N,) readings in g/cm2."""
        return np.array([row.target_sbmd_g_cm2 for row in self.rows], dtype=np.float64)

    @property
    def classes(self) -> Index:
        """(N,) classes of the readings."""
        return np.array([row.diagnosis for row in self.rows], dtype=np.int64)


def digest_of_set(folder: Path) -> str:
    """sha256 over table.json and voi.npy."""
    digest = hashlib.sha256()
    for name in ("table.json", "voi.npy"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def as_known_at_site(row: VoiRow) -> VoiRow:
    """The row with its reading in the place of a truth that no hospital has, so that figures judge against readings."""
    return replace(
        row,
        sbmd_g_cm2=row.target_sbmd_g_cm2,
        true_diagnosis=row.diagnosis,
        machine_sbmd_g_cm2=None,
        visible_g_cm2=None,
    )


def accept(data: VoiSet, sha256: str, bmd_levels: Sequence[str]) -> SiteData:
    """Check the numbers that need no network.

    Raises:
        RefitRefused: there are too few patients, vertebrae or classes, or readings lie outside the range of BMD.
    """
    rows = tuple(as_known_at_site(row) for row in data.rows)
    data = replace(data, rows=rows)
    index = np.array(
        [i for i, r in enumerate(rows) if r.target_sbmd_g_cm2 is not None and r.level in bmd_levels], dtype=np.int64
    )
    index, scanners, notes = _of_scanners(rows, index)
    chosen = [rows[i] for i in index]
    patients = {row.patient for row in chosen}
    if len(patients) < MINIMUM_PATIENTS or len(chosen) < MINIMUM_VERTEBRAE:
        raise RefitRefused(
            f"{len(chosen)} labelled vertebrae of {len(patients)} patients; a refit needs at least "
            f"{MINIMUM_VERTEBRAE} of {MINIMUM_PATIENTS}"
        )
    low, high = BMD_RANGE_G_CM2
    outside = sum(not low <= float(row.target_sbmd_g_cm2 or 0.0) <= high for row in chosen)
    if outside:
        raise RefitRefused(
            f"{outside} of {len(chosen)} readings lie outside {low} to {high} g/cm2: T-scores or another unit?"
        )
    if any(row.diagnosis not in range(len(CLASSES)) for row in chosen):
        raise RefitRefused("a labelled vertebra has no diagnosis class")
    each = {k: len({row.patient for row in chosen if row.diagnosis == k}) for k in range(len(CLASSES))}
    enough = [k for k, count in each.items() if count >= MINIMUM_PATIENTS_PER_CLASS]
    if len([k for k, count in each.items() if count]) < 2:
        raise RefitRefused(f"all readings are of one class ({CLASSES[chosen[0].diagnosis]}); a refit needs two or more")
    for k, count in each.items():
        if count < MINIMUM_PATIENTS_PER_CLASS:
            notes.append(f"only {count} patients have a vertebra of class {CLASSES[k]}")
    if len(enough) < 2:
        notes.append("too few patients of a second class: the diagnosis head stays the parent's")
    by_device = {d: len({r.patient for r in chosen if r.device == d}) for d in sorted({r.device for r in chosen})}
    devices = tuple(d for d, count in by_device.items() if count >= MINIMUM_PATIENTS_PER_DEVICE)
    if not devices:
        raise RefitRefused(
            f"no densitometer has {MINIMUM_PATIENTS_PER_DEVICE} patients: "
            + ", ".join(f"{device} {count}" for device, count in by_device.items())
        )
    for device, count in by_device.items():
        if device not in devices:
            notes.append(f"{device} has {count} patients only and gets no expert of its own")
    return SiteData(data, index, scanners, devices, len(enough) >= 2, tuple(notes), sha256)


def _of_scanners(rows: Sequence[VoiRow], index: Index) -> tuple[Index, frozenset[ScannerName] | None, list[str]]:
    """Rows of scanners with enough patients, those scanners, and what was left out; all rows where there are none."""
    patients: dict[ScannerName, set[str]] = {}
    for i in index:
        patients.setdefault(rows[i].scanner, set()).add(rows[i].patient)
    enough = frozenset(name for name, own in patients.items() if name[0] and len(own) >= MINIMUM_PATIENTS_PER_SCANNER)
    if not enough:
        note = f"no scanner has {MINIMUM_PATIENTS_PER_SCANNER} patients and a name: the refit speaks for every scanner"
        return index, None, [note]
    notes = [f"speaks for {labels_of(enough)} alone; for every other scanner it says what the deployed bundle says"]
    notes += [
        f"{labels_of([name])} has {len(own)} patients only: left out, the deployed bundle goes on speaking for it"
        for name, own in sorted(patients.items())
        if name not in enough
    ]
    kept = [i for i in index if rows[i].scanner in enough]
    return np.array(kept, dtype=np.int64), enough, notes


def check_against_parent(site: SiteData, parent_bmd: Vec) -> tuple[str, ...]:
    """Do readings go along with what the parent sees? For all and for each device.

    Args:
        parent_bmd: (N,) calibrated BMD of the deployed bundle for the rows of ``site.index``, in g/cm2.

    Returns:
        Notes on scales that differ.

    Raises:
        RefitRefused: readings and images seem not to belong together, or a device reads on another scale.
    """
    notes = []
    devices, patients, target = np.array([row.device for row in site.rows]), site.patients, site.target
    for device in site.devices:
        own = np.flatnonzero(devices == device)
        names = np.unique(patients[own])
        read = np.array([target[own][patients[own] == name].mean() for name in names])
        seen = np.array([parent_bmd[own][patients[own] == name].mean() for name in names])
        if read.std() == 0 or seen.std() == 0:
            raise RefitRefused(f"all readings of {device} are the same")
        correlation = float(np.corrcoef(read, seen)[0, 1])
        # the reduced major axis: neither of the two is without error
        slope = float(read.std() / seen.std())
        if correlation < LEAST_CORRELATION:
            raise RefitRefused(
                f"readings of {device} hardly go along with the images (correlation {correlation:.2f} over "
                f"{len(names)} patients): were patients mixed up?"
            )
        if not SLOPE_RANGE[0] <= slope <= SLOPE_RANGE[1]:
            raise RefitRefused(
                f"readings of {device} rise {slope:.2f} times as fast as the parent's BMD: another scale or unit?"
            )
        if not 0.8 <= slope <= 1.25:
            notes.append(f"readings of {device} rise {slope:.2f} times as fast as the parent's BMD")
    return tuple(notes)


def deal(patients: npt.NDArray[np.str_], classes: Index, folds: int, seed: int) -> Index:
    """(N,) fold of each vertebra: whole patients, shuffled by ``seed``, dealt out by their worst class."""
    names = np.unique(patients)
    worst = np.array([classes[patients == name].max() for name in names])
    order = np.random.default_rng([seed, 4001]).permutation(len(names))
    order = order[np.argsort(-worst[order], kind="stable")]
    fold = {names[place]: number % folds for number, place in enumerate(order)}
    return np.array([fold[name] for name in patients], dtype=np.int64)
