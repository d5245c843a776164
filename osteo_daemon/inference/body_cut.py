"""The vertebral body out of the mask of a whole vertebra.

The spinal canal tells where the body ends: a ray from the body's centre to the back leaves the mask at the posterior
wall, crosses the empty canal and meets the arch. The wall is a plane through those exits; what lies in front of it,
without thin processes, is the body. The mask of a body alone has nothing behind the wall and is kept whole. A mask
whose canal is filled has no wall and is refused.

Frame: millimetres ordered (z, y, x), z cranial, y posterior, x left, as in `osteo_daemon.inference.canonical`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.errors import VertebraeUnusable

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SMALLEST_BODY_MM3, LARGEST_BODY_MM3 = 4_000.0, 120_000.0
"""Beyond a compressed T10 of a small woman and the L5 of a tall man."""

_FARTHEST_WALL_MM = 32.0  # from the body's middle; half of the deepest lumbar body is about 22 mm
_CANAL_MM = 4.0  # an exit that meets bone again earlier was a vein's canal or a hole in the mask
_MIDLINE_MM, _HALF_HEIGHT_MM = 7.5, 9.0  # rays start within this of the centre
_RAY_STEP_MM = 0.75
_SMALLEST_RAY_SHARE = 0.4
_WALL_TOLERANCE_MM = 3.0
_STEEPEST_WALL = 0.6  # posterior shift over height in the vertebra's own frame
_BEHIND_MM = 6.0
_WHOLE_SHARE = 0.08  # of the mask behind the wall: arch and processes are a third of a vertebra
_THIN_MM = 6.0  # radius of the opening that removes what hangs on: transverse processes, heads of ribs
_EDGE_MM = 3.0  # edges of a body that the opening would round off
_SMALLEST_KEPT = 0.65  # of a cut; less is left where the body is too flat for the opening
_LARGEST_TURN_DEGREES = 35.0  # of a patient about the long axis


@dataclass(frozen=True, slots=True, eq=False)
class CutBody:
    """A vertebral body.

    Attributes:
        mask: the body on the grid of the mask that was given.
        centre: (3,) its centroid.
        up, back: (3,) unit vectors, cranial and posterior.
        was_whole: True when arch and processes were cut off.
    """

    mask: Mask
    centre: Floats
    up: Floats
    back: Floats
    was_whole: bool


def thickest_point(mask: Mask, spacing_mm: float) -> Floats:
    """(3,) middle of the thickest part of a mask in mm from voxel (0, 0, 0): a vertebra's body, not its arch."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    deepest = np.unravel_index(int(depth.argmax()), depth.shape)
    places = np.argwhere(depth > 0.75 * depth[deepest])
    near = np.linalg.norm(places - np.array(deepest), axis=1) * spacing_mm < 20.0
    return np.asarray(places[near].mean(axis=0) * spacing_mm)


def cut_body(mask: Mask, spacing_mm: float, centre: Floats, up: Floats) -> CutBody:
    """The body within the mask of a whole vertebra, or of a body alone.

    Args:
        mask: (D, H, W) on cubic voxels, axes cranial, posterior, left.
        centre: (3,) a point inside the body, mm from voxel (0, 0, 0).
        up: (3,) unit vector along the column, cranial.

    Raises:
        VertebraeUnusable: no posterior wall to cut at, or what is left is no vertebral body.
    """
    mask = _without_holes(mask)
    places = np.argwhere(mask) * spacing_mm
    back = _turned_by_width(places - centre, up)
    wall = _wall(mask, spacing_mm, centre, up, back)
    behind = _behind(places - centre, up, back, wall)
    was_whole = bool((behind > _BEHIND_MM).mean() > _WHOLE_SHARE)
    if was_whole:
        # the arch lies straight behind the body: it tells the direction better than the body's width
        for _ in range(2):
            arch = (places - centre)[behind > _BEHIND_MM]
            if not len(arch):
                raise VertebraeUnusable("no arch behind the body")
            back = _limited(arch.mean(axis=0), up)
            wall = _wall(mask, spacing_mm, centre, up, back)
            behind = _behind(places - centre, up, back, wall)
        body = np.zeros_like(mask)
        kept = np.argwhere(mask)[behind <= spacing_mm / 2]
        body[tuple(kept.T)] = True
        body = _without_processes(body, spacing_mm)
    else:
        body = mask
    body = _component_at(body, centre / spacing_mm)
    volume = float(np.count_nonzero(body)) * spacing_mm**3
    if not SMALLEST_BODY_MM3 < volume < LARGEST_BODY_MM3:
        raise VertebraeUnusable(f"a body of {volume / 1000:.0f} ml")
    return CutBody(body, np.asarray(np.argwhere(body).mean(axis=0) * spacing_mm), up, back, was_whole)


