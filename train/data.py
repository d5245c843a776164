"""VOIs on disk and batches in memory.

A data set is a folder: ``voi.npy`` (N, D, H, W) int16 HU with a margin around the network's grid, ``table.json`` with
one row per VOI and the configuration it was made from. It is made once and read through a memory map. A virtual cohort
also has ``core.npy``, the share of trabecular bone in each voxel, and both once more as a coarser series would show
them (``coarse.npy``, ``coarse_core.npy``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from osteo_daemon.domain.observation import Scanner
from osteo_daemon.network.config import MoEConfig
from train.counterfactual import DensityChange
from train.splits import Part, check_disjoint
from train.truth import LEVEL_OFFSET_G_CM2, diagnosis, size_adds_g_cm2, t_score

MARGIN_VOXELS: Final = 4
"""Stored around the network's grid on every side: room for a random shift."""

NO_LABEL: Final = -1

_BEYOND_BODY_MM: Final = (16.0, 20.0, 27.0)
"""Half axes (caudal, posterior, left) of an ellipsoid that holds every lumbar body."""
_SOFT_HU: Final = (-160.0, 110.0)
_SOFT_GAIN: Final = (0.3, 1.2)
_SOFT_SHIFT_HU: Final = (-20.0, 50.0)
"""Fat and soft tissue, and how far they may move: from obese and unenhanced to hardly any fat and a venous phase."""

_SIZE_FACTOR: Final = (0.87, 1.15)

CORE_SCALE: Final = 200
"""Value of ``core.npy`` in a voxel that is trabecular bone all through."""


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
        visible_g_cm2: what an ideal reader of the CT could say of the sBMD (`train.truth.LevelTruth`).
        vendor: of the scanner, empty when not told.
        scanner_model: its name, empty when not told.
        machine_sbmd_g_cm2: what the site's machine would say without chance, converted; None at the external hospital.
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
    visible_g_cm2: float | None = None
    machine_sbmd_g_cm2: float | None = None
    vendor: str = ""
    scanner_model: str = ""

    @property
    def scanner(self) -> tuple[str, str]:
        """Maker and model, spelt as when a study is screened."""
        named = Scanner.named(self.vendor, self.scanner_model, "")
        return named.manufacturer, named.model


