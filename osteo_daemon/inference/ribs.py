"""Which vertebrae bear a rib: the second anchor of names, independent of the sacrum.

Beside a vertebra the network labels posterior elements and ribs. Cut at a fixed distance from the centre line and taken
together, they fall apart into one piece a vertebra and side: a transverse process, which ends within 55 mm of the
midline and is posterior element throughout, or a rib with its joint, which runs on and is labelled rib. A piece belongs
to the vertebra at whose height it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from osteo_daemon.inference.canonical import CanonicalVolume
from osteo_daemon.inference.column import Column, DiscPlane
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]

# Lengths are for a spine of the training torso's size and scale with the root of the body's cross-section.
_USUAL_ROOT_AREA_MM = 37.0
_SMALLEST_SCALE, _LARGEST_SCALE = 0.75, 1.3
_INNER_MM, _OUTER_MM = 24.0, 75.0  # from the centre line: beside the facet joints, and far enough to tell a rib
_BEGIN_MM = 9.0  # the part of a piece that tells where it begins
_BEHIND_MM = 70.0  # behind the centre line
_JOINT = 0.6  # where a rib or transverse process begins, between lower (0) and upper (1) disc plane; training torso
_LARGEST_MISS = 0.65  # of that height, in vertebrae
_SHORT_MM, _LONG_MM = 45.0, 60.0  # reach at which a piece is no rib, and at which it may be one
_RIB_MM3 = 900.0  # of rib voxels within the corridor: what certainly is one; the torso's last rib has 1,600 to 2,400
_SMALLEST_PIECE_MM3 = 200.0
_SEEN_SHARE = 0.9
_BEARS, _BEARS_NONE = 0.5, 0.15


class Bearing(StrEnum):
    """Whether a vertebra bears ribs."""

    RIB = "rib"
    NONE = "none"
    UNCLEAR = "unclear"  # in view, but neither
    NOT_SEEN = "not_seen"


@dataclass(frozen=True, slots=True)
class RibEvidence:
    """What stands beside one vertebra.

    Attributes:
        bearing: the conclusion from both sides.
        right, left: 0 (a transverse process) to 1 (a rib); None where neither was found.
    """

    bearing: Bearing
    right: float | None
    left: float | None


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a vertebra: the score of its piece, None without one, and whether the scan shows the place."""

    score: float | None
    in_view: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One connected part of ribs and posterior elements beside the column.

    Attributes:
        begin: (3,) where it is nearest to the centre line, internal frame.
        score: 0 to 1, a rib.
    """

    begin: Floats
    score: float


def rib_evidence(maps: SpineMaps, canonical: CanonicalVolume, column: Column) -> tuple[RibEvidence, ...]:
    """For each vertebra of the column, caudal to cranial: does it bear ribs?"""
    planes = _level_planes(column)
    scale = _scale(column)
    sides = []
    for side in (-1.0, 1.0):
        pieces = _pieces(maps, canonical.spacing_mm, column, side, scale)
        sides.append(
            [
                _Side(score, _in_view(canonical, planes, k, side, scale))
                for k, score in enumerate(_assign(pieces, planes))
            ]
        )
    return tuple(_conclude(right, left) for right, left in zip(*sides, strict=True))


def _conclude(right: _Side, left: _Side) -> RibEvidence:
    """A rib on one side is one, even at the edge of the scan; none are there only where a transverse process is."""
    scores = [side.score for side in (right, left) if side.score is not None]
    if scores and max(scores) >= _BEARS:
        bearing = Bearing.RIB
    elif not (right.in_view or left.in_view):
        bearing = Bearing.NOT_SEEN
    else:
        bearing = Bearing.NONE if scores and max(scores) <= _BEARS_NONE else Bearing.UNCLEAR
    return RibEvidence(bearing, right.score, left.score)


def _scale(column: Column) -> float:
    profile = column.profile
    inside = profile.body + profile.disc > 0.6
    area = float(np.median(profile.area_mm2[inside])) if inside.any() else _USUAL_ROOT_AREA_MM**2
    return float(np.clip(np.sqrt(area) / _USUAL_ROOT_AREA_MM, _SMALLEST_SCALE, _LARGEST_SCALE))


def _level_planes(column: Column) -> list[DiscPlane]:
    """Disc planes, the uppermost moved up where the scan ends within its vertebra."""
    planes = list(column.discs)
    if len(planes) > 2 and column.gaps_mm[-1] < column.gaps_mm[-2]:
        below = planes[-2]
        planes[-1] = DiscPlane(below.point + column.gaps_mm[-2] * below.normal, below.normal)
    return planes


def _level_of(planes: list[DiscPlane], point: Floats) -> float:
    """Height of a (3,) point in vertebrae: k + 0.5 is the middle of vertebra k."""
    distances = [float(plane.distance(point)) for plane in planes]
    for k in range(len(planes) - 1):
        if distances[k] >= 0 > distances[k + 1]:
            return k + distances[k] / (distances[k] - distances[k + 1])
    if distances[0] < 0:
        return distances[0] / 34.0
    return len(planes) - 1 + distances[-1] / 34.0


def _beside(places: Floats, column: Column, side: float) -> tuple[Floats, Floats]:
    """Lateral (towards ``side``) and posterior distance in mm of (n, 3) places from the centre line at their height."""
    line = column.profile.points
    order = np.argsort(line[:, 0])
    y = np.interp(places[:, 0], line[order, 0], line[order, 1])
    x = np.interp(places[:, 0], line[order, 0], line[order, 2])
    return side * (places[:, 2] - x), places[:, 1] - y


def _pieces(maps: SpineMaps, spacing_mm: float, column: Column, side: float, scale: float) -> list[_Piece]:
    rib, arch = maps.probabilities[SpineClass.RIB], maps.probabilities[SpineClass.POSTERIOR]
    index = np.argwhere(rib + arch > 0.5)
    lateral, behind = _beside(np.asarray(index * spacing_mm, dtype=np.float64), column, side)
    corridor = (lateral > _INNER_MM * scale) & (lateral < _OUTER_MM * scale) & (behind > 0) & (behind < _BEHIND_MM)
    index, lateral = index[corridor], lateral[corridor]
    if not len(index):
        return []
    mask = np.zeros(rib.shape, dtype=bool)
    mask[tuple(index.T)] = True
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    member = labels[tuple(index.T)]
    is_rib = rib[tuple(index.T)] > 0.5
    pieces = []
    for piece in range(1, count + 1):
        own = member == piece
        if np.count_nonzero(own) * spacing_mm**3 < _SMALLEST_PIECE_MM3 * scale**2:
            continue
        nearest, reach = float(lateral[own].min()), float(lateral[own].max()) / scale
        begin = index[own][lateral[own] < nearest + _BEGIN_MM].mean(axis=0) * spacing_mm
        volume = np.count_nonzero(is_rib & own) * spacing_mm**3 / scale**2
        length = np.clip((reach - _SHORT_MM) / (_LONG_MM - _SHORT_MM), 0.0, 1.0)
        pieces.append(_Piece(begin, float(min(1.0, volume / _RIB_MM3) * length)))
    return pieces


def _assign(pieces: list[_Piece], planes: list[DiscPlane]) -> list[float | None]:
    """Score of the piece at each vertebra, None without one; one piece a vertebra, at the least sum of misses."""
    count = len(planes) - 1
    scores: list[float | None] = [None] * count
    if not pieces:
        return scores
    height = np.array([_level_of(planes, piece.begin) for piece in pieces])
    # vertebrae above the counted ones take the pieces that belong to them
    extra = max(0, int(np.ceil(height.max())) - count + 1)
    miss = np.abs(height[:, None] - (np.arange(count + extra) + _JOINT)[None, :])
    nowhere = np.full((len(pieces), len(pieces)), _LARGEST_MISS)
    rows, columns = optimize.linear_sum_assignment(np.hstack([np.minimum(miss, 10.0), nowhere]))
    for row, place in zip(rows.tolist(), columns.tolist(), strict=True):
        if place < count:
            scores[place] = pieces[row].score
    return scores


def _in_view(canonical: CanonicalVolume, planes: list[DiscPlane], k: int, side: float, scale: float) -> bool:
    """Whether the scan shows where a rib of vertebra ``k`` would begin and run on."""
    lower, upper = planes[k], planes[k + 1]
    joint = lower.point + _JOINT * (upper.point - lower.point)
    z = joint[0] + np.arange(-12.0, 12.1, 3.0)
    lateral = np.arange(_INNER_MM, _LONG_MM + 1, 3.0) * scale
    y = joint[1] + np.arange(10.0, 46.0, 6.0)
    places = np.stack(np.meshgrid(z, y, joint[2] + side * lateral, indexing="ij"), -1).reshape(-1, 3)
    index = np.round(places / canonical.spacing_mm).astype(int)
    inside = ((index >= 0) & (index < canonical.seen.shape)).all(axis=1)
    index = np.clip(index, 0, np.array(canonical.seen.shape) - 1)
    return bool((inside & canonical.seen[tuple(index.T)]).mean() >= _SEEN_SHARE)
