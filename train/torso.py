"""The one labelled torso: CT, tissue labels and the planes of its spinal column.

Frame of all training code: millimetres ordered (z, y, x), z cranial, y posterior, x left (LPS reversed), the centre
of voxel (0, 0, 0) at the origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]
SPACING_MM = 3.0
N_LEVELS = 6  # L5 (0) to T12 (5)


class Tissue(IntEnum):
    """What a voxel is made of; the first nine are the network's classes of the same number."""

    OUTSIDE = 0
    BODY = 1
    DISC = 2
    S1_BODY = 3
    SACRUM = 4
    POSTERIOR = 5
    RIB = 6
    PELVIS = 7
    CANAL = 8
    FAT_SUBCUTANEOUS = 9
    FAT_VISCERAL = 10
    MUSCLE = 11
    PSOAS = 12
    SOFT = 13
    GAS = 14
    LUNG = 15
    LIVER = 16
    SPLEEN = 17
    KIDNEY = 18
    BOWEL = 19
    BLADDER = 20
    ARTERY = 21
    VEIN = 22
    CARTILAGE = 23
    TABLE = 24


N_TISSUES = len(Tissue)
BONES = (Tissue.BODY, Tissue.S1_BODY, Tissue.SACRUM, Tissue.POSTERIOR, Tissue.RIB, Tissue.PELVIS)

# labels of example_seg_fast_force_split.nii.gz in TotalSegmentator's order
_ORGANS: dict[Tissue, tuple[int, ...]] = {
    Tissue.SPLEEN: (1,),
    Tissue.KIDNEY: (2, 3, 23, 24),
    Tissue.LIVER: (5,),
    Tissue.BOWEL: (4, 6, 18, 19, 20),
    Tissue.SOFT: (7, 8, 9, 15, 22),
    Tissue.LUNG: (10, 11, 12, 13, 14),
    Tissue.BLADDER: (21,),
    Tissue.ARTERY: (52, 65, 66),
    Tissue.VEIN: (63, 64, 67, 68),
    Tissue.MUSCLE: (80, 81, 82, 83, 84, 85, 86, 87),
    Tissue.PSOAS: (88, 89),
    Tissue.CARTILAGE: (117,),
    Tissue.CANAL: (79,),
    Tissue.PELVIS: (75, 76, 77, 78),
    Tissue.RIB: (*range(92, 116),),
    Tissue.SACRUM: (25,),
    Tissue.POSTERIOR: (26, 27, 28, 29, 30, 31, 32, 33),
}


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane across the column.

    Attributes:
        centre: (3,) point in mm (z, y, x).
        normal: (3,) unit vector pointing cranially, without a lateral part.
    """

    centre: Floats
    normal: Floats

    def distance(self, q: Tensor) -> Tensor:
        """Signed distance in mm of (3, ...) points, positive above the plane."""
        offset = float(self.centre @ self.normal)
        n = [float(v) for v in self.normal]
        return q[0] * n[0] + q[1] * n[1] + q[2] * n[2] - offset


@dataclass(frozen=True, slots=True)
class Torso:
    """Training material on its own grid.

    Attributes:
        channels: (1, 3, D, H, W) HU, level coordinate u (0 at the L5-S1 disc, 1 at L4-L5, ...) and depth below the
            bone surface in mm, at 3 mm.
        tissues: (1, 1, 2D, 2H, 2W) `Tissue` as float at 1.5 mm.
        tissue_mean_hu: (N_TISSUES,) mean HU of each tissue.
        discs: planes of the middle of the discs from L5-S1 (0) to T12-L1 (5).
        bodies: planes of mid-body from L5 (0) to T12 (5).
        column: (n, 3) polyline through S1, discs and bodies, caudal to cranial.
    """

    channels: Tensor
    tissues: Tensor
    tissue_mean_hu: Tensor
    discs: tuple[Plane, ...]
    bodies: tuple[Plane, ...]
    column: Floats


def _load(folder: Path, name: str) -> npt.NDArray[np.float32]:
    """A NIfTI grid (RAS) as a (z, y, x) array whose axes run cranial, posterior, left (LPS)."""
    image = nib.load(folder / name)
    canonical = nib.as_closest_canonical(image)
    array = np.asarray(canonical.dataobj, dtype=np.float32)
    return np.ascontiguousarray(array[::-1, ::-1, :].transpose(2, 1, 0))


def _doubled(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Linear interpolation to twice the resolution along every axis; fine voxel 2i is coarse voxel i."""
    for axis in range(3):
        following = np.concatenate([np.delete(values, 0, axis), np.take(values, [-1], axis)], axis)
        pairs = np.stack([values, 0.5 * (values + following)], axis=axis + 1)
        values = pairs.reshape(tuple(2 * n if a == axis else n for a, n in enumerate(values.shape)))
    return values