@dataclass(frozen=True, slots=True, eq=False)
class VoiSet:
    """A data set opened for reading.

    Attributes:
        rows: one per VOI.
        hu: (N, D, H, W) memory map of int16 HU.
        config: what the set was made from.
        core: (N, D, H, W) uint8 share of trabecular bone times `CORE_SCALE`, where the set has it.
        coarse, coarse_core: both as a coarser series shows them, where the set has them.
    """

    rows: tuple[VoiRow, ...]
    hu: npt.NDArray[np.int16]
    config: dict[str, Any]
    core: npt.NDArray[np.uint8] | None = None
    coarse: npt.NDArray[np.int16] | None = None
    coarse_core: npt.NDArray[np.uint8] | None = None

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

    def crop(self, config: MoEConfig) -> tuple[slice, slice, slice]:
        """Of a stored VOI to the network's grid.

        Raises:
            ValueError: the stored VOI is smaller.
        """
        stored = self.hu.shape[1:]
        if any(a < b for a, b in zip(stored, config.voi_shape, strict=True)):
            raise ValueError(f"VOIs of {stored} voxels are too small for a network of {config.voi_shape}")
        first, second, third = (
            slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(stored, config.voi_shape, strict=True)
        )
        return first, second, third


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
    others = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("core", "coarse", "coarse_core")
        if (folder / f"{name}.npy").exists()
    }
    for name, array in others.items():
        if array.shape != hu.shape:
            raise ValueError(f"{name}.npy of {folder} has the shape {array.shape}, voi.npy {hu.shape}")
    return VoiSet(rows, hu, document["config"], **others)


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
        coarse: probability of taking the vertebra as a coarser series shows it, where the set has that.
        density: probability of another trabecular density with the target moved along (`train.counterfactual`). It
            changes the label, so self-supervision leaves it off.
        surround: probability of other soft tissue around the body: leaner, fatter, with contrast medium. Textures there
            change, so self-supervision leaves it off.
        size: probability of a larger or smaller person, with the target moved along: bones of one level differ by more
            between people than those of neighbouring levels do in one. It changes the label, too.
        rename: probability of being told another level of those that DXA measures, with the target moved by the two
            levels' offset: which level it is comes from the whole scan, and BMD must follow the name, not the look.
    """

    shift_voxels: int = 4
    flip: bool = True
    noise_hu: float = 4.0
    offset_hu: float = 2.0
    cutout: float = 0.3
    coarse: float = 0.0
    density: float = 0.0
    surround: float = 0.0
    size: float = 0.0
    rename: float = 0.0

    def apply(
        self,
        hu: npt.NDArray[np.float32],
        rng: np.random.Generator,
        shape: tuple[int, ...] | None = None,
        spacing_mm: float = 1.0,
    ) -> npt.NDArray[np.float32]:
        """One VOI with its margin to one VOI of the network's grid, float32 HU.

        Args:
            shape: of that grid; None leaves `MARGIN_VOXELS` on each side.
            spacing_mm: of the voxels; tells where the body ends when the surroundings change.
        """
        shape = tuple(n - 2 * MARGIN_VOXELS for n in hu.shape) if shape is None else shape
        margin = (np.array(hu.shape) - shape) // 2
        reach = np.minimum(margin, self.shift_voxels)
        start = margin + rng.integers(-reach, reach + 1)
        out = hu[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].copy()
        if self.flip and rng.random() < 0.5:
            out = out[:, :, ::-1].copy()
        if rng.random() < self.cutout:
            self._cut(out, rng)
        if self.surround > 0.0 and rng.random() < self.surround:
            self._around(out, rng, spacing_mm)
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

    @staticmethod
    def _around(hu: npt.NDArray[np.float32], rng: np.random.Generator, spacing_mm: float) -> None:
        """Stretch and shift fat and soft tissue outside the vertebral body; bone and gas stay."""
        axes = np.ogrid[tuple(slice(0, n) for n in hu.shape)]
        squares = [
            ((axis - (n - 1) / 2.0) * spacing_mm / radius) ** 2
            for axis, n, radius in zip(axes, hu.shape, _BEYOND_BODY_MM, strict=True)
        ]
        outside = (squares[0] + squares[1] + squares[2] > 1.0) & (hu > _SOFT_HU[0]) & (hu < _SOFT_HU[1])
        hu[outside] = hu[outside] * np.float32(rng.uniform(*_SOFT_GAIN)) + np.float32(rng.uniform(*_SOFT_SHIFT_HU))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of B vertebrae; BMD is NaN and class `NO_LABEL` where there is no label.

    Attributes:
        hu: (B, D, H, W) float32 HU.
        level: (B,) true level index.
        given_level: (B,) the index told to the network, sometimes withheld or another in training.
        bmd: (B,) target in g/cm2.
        diagnosis: (B,) class.
        device: (B,) index of the densitometer, `NO_LABEL` for an unseen one.
        index: (B,) row of the data set.
        added: (B,) g/cm2 that a changed density, size or name added to the true BMD, also without a label.
    """

    hu: Tensor
    level: Tensor
    given_level: Tensor
    bmd: Tensor
    diagnosis: Tensor
    device: Tensor
    index: Tensor
    added: Tensor


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
    twins: bool = False,
    coarse: bool = False,
    change: DensityChange | None = None,
) -> Iterator[Batch]:
    """Iterate over the rows, shuffled and augmented when ``augmentation`` is given.

    Without augmentation ``coarse`` chooses the vertebrae as a coarser series shows them, and ``change`` gives all of
    them another density; their targets stay.

    Every random number depends on (seed, epoch, row) only, so a resumed run sees what an unbroken one would have.
    """
    order = indices
    if augmentation is not None:
        order = np.random.default_rng([seed, epoch]).permutation(indices)
    centre = data.crop(config)
    count = batch_size // 2 if twins else batch_size
    for start in range(0, len(order), count):
        chosen = order[start : start + count]
        if len(chosen) < count and not keep_last:
            return
        drawn = [(int(i), [seed, epoch, int(i), *again]) for again in ([], [1])[: 2 if twins else 1] for i in chosen]
        vois, hidden, rows, told, added = [], [], [], [], []
        for i, entropy in drawn:
            rng = np.random.default_rng(entropy)
            row, name, change_g_cm2 = data.rows[i], data.rows[i].level, 0.0
            if augmentation is None:
                vois.append(_plain(data, i, coarse, change)[centre])
            else:
                voi, row, change_g_cm2 = _augmented(data, i, augmentation, rng, config)
                vois.append(voi)
                row, name, moved_g_cm2 = _renamed(row, augmentation, rng, config)
                change_g_cm2 += moved_g_cm2
            told.append(config.levels.index(name))
            hidden.append(rng.random() < hide_level)
            rows.append(row)
            added.append(change_g_cm2)
        level = torch.tensor([config.levels.index(row.level) for row in rows])
        yield Batch(
            hu=torch.from_numpy(np.stack(vois)),
            level=level,
            given_level=torch.where(torch.tensor(hidden), torch.full_like(level, -1), torch.tensor(told)),
            bmd=torch.tensor(
                [np.nan if row.target_sbmd_g_cm2 is None else row.target_sbmd_g_cm2 for row in rows]
            ).float(),
            diagnosis=torch.tensor([row.diagnosis for row in rows]),
            device=torch.tensor([devices.index(row.device) if row.device in devices else NO_LABEL for row in rows]),
            index=torch.tensor([i for i, _ in drawn]),
            added=torch.tensor(added),
        )


