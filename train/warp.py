"""Random anatomy: where each voxel of a training patch takes its tissue from in the labelled torso.

Everything maps output points to source points (what `torch.nn.functional.grid_sample` needs), (3, D, H, W) in mm in
the order (z, y, x) of `train.torso`. Level edits (a wedge fracture, a narrow disc, a fifth vertebra left out or a sixth
put in) are rigid motions above a plane of the column that fade to identity below it; applied from caudal to cranial.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.torso import N_LEVELS, SPACING_MM, Floats, Plane, Torso

Warp = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rigid:
    """p -> R (p - start) + end in the (z, y) plane; x is shifted only."""

    start: Plane
    end: Plane

    def __call__(self, p: Tensor) -> Tensor:
        a = math.atan2(self.start.normal[1], self.start.normal[0])
        b = math.atan2(self.end.normal[1], self.end.normal[0])
        cos, sin = math.cos(b - a), math.sin(b - a)
        dz, dy = p[0] - float(self.start.centre[0]), p[1] - float(self.start.centre[1])
        z = cos * dz - sin * dy + float(self.end.centre[0])
        y = sin * dz + cos * dy + float(self.end.centre[1])
        return torch.stack([z, y, p[2] + float(self.end.centre[2] - self.start.centre[2])])


@dataclass(frozen=True, slots=True)
class LevelEdit:
    """Identity below ``lower``, ``motion`` above ``upper`` (an output plane), a linear blend between.

    ``levels`` is what the count of vertebrae gains above the edit: 1 where one was put in, -1 where one was left out.
    """

    order: float
    lower: Plane
    upper: Plane
    motion: Rigid
    levels: int = 0

    def __call__(self, p: Tensor) -> Tensor:
        below = self.lower.distance(p)
        if float(below.max()) <= 0:
            return p
        above = self.upper.distance(p)
        weight = (below / (below - above).clamp(min=0.5)).clamp(0.0, 1.0)
        weight = torch.where(above >= 0, 1.0, weight)
        weight = torch.where(below <= 0, 0.0, weight)
        return p + weight * (self.motion(p) - p)


def _shifted(plane: Plane, along_mm: float) -> Plane:
    return Plane(plane.centre + along_mm * plane.normal, plane.normal)


def resize_zone(order: float, lower: Plane, upper: Plane, front: float, back: float, half_depth_mm: float) -> LevelEdit:
    """Shrink (positive) or grow (negative) the zone between two planes by ``front`` and ``back`` mm at its rims."""
    anterior = np.array([0.0, -half_depth_mm, 0.0])
    normal = lower.normal
    front_point = upper.centre + anterior - front * normal
    back_point = upper.centre - anterior - back * normal
    front_point = front_point + (-upper.normal[1] / upper.normal[0]) * np.array([anterior[1], 0, 0])
    back_point = back_point + (-upper.normal[1] / upper.normal[0]) * np.array([-anterior[1], 0, 0])
    along = back_point - front_point
    new_normal = np.array([along[1], -along[0], 0.0])
    new_normal *= np.sign(new_normal[0]) / np.linalg.norm(new_normal)
    out_plane = Plane((front_point + back_point) / 2, new_normal)
    return LevelEdit(order, lower, out_plane, Rigid(out_plane, upper))


def recount(torso: Torso, at_disc: int, by: int) -> LevelEdit:
    """Put a copy of the vertebra below disc ``at_disc`` in above it (``by`` = -1) or leave the one above out (+1)."""
    plane = torso.discs[at_disc]
    motion = Rigid(plane, torso.discs[at_disc + by])
    return LevelEdit(at_disc + 0.01, _shifted(plane, -1.0), _shifted(plane, 1.0), motion, levels=-by)


def random_level_edits(torso: Torso, rng: np.random.Generator) -> tuple[LevelEdit, ...]:
    """Wedge and crush fractures, narrow and tall discs, and another number of vertebrae."""
    edits: list[LevelEdit] = []
    recounted = -1
    if rng.random() < 0.35:
        by = int(rng.choice([-1, 1]))
        recounted = int(rng.integers(1, N_LEVELS - 1))
        edits.append(recount(torso, recounted, by))
    for disc in range(N_LEVELS):
        if disc not in (recounted, recounted + 1, recounted - 1) and rng.random() < 0.3:
            plane = torso.discs[disc]
            change = float(rng.uniform(-4.0, 4.5))
            tilt = float(rng.uniform(-1.5, 1.5))
            zone = resize_zone(disc, _shifted(plane, -4.5), _shifted(plane, 4.5), change + tilt, change - tilt, 17.0)
            edits.append(zone)
    for level in range(N_LEVELS - 1):
        if level in (recounted, recounted - 1) or rng.random() > 0.14:
            continue
        lower, upper = _shifted(torso.discs[level], 4.5), _shifted(torso.discs[level + 1], -4.5)
        back = float(rng.uniform(-1.0, 7.0))
        front = back + float(rng.uniform(-1.0, 9.0))
        edits.append(resize_zone(level + 0.5, lower, upper, front, back, 17.0))
    return tuple(sorted(edits, key=lambda e: e.order))


def extend_cranially(torso: Torso, q: Tensor, limit: int = 8) -> tuple[Tensor, Tensor]:
    """Repeat the stretch from mid-L1 to mid-T12 upwards without end, so that the column does not stop at T12.

    Returns:
        The moved points and how often each was moved, which is what its level coordinate lacks.
    """
    top, below = torso.bodies[N_LEVELS - 1], torso.bodies[N_LEVELS - 2]
    motion = Rigid(top, below)
    times = torch.zeros(q.shape[1:])
    for _ in range(limit):
        above = top.distance(q) > 0
        if not bool(above.any()):
            break
        q = torch.where(above[None], motion(q), q)
        times += above
    return q, times


def _rotation(rng: np.random.Generator, degrees: tuple[float, float, float]) -> Floats:
    """About z (axial), y and x; (3, 3) acting on (z, y, x)."""
    a, b, c = (math.radians(float(rng.normal(0, d))) for d in degrees)
    axial = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    coronal = np.array([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    sagittal = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return np.asarray(axial @ coronal @ sagittal)


def _elastic(shape: tuple[int, ...], rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    cells = int(rng.integers(3, 8))
    field = torch.randn((1, 3, cells + 2, cells, cells), generator=generator) * float(rng.uniform(0.5, 4.0))
    return torch.nn.functional.interpolate(field, size=shape, mode="trilinear", align_corners=True)[0]


def _wave(rng: np.random.Generator, amplitude: float, longest_mm: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A smooth function of z and its derivative: two sine waves."""
    parts = []
    for share in (1.0, 0.35):
        length = float(rng.uniform(0.5, 1.0)) * longest_mm * (1.0 if share == 1.0 else 0.5)
        size = amplitude * share * float(rng.uniform(-1, 1))
        parts.append((size, 2 * math.pi / length, float(rng.uniform(0, 2 * math.pi))))

    def wave(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.zeros_like(z), torch.zeros_like(z)
        for size, k, phase in parts:
            angle = k * z + phase
            value = value + size * torch.sin(angle)
            slope = slope + size * k * torch.cos(angle)
        return value, slope

    return wave


def sample_source_points(
    torso: Torso, shape: tuple[int, int, int], rng: np.random.Generator, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Source points in mm for a patch of ``shape`` voxels of 3 mm somewhere along a random column.

    Returns:
        (3, D, H, W) points and (D, H, W) what must be added to the level coordinate found there.
    """
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * SPACING_MM for n in shape]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"))

    if rng.random() < 0.88:
        along = float(rng.uniform(-0.6, len(torso.column) + 1.5))
        knots = np.arange(len(torso.column))
        focus = np.array([np.interp(along, knots, torso.column[:, i]) for i in range(3)])
        step = torso.column[-1] - torso.column[-2]
        focus = focus + max(0.0, along - knots[-1]) * step * 2 + min(0.0, along) * np.array([60.0, -20.0, 0.0])
        jitter = rng.normal(0, (15, 22, 20))
    else:
        extent = np.array(torso.channels.shape[2:]) * SPACING_MM
        focus, jitter = rng.uniform((-30, 60, 40), extent - (-90, 60, 40)), np.zeros(3)

    size = math.exp(float(rng.uniform(math.log(0.78), math.log(1.35))))
    stretch = size * np.exp(rng.normal(0, 0.07, 3))
    flip = np.array([1.0, 1.0, -1.0 if rng.random() < 0.5 else 1.0])
    matrix = torch.from_numpy((_rotation(rng, (7, 6, 9)) @ np.diag(flip / stretch)).astype(np.float32))
    q = torch.einsum("ij,jdhw->idhw", matrix, p + torch.from_numpy(jitter.astype(np.float32)).view(3, 1, 1, 1))
    if rng.random() < 0.7:
        q = q + _elastic(shape, rng, generator)

    # bend the column: shift across by a smooth function of z and turn every slice with it
    amplitude = float(rng.choice([4.0, 12.0, 24.0], p=[0.4, 0.4, 0.2]))
    sideways, sagittal = _wave(rng, amplitude, 520.0), _wave(rng, 0.8 * amplitude, 520.0)
    (dx, slope_x), (dy, slope_y) = sideways(q[0]), sagittal(q[0])
    q = torch.stack([q[0] - slope_x * q[2] - slope_y * q[1], q[1] + dy, q[2] + dx])
    stretch_z, _ = _wave(rng, float(rng.uniform(0, 4.0)), 180.0)(q[0])
    q = torch.stack([q[0] + stretch_z, q[1], q[2]])
    q = q + torch.from_numpy(focus.astype(np.float32)).view(3, 1, 1, 1)

    # thicker or thinner vertebrae: radial scaling that dies out away from the column
    if rng.random() < 0.6:
        # piecewise linear centre line of the column: y and x as functions of z
        z_line = torch.from_numpy(torso.column[:, 0].astype(np.float32))
        index = torch.bucketize(q[0].contiguous(), z_line).clamp(1, len(z_line) - 1)
        t = ((q[0] - z_line[index - 1]) / (z_line[index] - z_line[index - 1])).clamp(0.0, 1.0)
        lines = torch.from_numpy(torso.column[:, 1:].astype(np.float32))
        centre_y = lines[index - 1, 0] + t * (lines[index, 0] - lines[index - 1, 0])
        centre_x = lines[index - 1, 1] + t * (lines[index, 1] - lines[index - 1, 1])
        ry, rx = q[1] - centre_y, q[2] - centre_x
        gain = float(rng.uniform(-0.2, 0.2)) * torch.exp(-(ry**2 + rx**2) / (2 * float(rng.uniform(25, 60)) ** 2))
        q = torch.stack([q[0], q[1] + gain * ry, q[2] + gain * rx])

    gained = torch.zeros(shape)
    for edit in random_level_edits(torso, rng):
        if edit.levels:
            gained += edit.levels * (edit.upper.distance(q) + 1.0 >= 0)
        q = edit(q)
    q, repeated = extend_cranially(torso, q)
    return q, gained + repeated


def sample_points(shape: tuple[int, int, int], rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """(3, D, H, W) offsets in voxels for a patch of a volume that has its own anatomy: affine and mild elastic only."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    stretch = math.exp(float(rng.uniform(math.log(0.85), math.log(1.2)))) * np.exp(rng.normal(0, 0.05, 3))
    flip = np.array([1.0, 1.0, -1.0 if rng.random() < 0.5 else 1.0])
    matrix = torch.from_numpy((_rotation(rng, (5, 4, 6)) @ np.diag(flip / stretch)).astype(np.float32))
    jitter = torch.from_numpy(rng.normal(0, (4, 6, 6)).astype(np.float32)).view(3, 1, 1, 1)
    q = torch.einsum("ij,jdhw->idhw", matrix, p + jitter)
    if rng.random() < 0.5:
        q = q + _elastic(shape, rng, generator) / (2 * SPACING_MM)
    return q
