"""A CT of any orientation on a cubic grid whose axes run cranial, posterior and left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from osteo_daemon.imaging.volume import CtVolume

AIR_HU = -1000.0
_LOWEST_HU, _HIGHEST_HU = -1024.0, 3071.0
_MAX_VOXELS = 60_000_000  # 3 mm voxels: 1.6 cubic metres; a broken affine must not eat the memory


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalVolume:
    """CT on cubic voxels, axis 0 caudal to cranial, axis 1 anterior to posterior, axis 2 right to left.

    Attributes:
        hu: (D, H, W) float32 HU, clipped to [-1024, 3071].
        seen: (D, H, W) True where the scan has data.
        spacing_mm: voxel size.
        origin_lps_mm: (3,) centre of voxel (0, 0, 0).
    """

    hu: npt.NDArray[np.float32]
    seen: npt.NDArray[np.bool_]
    spacing_mm: float
    origin_lps_mm: npt.NDArray[np.float64]

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(4, 4) homogeneous voxel index (d, h, w, 1) to LPS millimetres."""
        return grid_affine(self.origin_lps_mm, self.spacing_mm)

    def to_lps(self, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(..., 3) voxel indices (d, h, w) to (..., 3) LPS millimetres."""
        return np.asarray(index, dtype=np.float64)[..., ::-1] * self.spacing_mm + self.origin_lps_mm


def grid_affine(origin_lps_mm: npt.NDArray[np.float64], spacing_mm: float) -> npt.NDArray[np.float64]:
    """(4, 4) affine of a canonical grid: index (d, h, w, 1) to LPS millimetres."""
    affine = np.zeros((4, 4))
    affine[2, 0] = affine[1, 1] = affine[0, 2] = spacing_mm
    affine[:3, 3] = origin_lps_mm
    affine[3, 3] = 1.0
    return affine


def _binned(volume: CtVolume, spacing_mm: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Mean over whole blocks of voxels no longer than ``spacing_mm`` (against aliasing), with the blocks' affine."""
    factors = [
        max(1, min(n, int(spacing_mm / s + 0.1))) for n, s in zip(volume.voxels.shape, volume.spacing_mm, strict=True)
    ]
    counts = [n // f for n, f in zip(volume.voxels.shape, factors, strict=True)]
    # slice by slice along the first axis: the volume stays in its own dtype until it is small
    out = np.empty(counts, dtype=np.float32)
    for d in range(counts[0]):
        block = volume.voxels[d * factors[0] : (d + 1) * factors[0], : counts[1] * factors[1], : counts[2] * factors[2]]
        clipped = np.clip(block, _LOWEST_HU, _HIGHEST_HU).astype(np.float32)
        shaped = clipped.reshape(factors[0], counts[1], factors[1], counts[2], factors[2])
        out[d] = shaped.mean(axis=(0, 2, 4))
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * np.array(factors)
    affine[:3, 3] = volume.to_lps((np.array(factors) - 1) / 2)
    return out, affine


def resample_canonical(volume: CtVolume, spacing_mm: float, device: torch.device) -> CanonicalVolume:
    """The volume on a cubic grid of ``spacing_mm``, cropped to the patient.

    Raises:
        ValueError: the affine is singular or the volume is larger than any patient.
    """
    if abs(np.linalg.det(volume.affine[:3, :3])) < 1e-9:
        raise ValueError("the affine is singular")
    voxels, affine = _binned(volume, spacing_mm)
    shape = np.array(voxels.shape)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    lps = corners @ affine[:3, :3].T + affine[:3, 3]
    low, high = lps.min(axis=0), lps.max(axis=0)
    size = np.maximum(1, np.floor((high - low) / spacing_mm + 1e-6).astype(int) + 1)[::-1]  # (d, h, w)
    if int(np.prod(size.astype(float))) > _MAX_VOXELS:
        raise ValueError(f"{size.tolist()} voxels of {spacing_mm} mm")
    inverse = np.linalg.inv(affine[:3, :3])
    source = torch.from_numpy(voxels).to(device)[None, None]
    extent = torch.tensor((shape - 1).clip(min=1), dtype=torch.float32, device=device)
    y = torch.arange(int(size[1]), device=device, dtype=torch.float32) * spacing_mm
    x = torch.arange(int(size[2]), device=device, dtype=torch.float32) * spacing_mm
    hu = np.empty(size, dtype=np.float32)
    seen = np.empty(size, dtype=bool)
    to_index = torch.from_numpy(inverse.astype(np.float32)).to(device)
    start = torch.from_numpy((inverse @ (low - affine[:3, 3])).astype(np.float32)).to(device)
    for d in range(int(size[0])):
        index = (
            start
            + to_index[:, 2] * (d * spacing_mm)
            + y[:, None, None] * to_index[:, 1]
            + x[None, :, None] * to_index[:, 0]
        )
        inside = ((index > -0.51) & (index < extent + 0.51)).all(dim=-1)
        grid = (index / extent * 2 - 1).flip(-1)[None, None]
        values = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=True)[0, 0, 0]
        hu[d] = torch.where(inside, values, AIR_HU).cpu().numpy()
        seen[d] = inside.cpu().numpy()
    return _cropped(hu, seen, spacing_mm, low)


def _cropped(
    hu: npt.NDArray[np.float32], seen: npt.NDArray[np.bool_], spacing_mm: float, origin: npt.NDArray[np.float64]
) -> CanonicalVolume:
    """Cut off the air around the patient, leaving 15 mm."""
    tissue = hu > -300
    begin, end = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(tissue.mean(axis=others) > 0.01)
        margin = int(15 / spacing_mm)
        begin.append(max(0, int(filled[0]) - margin) if len(filled) else 0)
        end.append(min(hu.shape[axis], int(filled[-1]) + margin + 1) if len(filled) else hu.shape[axis])
    window = tuple(slice(b, e) for b, e in zip(begin, end, strict=True))
    shifted = origin + np.array(begin[::-1]) * spacing_mm
    return CanonicalVolume(np.ascontiguousarray(hu[window]), np.ascontiguousarray(seen[window]), spacing_mm, shifted)