def _plain(data: VoiSet, i: int, coarse: bool, change: DensityChange | None) -> npt.NDArray[np.float32]:
    """One stored VOI.

    Raises:
        ValueError: the set lacks what is asked for.
    """
    hu, core = (data.coarse, data.coarse_core) if coarse else (data.hu, data.core)
    if hu is None or (change is not None and core is None):
        raise ValueError("this data set has no coarse series or no shares of trabecular bone")
    voi: npt.NDArray[np.float32] = hu[i].astype(np.float32)
    if change is None or core is None:
        return voi
    share = core[i].astype(np.float32) / CORE_SCALE
    changed: npt.NDArray[np.float32] = change.apply(voi, share, data.rows[i].kvp, float(data.config["voi_spacing_mm"]))
    return changed


def _augmented(
    data: VoiSet, i: int, augmentation: Augmentation, rng: np.random.Generator, config: MoEConfig
) -> tuple[npt.NDArray[np.float32], VoiRow, float]:
    """One VOI of the network's grid, its row, whose target follows its changes, and what these added in g/cm2."""
    hu, core, row = data.hu, data.core, data.rows[i]
    if rng.random() < augmentation.coarse and data.coarse is not None:
        hu, core = data.coarse, data.coarse_core
    voi, added = hu[i].astype(np.float32), 0.0
    if rng.random() < augmentation.density and core is not None:
        change = DensityChange.draw(rng, row.density_mg_cm3)
        spacing_mm = float(data.config["voi_spacing_mm"])
        voi = change.apply(voi, core[i].astype(np.float32) / CORE_SCALE, row.kvp, spacing_mm)
        added += change.sbmd_g_cm2
    if augmentation.size > 0.0 and rng.random() < augmentation.size:
        factor = float(rng.uniform(*_SIZE_FACTOR))
        voi = _resized(voi, factor)
        added += size_adds_g_cm2(factor)
    if added and row.target_sbmd_g_cm2 is not None:
        target = row.target_sbmd_g_cm2 + added
        row = replace(row, target_sbmd_g_cm2=target, diagnosis=diagnosis(t_score(target, row.level)))
    return augmentation.apply(voi, rng, config.voi_shape, config.voi_spacing_mm), row, added


def _renamed(
    row: VoiRow, augmentation: Augmentation, rng: np.random.Generator, config: MoEConfig
) -> tuple[VoiRow, str, float]:
    """The row with the target of the level that is told, that level, and by how many g/cm2 the target moved."""
    if not (augmentation.rename > 0.0 and row.level in config.bmd_levels and rng.random() < augmentation.rename):
        return row, row.level, 0.0
    told = config.bmd_levels[int(rng.integers(len(config.bmd_levels)))]
    moved = LEVEL_OFFSET_G_CM2[told] - LEVEL_OFFSET_G_CM2[row.level]
    if row.target_sbmd_g_cm2 is not None:  # the class stays: each level is held against its own reference
        row = replace(row, target_sbmd_g_cm2=row.target_sbmd_g_cm2 + moved)
    return row, told, moved


def _resized(voi: npt.NDArray[np.float32], factor: float) -> npt.NDArray[np.float32]:
    """The VOI of a person whose bones are ``factor`` times as large; beyond its edge the edge repeats."""
    middle = (np.array(voi.shape) - 1) / 2.0
    resized: npt.NDArray[np.float32] = ndimage.affine_transform(
        voi, np.full(3, 1.0 / factor), offset=middle * (1.0 - 1.0 / factor), order=1, mode="nearest", output=np.float32
    )
    return resized


def epoch_rows(data: VoiSet, labelled_share: float, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Training rows of one epoch.

    Args:
        labelled_share: of the epoch have a reading: every labelled row once, others drawn anew each epoch; 0 takes all
            rows as they are.
    """
    everything = data.indices("train")
    labelled = data.indices("train", labelled=True)
    if labelled_share <= 0 or len(labelled) == 0:
        return everything
    others = np.setdiff1d(everything, labelled)
    count = min(len(others), round(len(labelled) * (1.0 / labelled_share - 1.0)))
    drawn = np.random.default_rng([seed, epoch, 77]).choice(others, count, replace=False)
    return np.sort(np.concatenate([labelled, drawn]))
