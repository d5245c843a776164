"""VOIs on disk and batches in memory.

A data set is a folder: ``voi.npy`` (N, D, H, W) int16 HU with a margin around the network's grid, ``table.json`` with
one row per VOI and the configuration it was made from. It is made once and read through a memory map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osteo_daemon.network.config import MoEConfig
from train.splits import Part, check_disjoint

MARGIN_VOXELS: Final = 4
"""Stored around the network's grid on every side: room for a random shift."""

NO_LABEL: Final = -1


@dataclass(frozen=True, slots=True)
class VoiRow:
    """One vertebra of one scan.

    Attributes:
        patient: name of the (virtual) patient.
        part: train, val, test or external.
        site: where it was scanned.
        device: densitometer maker of the site, or the unseen one.
        level: vertebral level.
        age_years, sex: of the patient.
        kvp, thickness_mm, kernel, phase: of the scan.
        density_mg_cm3: true trabecular density.
        sbmd_g_cm2: true sBMD, None beyond L1-L4.
        reading_g_cm2: the densitometer's own number, None without a label.
        target_sbmd_g_cm2: the reading converted by Hui's formula: the training target, None without a label.
        diagnosis: class of ``target_sbmd_g_cm2``, `NO_LABEL` without a label.
        true_diagnosis: class of ``sbmd_g_cm2``.
    """

    patient: str
    part: Part
    site: str
    device: str
    level: str
    age_years: int
    sex: str
    kvp: float
    thickness_mm: float
    kernel: str
    phase: str
    density_mg_cm3: float
    sbmd_g_cm2: float | None
    reading_g_cm2: float | None
    target_sbmd_g_cm2: float | None
    diagnosis: int
    true_diagnosis: int


@dataclass(frozen=True, slots=True, eq=False)
class VoiSet:
    """A data set opened for reading: rows and a (N, D, H, W) memory map of int16 HU."""

    rows: tuple[VoiRow, ...]
    hu: npt.NDArray[np.int16]
    config: dict[str, Any]

    def indices(self, *parts: Part, labelled: bool = False) -> npt.NDArray[np.int64]:
        """Rows of these parts, only those with a densitometer's reading when ``labelled``."""
        return np.array(
            [
                i
                for i, row in enumerate(self.rows)
                if row.part in parts and (not labelled or row.target_sbmd_g_cm2 is not None)
            ],
            dtype=np.int64,
        )


def write_table(folder: Path, rows: Sequence[VoiRow], config: dict[str, Any]) -> None:
    """Write table.json last: its presence says that the data set is complete."""
    document = {"config": config, "rows": [asdict(row) for row in rows]}
    temporary = folder / "table.json.part"
    temporary.write_text(json.dumps(document))
    temporary.replace(folder / "table.json")


def open_set(folder: Path) -> VoiSet:
    """Open a data set.

    Raises:
        FileNotFoundError: it is not complete.
        ValueError: rows and voxels disagree, or a patient lies in two parts.
    """
    document = json.loads((folder / "table.json").read_text())
    rows = tuple(VoiRow(**row) for row in document["rows"])
    hu = np.load(folder / "voi.npy", mmap_mode="r", allow_pickle=False)
    if hu.shape[0] != len(rows) or hu.dtype != np.int16:
        raise ValueError(f"{folder} holds {hu.shape} {hu.dtype} voxels for {len(rows)} rows")
    check_disjoint([row.patient for row in rows], [row.part for row in rows])
    return VoiSet(rows, hu, document["config"])


