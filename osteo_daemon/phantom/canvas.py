"""A grid to paint on, and soft-edged shapes.

Shapes are given as signed distances in mm (negative inside). A voxel's share of a shape is taken as the share that a
plane at this distance would cut from a voxel of the grid's mean edge: a shell thinner than a voxel thus keeps its
true mean attenuation, at any resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.floating]
U8 = npt.NDArray[np.uint8]
Vec = npt.NDArray[np.floating]

_BLAS_THREADS_FROM = 250_000
"""Products of at most this many multiplications stay on the calling thread in OpenBLAS. Slabs are painted side by side
already: threads within a product only wait for each other, up to fifty times as long on a busy machine."""
_RUNG_MM = 1.0


def _f32(values: npt.ArrayLike) -> F32:
    return np.asarray(values, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Sampling positions in LPS mm, as arrays that broadcast to (D, H, W).

    Attributes:
        x, y, z: left, posterior and superior coordinate of each voxel centre. On a grid along the patient axes they
        have
            shapes (1, 1, W), (1, H, 1) and (D, 1, 1); on an oblique one they are full.
        shape: (D, H, W).
        edge_mm: mean edge length of a voxel.
        axes: the three per-index coordinate vectors of an axis-aligned grid (z, y, x), None for an oblique one.
        affine: index to LPS mm; for an axis-aligned grid only its origin and mean steps.
    """

    x: F32
    y: F32
    z: F32
    shape: tuple[int, int, int]
    edge_mm: float
    axes: tuple[Vec, Vec, Vec] | None
    affine: Vec

    @classmethod
    def aligned(cls, z_mm: Vec, y_mm: Vec, x_mm: Vec, edge_mm: float) -> Grid:
        """A grid along the patient axes; positions ascend but may be uneven."""
        affine = np.eye(4)
        return cls(
            _f32(x_mm)[None, None, :],
            _f32(y_mm)[None, :, None],
            _f32(z_mm)[:, None, None],
            (len(z_mm), len(y_mm), len(x_mm)),
            edge_mm,
            (z_mm, y_mm, x_mm),
            affine,
        )

    @classmethod
    def oblique(cls, shape: tuple[int, int, int], affine: Vec) -> Grid:
        """Any grid: ``affine`` maps (d, h, w, 1) to LPS mm."""
        d, h, w = (np.arange(n, dtype=np.float32) for n in shape)
        a = affine.astype(np.float32)
        coordinates = [
            (a[i, 0] * d[:, None, None] + (a[i, 1] * h + a[i, 3])[None, :, None]) + (a[i, 2] * w)[None, None, :]
            for i in range(3)
        ]
        edge = float(np.mean(np.linalg.norm(affine[:3, :3], axis=0)))
        return cls(coordinates[0], coordinates[1], coordinates[2], shape, edge, None, affine)

    def box(self, low: Vec, high: Vec) -> tuple[slice, slice, slice] | None:
        """Index slices that hold every voxel centre within the LPS box, None when there is none."""
        slices = []
        if self.axes is not None:
            for values, lo, hi in zip(self.axes, low[::-1], high[::-1], strict=True):
                start, stop = int(np.searchsorted(values, lo)), int(np.searchsorted(values, hi, side="right"))
                if start >= stop:
                    return None
                slices.append(slice(start, stop))
        else:
            corners = np.array([[(low, high)[i >> k & 1][k] for k in range(3)] for i in range(8)])
            index = (corners - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T
            for axis in range(3):
                start = max(0, int(np.floor(index[:, axis].min())))
                stop = min(self.shape[axis], int(np.ceil(index[:, axis].max())) + 1)
                if start >= stop:
                    return None
                slices.append(slice(start, stop))
        return slices[0], slices[1], slices[2]

    def phases(self, wave: Vec) -> tuple[Vec, Vec, Vec]:
        """Phase (radians) of plane waves, split by index axis.

        Args:
            wave: (K, 3) wave vectors in rad/mm along LPS.

        Returns:
            (D, K), (H, K), (W, K); their sum at (d, h, w) is the phase at that voxel.
        """
        if self.axes is not None:
            z, y, x = self.axes
            return np.outer(z, wave[:, 2]), np.outer(y, wave[:, 1]), np.outer(x, wave[:, 0])
        steps = wave @ self.affine[:3, :3]
        first = np.outer(np.arange(self.shape[0]), steps[:, 0]) + wave @ self.affine[:3, 3]
        return first, np.outer(np.arange(self.shape[1]), steps[:, 1]), np.outer(np.arange(self.shape[2]), steps[:, 2])


@dataclass(frozen=True, slots=True, eq=False)
class Waves:
    """A smooth random field of zero mean and unit variance: a sum of plane waves.

    Attributes:
        vectors: (K, 3) rad/mm.
        offsets: (K,) rad.
    """

    vectors: Vec
    offsets: Vec

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength_mm: float, stretch: Vec | None = None, count: int = 20) -> Waves:
        """Random directions, wavelengths within about 25 % of the given one; ``stretch`` lengthens it along x, y, z."""
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = wavelength_mm * np.exp(0.22 * rng.standard_normal(count))
        vectors = direction * (2.0 * np.pi / length)[:, None]
        if stretch is not None:
            vectors = vectors / stretch
        return cls(vectors, rng.uniform(0.0, 2.0 * np.pi, count))


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A box of a canvas; arrays are views, so painting changes the canvas."""

    canvas: Canvas
    where: tuple[slice, slice, slice]
    x: F32
    y: F32
    z: F32

    @property
    def hu(self) -> F32:
        """(d, h, w) view of the attenuation."""
        return self.canvas.hu[self.where]

    @property
    def labels(self) -> U8:
        """(d, h, w) view of the labels."""
        return self.canvas.labels[self.where]

    def along_z(self, heights_mm: Vec, values: Vec) -> F32:
        """A function of height, linear between the given points: broadcasts to (d, h, w)."""
        if self.canvas.grid.axes is not None:
            return np.interp(self.z, heights_mm, values).astype(np.float32)
        rungs, index, share = self.canvas.ladder()
        table = np.interp(rungs, heights_mm, values).astype(np.float32)
        steps = np.diff(table, append=table[-1:])
        index, share = index[self.where], share[self.where]
        return np.asarray(table[index] + share * steps[index], dtype=np.float32)

    def waves(self, field: Waves) -> F32:
        """(d, h, w) values of a random field."""
        first, second, third = self.canvas.phases(field)
        d, h, w = (p[s] for p, s in zip((first, second, third), self.where, strict=True))
        pair = (d + field.offsets)[:, None, :] + h[None, :, :]
        left = np.concatenate([np.cos(pair), -np.sin(pair)], axis=-1).astype(np.float32)
        right = np.concatenate([np.cos(w), np.sin(w)], axis=-1).astype(np.float32)
        gain = np.float32(np.sqrt(2.0 / len(field.offsets)))
        rows, terms, width = left.shape[0] * left.shape[1], left.shape[2], right.shape[0]
        block = max(1, _BLAS_THREADS_FROM // (terms * width))
        padded = np.empty((-(-rows // block), block, terms), dtype=np.float32)
        flat = padded.reshape(-1, terms)
        flat[:rows] = left.reshape(rows, terms)
        flat[rows:] = 0
        values = (padded @ (right.T * gain)).reshape(-1, width)[:rows]
        return np.asarray(values.reshape(left.shape[0], left.shape[1], width))

    def cover(self, distance: F32, soft_mm: float = 0.0) -> F32:
        """Share 0-1 of each voxel inside the shape; ``soft_mm`` widens the border."""
        width = float(np.hypot(self.canvas.grid.edge_mm, soft_mm))
        share = distance * np.float32(-1.0 / width)
        share += np.float32(0.5)
        return np.clip(share, 0.0, 1.0, out=share)

    def paint(self, distance: F32, hu: float | F32, label: int | None = None, soft_mm: float = 0.0) -> None:
        """Lay a shape of attenuation ``hu`` over what is there; voxel centres inside get ``label``."""
        share = self.cover(distance, soft_mm)
        target = self.hu
        target += share * (hu - target)
        if label is not None:
            np.copyto(self.labels, np.uint8(label), where=distance < 0)

    def paint_at(
        self, index: npt.NDArray[np.intp], distance: F32, hu: float | F32, label: int | None = None
    ) -> npt.NDArray[np.intp]:
        """`paint` for scattered voxels.

        Args:
            index: (n,) flat indices into the region.
            distance: (n,) mm.
            hu: one value, or (n,).

        Returns:
            The indices whose voxel centre lies inside.
        """
        place = np.unravel_index(index, self.hu.shape)
        share = self.cover(distance)
        old = self.hu[place]
        self.hu[place] = old + share * (hu - old)
        inside = distance < 0
        if label is not None:
            self.labels[tuple(axis[inside] for axis in place)] = label
        return index[inside]


class Canvas:
    """Attenuation and labels of a grid while the body is painted on it."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hu: F32 = np.full(grid.shape, -1000.0, dtype=np.float32)
        self.labels: U8 = np.zeros(grid.shape, dtype=np.uint8)
        self._ladder: tuple[Vec, npt.NDArray[np.intp], F32] | None = None
        self._phases: dict[int, tuple[tuple[Vec, Vec, Vec], Waves]] = {}

    def ladder(self) -> tuple[Vec, npt.NDArray[np.intp], F32]:
        """Even heights (mm) through the grid, and each voxel's rung below and share of the way to the next."""
        if self._ladder is None:
            z = self.grid.z
            low, high = float(z.min()), float(z.max())
            rungs = low + _RUNG_MM * np.arange(int((high - low) / _RUNG_MM) + 3)
            place = (z - np.float32(low)) * np.float32(1 / _RUNG_MM)
            index = place.astype(np.intp)
            self._ladder = (rungs, index, np.asarray(place - index, dtype=np.float32))
        return self._ladder

    def phases(self, field: Waves) -> tuple[Vec, Vec, Vec]:
        """`Grid.phases`, remembered."""
        if id(field) not in self._phases:
            self._phases[id(field)] = (self.grid.phases(field.vectors), field)
        return self._phases[id(field)][0]

    def region(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Region | None:
        """The part of the grid within an LPS box (mm), widened by two voxels; None when nothing is left."""
        margin = 2.0 * self.grid.edge_mm
        where = self.grid.box(np.asarray(low, dtype=float) - margin, np.asarray(high, dtype=float) + margin)
        if where is None:
            return None
        d, h, w = where
        if self.grid.axes is not None:
            return Region(self, where, self.grid.x[:, :, w], self.grid.y[:, h], self.grid.z[d])
        return Region(self, where, self.grid.x[where], self.grid.y[where], self.grid.z[where])

    def whole(self) -> Region:
        """The whole grid."""
        everything = slice(None)
        return Region(self, (everything, everything, everything), self.grid.x, self.grid.y, self.grid.z)


Painter = Callable[[Canvas], None]
"""Paints one part of the body; holds everything that is drawn at random, so that every slab of a study agrees."""


def smooth_max(a: F32, b: F32, radius_mm: float) -> F32:
    """Intersection of two shapes with a rounded edge."""
    overlap = np.maximum(np.float32(radius_mm) - np.abs(a - b), 0)
    return np.asarray(np.maximum(a, b) + overlap * overlap * np.float32(0.25 / radius_mm))


def smooth_min(a: F32, b: F32, radius_mm: float) -> F32:
    """Union of two shapes with a filleted edge."""
    overlap = np.maximum(np.float32(radius_mm) - np.abs(a - b), 0)
    return np.asarray(np.minimum(a, b) - overlap * overlap * np.float32(0.25 / radius_mm))


def ellipsoid(x: F32, y: F32, z: F32, centre: npt.ArrayLike, radii: npt.ArrayLike) -> F32:
    """Approximate signed distance (mm) of an ellipsoid along the coordinate axes."""
    c, r = np.asarray(centre, dtype=np.float32), np.asarray(radii, dtype=np.float32)
    dx, dy, dz = x - c[0], y - c[1], z - c[2]
    dx2, dy2, dz2 = dx * dx, dy * dy, dz * dz
    level = np.sqrt(dx2 / (r[0] * r[0]) + dy2 / (r[1] * r[1]) + dz2 / (r[2] * r[2]))
    # (level - 1) over its gradient, the first-order distance
    steep = np.sqrt(dx2 / r[0] ** 4 + dy2 / r[1] ** 4 + dz2 / r[2] ** 4)
    return np.asarray((level - 1) * level / np.maximum(steep, np.float32(1e-4)))


def capsule(
    x: F32, y: F32, z: F32, start: npt.ArrayLike, end: npt.ArrayLike, radius: float, end_radius: float | None = None,
    tall: float = 1.0, deep: float = 1.0,
) -> F32:  # fmt: skip
    """Signed distance (mm) of a round-ended rod from ``start`` to ``end``.

    ``tall`` and ``deep`` stretch its cross-section along z and y (the distance is then approximate).
    """
    scale = np.array([1.0, deep, tall], dtype=np.float32)
    a, b = np.asarray(start, dtype=np.float32) / scale, np.asarray(end, dtype=np.float32) / scale
    ab = b - a
    px, py, pz = x - a[0], y * np.float32(1 / deep) - a[1], z * np.float32(1 / tall) - a[2]
    length2 = np.float32(max(float(ab @ ab), 1e-6))
    t = np.clip((px * ab[0] + py * ab[1] + pz * ab[2]) / length2, 0, 1)
    dx, dy, dz = px - t * ab[0], py - t * ab[1], pz - t * ab[2]
    reach = np.sqrt(dx * dx + dy * dy + dz * dz)
    if end_radius is None or end_radius == radius:
        return np.asarray(reach - np.float32(radius))
    return np.asarray(reach - (np.float32(radius) + t * np.float32(end_radius - radius)))