def _across(vector: Floats, up: Floats) -> Floats:
    flat = vector - (vector @ up) * up
    return np.asarray(flat / np.linalg.norm(flat))


def _limited(vector: Floats, up: Floats) -> Floats:
    """Unit vector across ``up``, or straight back when it points too far from the patient's back."""
    straight = _across(np.array([0.0, 1.0, 0.0]), up)
    turned = _across(vector, up)
    return turned if turned @ straight > np.cos(np.radians(_LARGEST_TURN_DEGREES)) else straight


def _turned_by_width(offsets: Floats, up: Floats) -> Floats:
    """Posterior direction from the widest direction around the centre, which runs from right to left."""
    near = offsets[np.linalg.norm(offsets, axis=1) < 26.0]
    flat = near - (near @ up)[:, None] * up
    _, spreads, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    straight = _across(np.array([0.0, 1.0, 0.0]), up)
    if spreads[0] < 1.1 * spreads[1]:
        return straight
    back = np.cross(up, axes[0])
    return _limited(back * np.sign(back @ straight), up)


def _wall(mask: Mask, spacing_mm: float, centre: Floats, up: Floats, back: Floats) -> Floats:
    """(3,) distance of the posterior wall behind ``centre`` and its slopes upwards and to the left."""
    left = np.cross(up, back)
    heights = np.arange(-_HALF_HEIGHT_MM, _HALF_HEIGHT_MM + 0.1, 1.5)
    sides = np.arange(-_MIDLINE_MM, _MIDLINE_MM + 0.1, 1.5)
    h, s = (grid.ravel() for grid in np.meshgrid(heights, sides, indexing="ij"))
    steps = np.arange(0.0, _FARTHEST_WALL_MM + _CANAL_MM + 0.1, _RAY_STEP_MM)
    starts = centre + h[:, None] * up + s[:, None] * left
    points = starts[:, None] + steps[None, :, None] * back
    index = np.moveaxis(points / spacing_mm, -1, 0)
    inside = ndimage.map_coordinates(mask.astype(np.float32), index, order=1, mode="constant") > 0.5
    needed = round(_CANAL_MM / _RAY_STEP_MM)
    empty: Mask = np.all(np.lib.stride_tricks.sliding_window_view(~inside, needed, axis=1), axis=2)
    left_it: Mask = np.any(empty, axis=1) & inside[:, 0]
    if np.count_nonzero(left_it) < max(10.0, _SMALLEST_RAY_SHARE * float(np.count_nonzero(inside[:, 0]))):
        raise VertebraeUnusable("no spinal canal behind the body")
    exits, at = steps[empty.argmax(axis=1)][left_it], np.column_stack([np.ones_like(h), h, s])[left_it]
    fit = np.array([np.median(exits), 0.0, 0.0])
    for _ in range(3):
        close = np.abs(exits - at @ fit) < _WALL_TOLERANCE_MM
        if np.count_nonzero(close) < 10 or np.ptp(at[close, 1]) < _HALF_HEIGHT_MM:
            break
        fit, *_ = np.linalg.lstsq(at[close], exits[close], rcond=None)
        fit[1:] = np.clip(fit[1:], -_STEEPEST_WALL, _STEEPEST_WALL)
    return np.asarray(fit)


def _behind(offsets: Floats, up: Floats, back: Floats, wall: Floats) -> Floats:
    """(n,) distance in mm behind the wall along ``back``, negative in front of it."""
    local = np.column_stack([np.ones(len(offsets)), offsets @ up, offsets @ np.cross(up, back)])
    return np.asarray(offsets @ back - local @ wall)


def _without_holes(mask: Mask) -> Mask:
    # the background that reaches the edge, labelled once: filling by repeated dilation takes a hundred times longer
    labels, _ = ndimage.label(~np.pad(mask, 1))
    return np.asarray(labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _without_processes(body: Mask, spacing_mm: float) -> Mask:
    """What a ball of `_THIN_MM` fits into, with the edges that the ball can't reach; all of a body too flat for it."""
    outside = ndimage.distance_transform_edt(np.pad(body, 1))[1:-1, 1:-1, 1:-1] * spacing_mm <= _THIN_MM
    if outside.all():
        return body
    opened = ndimage.distance_transform_edt(outside) * spacing_mm <= _THIN_MM + _EDGE_MM
    kept = np.asarray(body & opened)
    return kept if np.count_nonzero(kept) > _SMALLEST_KEPT * np.count_nonzero(body) else body


def _component_at(body: Mask, index: Floats) -> Mask:
    """The connected part that holds ``index``, else the largest."""
    labels, count = ndimage.label(body)
    if count == 0:
        return body
    place = tuple(int(np.clip(round(float(v)), 0, n - 1)) for v, n in zip(index, body.shape, strict=True))
    label = int(labels[place]) or int(np.bincount(labels.ravel())[1:].argmax()) + 1
    return np.asarray(labels == label)
