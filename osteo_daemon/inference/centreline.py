"""The line through the middle of a column, and the network's output along it.

Internal frame: millimetres on the canonical grid, ordered (z, y, x), voxel (0, 0, 0) at the origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, signal

from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]

SMALLEST_S1_MM3 = 5000.0  # the training torso has 36 ml; a cut S1 of a small person keeps more than this
_STEP_MM = 3.0
_SLAB_MM = 4.5
_REACH_MM = 32.0
_PROFILE_RADIUS_MM = 12.0


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Network output along the centre line, one row per millimetre, caudal to cranial.

    Attributes:
        points: (n, 3) centre line.
        tangents: (n, 3) unit vectors, cranial.
        body, disc, s1: (n,) mean probabilities within 12 mm of the line.
        phase: (n, 2) mean cosine and sine.
        area_mm2: (n,) cross-section of body and disc.
    """

    points: Floats
    tangents: Floats
    body: Floats
    disc: Floats
    s1: Floats
    phase: Floats
    area_mm2: Floats


def trace_from_s1(maps: SpineMaps, s1: npt.NDArray[np.bool_], spacing_mm: float) -> Floats | None:
    """(n, 3) points every millimetre from the centre of S1 cranially, or None when no vertebra stands on S1."""
    p = maps.probabilities
    column = (p[SpineClass.BODY] + p[SpineClass.DISC] > 0.5) | s1
    labels, _ = ndimage.label(ndimage.binary_dilation(column))
    attached = column & np.isin(labels, np.unique(labels[s1]))
    voxels: Floats = np.asarray(np.argwhere(attached) * spacing_mm, dtype=np.float64)
    start = np.argwhere(s1).mean(axis=0) * spacing_mm
    bodies = np.argwhere(attached & ~s1) * spacing_mm
    near = bodies[np.linalg.norm(bodies - start, axis=1) < 45.0]
    if len(near) * spacing_mm**3 < SMALLEST_S1_MM3:
        return None
    tangent = near.mean(axis=0) - start
    tangent /= np.linalg.norm(tangent)
    return _walk(voxels, start, tangent, spacing_mm)


def trace_from_below(maps: SpineMaps, spacing_mm: float) -> Floats | None:
    """(n, 3) points every millimetre from the lower end of the largest column in view, or None when there is none."""
    p = maps.probabilities
    labels, count = ndimage.label(ndimage.binary_dilation(p[SpineClass.BODY] + p[SpineClass.DISC] > 0.5))
    if count == 0:
        return None
    column = (p[SpineClass.BODY] + p[SpineClass.DISC] > 0.5) & (
        labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    )
    voxels: Floats = np.asarray(np.argwhere(column) * spacing_mm, dtype=np.float64)
    lowest = voxels[:, 0].min()
    start = voxels[voxels[:, 0] < lowest + 9.0].mean(axis=0)
    near = voxels[np.abs(voxels[:, 0] - lowest - 30.0) < 9.0]
    if len(near) * spacing_mm**3 < SMALLEST_S1_MM3:
        return None
    tangent = near.mean(axis=0) - start
    return _walk(voxels, start, tangent / np.linalg.norm(tangent), spacing_mm)


def _walk(voxels: Floats, start: Floats, tangent: Floats, spacing_mm: float) -> Floats | None:
    """Follow (n, 3) voxels of a column upwards; (m, 3) points every millimetre, None when it is too short."""
    points, missed = [start], 0
    while missed < 3 and len(points) < 400:
        guess = points[-1] + _STEP_MM * tangent
        offset = voxels - guess
        along = offset @ tangent
        across = offset - along[:, None] * tangent
        slab = (np.abs(along) < _SLAB_MM) & ((across**2).sum(axis=1) < _REACH_MM**2)
        if np.count_nonzero(slab) * spacing_mm**3 < 900.0:
            missed += 1
            points.append(guess)
            continue
        missed = 0
        points.append(guess + 0.6 * across[slab].mean(axis=0))
        recent = points[-1] - points[max(0, len(points) - 6)]
        tangent = 0.7 * tangent + 0.3 * recent / np.linalg.norm(recent)
        tangent /= np.linalg.norm(tangent)
    points = points[: len(points) - missed]
    if len(points) < 12:
        return None
    smooth = signal.savgol_filter(np.array(points), 11, 2, axis=0)
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(smooth, axis=0), axis=1))])
    stations = np.arange(0.0, length[-1], 1.0)
    return np.stack([np.interp(stations, length, smooth[:, a]) for a in range(3)], axis=1)


def sample_profile(maps: SpineMaps, points: Floats, spacing_mm: float) -> Profile:
    """Means of the network's output over a disc of 12 mm across each (n, 3) point of the centre line."""
    smooth = ndimage.gaussian_filter1d(points, 5.0, axis=0, mode="nearest")
    tangents = np.gradient(smooth, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    left = np.array([0.0, 0.0, 1.0]) - tangents * tangents[:, 2:3]
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    front = np.cross(tangents, left)
    wide = np.stack(np.meshgrid(np.arange(-36, 37, 3.0), np.arange(-36, 37, 3.0), indexing="ij"), -1).reshape(-1, 2)
    inner = np.linalg.norm(wide, axis=1) <= _PROFILE_RADIUS_MM
    places = points[:, None] + wide[None, :, :1] * left[:, None] + wide[None, :, 1:] * front[:, None]
    index = (places / spacing_mm).reshape(-1, 3).T

    def sample(channel: npt.NDArray[np.float32]) -> Floats:
        values = ndimage.map_coordinates(channel, index, order=1, mode="constant")
        return np.asarray(values, dtype=np.float64).reshape(len(points), -1)

    body, disc, s1 = (sample(maps.probabilities[c]) for c in (SpineClass.BODY, SpineClass.DISC, SpineClass.S1_BODY))
    phase = np.stack([sample(maps.phase[0]), sample(maps.phase[1])], axis=-1)
    weight = (body + disc)[:, inner]
    total = weight.sum(axis=1)
    mean_phase = (phase[:, inner] * weight[..., None]).sum(axis=1) / np.maximum(total, 3.0)[:, None]
    area = ((body + disc) > 0.5).sum(axis=1) * 9.0
    return Profile(
        points=points,
        tangents=tangents,
        body=body[:, inner].mean(axis=1),
        disc=disc[:, inner].mean(axis=1),
        s1=s1[:, inner].mean(axis=1),
        phase=mean_phase,
        area_mm2=area.astype(np.float64),
    )