def digest_of(config: dict[str, Any]) -> str:
    """sha256 of a configuration in canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Changes that keep density and texture: no blur, no warp, no gamma, never cranio-caudal flips.

    Attributes:
        shift_voxels: largest random shift along each axis.
        flip: left-right half of the time.
        noise_hu: largest SD of added white noise, far below a scan's own.
        offset_hu: SD of a constant added to the VOI: what calibration leaves.
        cutout: probability of a box outside the body being replaced by its mean.
    """

    shift_voxels: int = 4
    flip: bool = True
    noise_hu: float = 4.0
    offset_hu: float = 2.0
    cutout: float = 0.3

    def apply(self, hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """One VOI with its margin to one VOI of the network's grid, float32 HU."""
        shift = rng.integers(-self.shift_voxels, self.shift_voxels + 1, size=3)
        start = MARGIN_VOXELS + shift
        shape = np.array(hu.shape) - 2 * MARGIN_VOXELS
        out = hu[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].copy()
        if self.flip and rng.random() < 0.5:
            out = out[:, :, ::-1].copy()
        if rng.random() < self.cutout:
            self._cut(out, rng)
        out += np.float32(rng.normal(0.0, self.offset_hu))
        out += rng.standard_normal(out.shape, dtype=np.float32) * np.float32(rng.uniform(0, self.noise_hu))
        return out

    @staticmethod
    def _cut(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
        """Blank one of the lateral or dorsal outer strips, outside every vertebral body."""
        _, h, w = hu.shape
        side = int(rng.integers(3))
        depth = int(rng.integers(2, 6))
        box = (slice(None), slice(None), slice(0, depth))
        if side == 1:
            box = (slice(None), slice(None), slice(w - depth, w))
        elif side == 2:
            box = (slice(None), slice(h - depth, h), slice(None))
        hu[box] = hu[box].mean()


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of B vertebrae; BMD is NaN and class `NO_LABEL` where there is no label.

    Attributes:
        hu: (B, D, H, W) float32 HU.
        level: (B,) true level index.
        given_level: (B,) the index told to the network, sometimes withheld in training.
        bmd: (B,) target in g/cm2.
        diagnosis: (B,) class.
        device: (B,) index of the densitometer, `NO_LABEL` for an unseen one.
        index: (B,) row of the data set.
    """

    hu: Tensor
    level: Tensor
    given_level: Tensor
    bmd: Tensor
    diagnosis: Tensor
    device: Tensor
    index: Tensor


def batches(
    data: VoiSet,
    indices: npt.NDArray[np.int64],
    config: MoEConfig,
    devices: Sequence[str],
    batch_size: int,
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    epoch: int = 0,
    hide_level: float = 0.0,
    keep_last: bool = True,
) -> Iterator[Batch]:
    """Iterate over the rows, shuffled and augmented when ``augmentation`` is given.

    Every random number depends on (seed, epoch, row) only, so a resumed run sees what an unbroken one would have.
    """
    order = indices
    if augmentation is not None:
        order = np.random.default_rng([seed, epoch]).permutation(indices)
    centre = tuple(slice(MARGIN_VOXELS, -MARGIN_VOXELS) for _ in range(3))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        if len(chosen) < batch_size and not keep_last:
            return
        vois, hidden = [], []
        for i in chosen:
            rng = np.random.default_rng([seed, epoch, int(i)])
            stored = data.hu[i].astype(np.float32)
            vois.append(stored[centre] if augmentation is None else augmentation.apply(stored, rng))
            hidden.append(rng.random() < hide_level)
        rows = [data.rows[i] for i in chosen]
        level = torch.tensor([config.levels.index(row.level) for row in rows])
        yield Batch(
            hu=torch.from_numpy(np.stack(vois)),
            level=level,
            given_level=torch.where(torch.tensor(hidden), torch.full_like(level, -1), level),
            bmd=torch.tensor(
                [np.nan if row.target_sbmd_g_cm2 is None else row.target_sbmd_g_cm2 for row in rows]
            ).float(),
            diagnosis=torch.tensor([row.diagnosis for row in rows]),
            device=torch.tensor([devices.index(row.device) if row.device in devices else NO_LABEL for row in rows]),
            index=torch.from_numpy(np.asarray(chosen)),
        )
