"""Regions on the grid of the source slices, and their outlines in pixel coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import contourpy
import numpy as np
import numpy.typing as npt

from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume

_GRID_TOLERANCE_VOXELS = 1e-3
"""A region whose affine differs from the volume's by less than this over its extent lies on the native grid."""


@dataclass(frozen=True, slots=True, eq=False)
class NativeMask:
    """A mask cut out of the native grid.

    Attributes:
        mask: (d, h, w) True inside.
        origin: native index (d, h, w) of ``mask[0, 0, 0]``.
    """

    mask: npt.NDArray[np.bool_]
    origin: tuple[int, int, int]

    @property
    def slices(self) -> tuple[int, ...]:
        """Native slice indices that hold at least one voxel, ascending."""
        return tuple(int(d) + self.origin[0] for d in np.flatnonzero(self.mask.any(axis=(1, 2))))

    @property
    def middle_slice(self) -> int:
        """The native slice with the most voxels among the middle third of the region's slices."""
        slices = self.slices
        third = len(slices) // 3
        middle = slices[third : len(slices) - third]
        counts = [int(np.count_nonzero(self.mask[d - self.origin[0]])) for d in middle]
        centre = (slices[0] + slices[-1]) / 2
        return min(zip(counts, middle, strict=True), key=lambda entry: (-entry[0], abs(entry[1] - centre)))[1]


def on_native_grid(region: Region, volume: CtVolume) -> NativeMask | None:
    """The region on the grid of ``volume``, clipped to it; None when no voxel lies inside.

    A region on a sub-grid of the volume is only shifted; any other is sampled at the native voxel centres, nearest
    neighbour.
    """
    if not region.mask.any():
        return None
    to_region = np.linalg.inv(region.affine) @ volume.affine
    corners_region = np.array(np.meshgrid(*[(-0.5, size - 0.5) for size in region.mask.shape], indexing="ij"))
    corners_lps = region.affine[:3, :3] @ corners_region.reshape(3, -1) + region.affine[:3, 3:]
    corners = volume.to_index(corners_lps.T)
    low = np.maximum(np.floor(corners.min(axis=0) + _GRID_TOLERANCE_VOXELS).astype(int), 0)
    high = np.minimum(np.ceil(corners.max(axis=0) - _GRID_TOLERANCE_VOXELS).astype(int) + 1, volume.voxels.shape)
    if np.any(low >= high):
        return None
    axes = [np.arange(start, stop) for start, stop in zip(low, high, strict=True)]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float64)
    sampled = np.rint(index @ to_region[:3, :3].T + to_region[:3, 3]).astype(int)
    inside = np.all((sampled >= 0) & (sampled < region.mask.shape), axis=-1)
    clipped = np.clip(sampled, 0, np.array(region.mask.shape) - 1)
    mask = region.mask[clipped[..., 0], clipped[..., 1], clipped[..., 2]] & inside
    if not mask.any():
        return None
    filled = np.argwhere(mask)
    first, last = filled.min(axis=0), filled.max(axis=0) + 1
    cut = mask[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    origin = low + first
    return NativeMask(np.ascontiguousarray(cut), (int(origin[0]), int(origin[1]), int(origin[2])))


def outlines(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], ...]:
    """Closed outlines of a (rows, columns) mask, longest first.

    Returns:
        (n, 2) arrays of (column, row) in index coordinates: 0 is the centre of the first pixel; first and last point
        are the same.
    """
    padded = np.pad(mask, 1).astype(np.float64)
    rows, columns = padded.shape
    generator = contourpy.contour_generator(
        x=np.arange(columns) - 1.0, y=np.arange(rows) - 1.0, z=padded, line_type=contourpy.LineType.Separate
    )
    lines = [np.asarray(line, dtype=np.float64) for line in generator.lines(0.5)]
    return tuple(sorted(lines, key=len, reverse=True))


def slice_polyline(native: NativeMask, d: int) -> npt.NDArray[np.float64]:
    """(n, 2) outline of the region's largest part on native slice ``d`` as SCOORD (column, row).

    PS3.3 C.18.6.1.2: 0\\0 is the top left corner of the top left pixel, so a pixel's centre lies at a half.
    """
    plane = native.mask[d - native.origin[0]]
    offset: npt.NDArray[np.float64] = np.array([native.origin[2] + 0.5, native.origin[1] + 0.5])
    return outlines(plane)[0] + offset