def _fine_labels(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Labels at twice the resolution with smooth boundaries (argmax of the blurred one-hot maps)."""
    best = np.full([2 * n for n in labels.shape], -1.0, dtype=np.float32)
    out = np.zeros(best.shape, dtype=np.uint8)
    for label in np.unique(labels):
        score = _doubled(ndimage.gaussian_filter((labels == label).astype(np.float32), 0.6))
        better = score > best
        best[better] = score[better]
        out[better] = label
    return out


def _tissue_map(
    hu: npt.NDArray[np.float32],
    vertebrae: npt.NDArray[np.float32],
    bodies: npt.NDArray[np.float32],
    organs: npt.NDArray[np.float32],
) -> npt.NDArray[np.int64]:
    body_mask = np.zeros(hu.shape, dtype=bool)
    for z in range(hu.shape[0]):
        component, n = ndimage.label(ndimage.binary_opening(hu[z] > -300, iterations=2))
        if n:
            sizes = np.bincount(component.ravel())[1:]
            body_mask[z] = ndimage.binary_fill_holes(component == 1 + int(sizes.argmax()))
    depth = ndimage.distance_transform_edt(np.pad(body_mask, ((1, 1), (0, 0), (0, 0)), mode="edge"))[1:-1] * SPACING_MM
    tissue = np.full(hu.shape, int(Tissue.OUTSIDE))
    tissue[~body_mask & (hu > -500)] = Tissue.TABLE
    tissue[body_mask] = Tissue.SOFT
    tissue[body_mask & (hu < -25)] = Tissue.FAT_SUBCUTANEOUS
    inner = ndimage.binary_dilation(np.isin(organs, [*range(1, 25), 52, 63]), iterations=4)
    tissue[body_mask & (hu < -25) & inner & (depth > 15)] = Tissue.FAT_VISCERAL
    tissue[body_mask & (hu < -250)] = Tissue.GAS
    for kind, labels in _ORGANS.items():
        tissue[np.isin(organs, labels)] = kind
    tissue[(tissue == Tissue.BOWEL) & (hu < -250)] = Tissue.GAS
    tissue[(vertebrae >= 26) & (vertebrae <= 33)] = Tissue.POSTERIOR
    tissue[bodies == 1] = Tissue.BODY
    tissue[bodies == 2] = Tissue.DISC
    return tissue


def _disc_planes(tissue: npt.NDArray[np.int64]) -> tuple[Plane, ...]:
    components, n = ndimage.label(tissue == Tissue.DISC)
    planes = []
    for index in range(1, n + 1):
        points = np.argwhere(components == index) * SPACING_MM
        if len(points) < 100:
            continue
        centre = points.mean(axis=0)
        _, _, axes = np.linalg.svd(points - centre, full_matrices=False)
        normal = axes[2] * np.sign(axes[2][0])
        normal[2] = 0.0
        planes.append(Plane(centre, normal / np.linalg.norm(normal)))
    planes.sort(key=lambda p: float(p.centre[0]))
    if len(planes) != N_LEVELS:
        raise ValueError(f"expected {N_LEVELS} discs from L5-S1 to T12-L1, found {len(planes)}")
    return tuple(planes)


def level_coordinate(knots: list[Plane], points: Tensor) -> Tensor:
    """Position of (3, ...) points along a column, piecewise linear between planes at u = 0, 0.5, 1, 1.5, ...

    ``knots`` alternate between discs and bodies, caudal to cranial, the first being the L5-S1 disc (u = 0).
    """
    distances = [plane.distance(points) for plane in knots]
    u = distances[0].clamp(max=0) / 36.0
    for k, (low, high) in enumerate(pairwise(distances)):
        fraction = (low / (low - high).clamp(min=1e-3)).clamp(0.0, 1.0)
        u = torch.where(low >= 0, 0.5 * (k + fraction), u)
    beyond = 0.5 * (len(knots) - 1) + distances[-1] / 36.0
    return torch.where(distances[-1] >= 0, beyond, u)


def load_torso(folder: Path) -> Torso:
    """Read the labelled torso (``totalsegmentator_example``) and place the planes of its column.

    Raises:
        ValueError: the labels do not hold the six discs from L5-S1 to T12-L1.
    """
    hu = _load(folder, "example_ct.nii.gz")
    vertebrae = _load(folder, "totalseg.nii.gz")
    tissue = _tissue_map(
        hu,
        vertebrae,
        _load(folder, "totalseg_vertebrae_body.nii.gz"),
        _load(folder, "example_seg_fast_force_split.nii.gz"),
    )
    discs = _disc_planes(tissue)
    points = np.stack(np.meshgrid(*[np.arange(n) * SPACING_MM for n in hu.shape], indexing="ij"))
    zyx = torch.from_numpy(points)
    below_l5 = discs[0].distance(zyx).numpy() < 0
    near_column = np.abs(points[2] - discs[0].centre[2]) < 60
    tissue[below_l5 & near_column & (tissue == Tissue.POSTERIOR)] = Tissue.SACRUM
    s1 = below_l5 & (tissue == Tissue.BODY)
    tissue[s1] = Tissue.S1_BODY

    bodies = []
    for level in range(N_LEVELS):
        inside = (tissue == Tissue.BODY) & (vertebrae == 27 + level)
        centre = np.argwhere(inside).mean(axis=0) * SPACING_MM
        upper = discs[level + 1].normal if level + 1 < N_LEVELS else discs[level].normal
        normal = discs[level].normal + upper
        bodies.append(Plane(centre, normal / np.linalg.norm(normal)))

    knots = [plane for pair in zip(discs, bodies, strict=True) for plane in pair]
    coordinate = level_coordinate(knots, zyx)

    fine = _fine_labels(tissue)
    bone = np.isin(fine, [int(b) for b in (*BONES, Tissue.DISC)])
    depth_fine = np.zeros(fine.shape, dtype=np.float32)
    for kind in (*BONES, Tissue.DISC):
        if kind in (Tissue.SACRUM, Tissue.S1_BODY):
            mask = np.isin(fine, [int(Tissue.SACRUM), int(Tissue.S1_BODY)])
        else:
            mask = fine == kind
        inside = ndimage.distance_transform_edt(np.pad(mask, ((0, 2), (0, 0), (0, 0)), mode="edge"))[:-2]
        depth_fine = np.where((fine == kind) & bone, inside * SPACING_MM / 2, depth_fine)
    depth = ndimage.uniform_filter(depth_fine, 2, origin=-1)[::2, ::2, ::2]

    mean_hu = np.array([hu[tissue == t].mean() if (tissue == t).any() else 0.0 for t in range(N_TISSUES)])
    s1_centre = np.argwhere(s1).mean(axis=0) * SPACING_MM
    column = np.stack([s1_centre, *[plane.centre for plane in knots]])
    channels = np.stack([np.clip(hu, -1024, 3071), coordinate.numpy(), depth]).astype(np.float32)
    return Torso(
        channels=torch.from_numpy(channels)[None],
        tissues=torch.from_numpy(fine.astype(np.float32))[None, None],
        tissue_mean_hu=torch.from_numpy(mean_hu.astype(np.float32)),
        discs=discs,
        bodies=tuple(bodies),
        column=column,
    )


assert all(int(SpineClass(i)) == int(Tissue(i)) for i in range(1, 9)), "the first tissues are the network's classes"
