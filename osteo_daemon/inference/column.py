"""From voxel labels to a counted column: centre line, profile along it, disc planes.

Internal frame: millimetres on the canonical grid, ordered (z, y, x), voxel (0, 0, 0) at the origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage, signal

from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]

SMALLEST_S1_MM3 = 5000.0  # the training torso has 36 ml; a cut S1 of a small person keeps more than this
_STEP_MM = 3.0
_MAX_DISC_TILT_DEGREES = 30.0  # against the centre line
_SLAB_MM = 4.5
_REACH_MM = 32.0
_PROFILE_RADIUS_MM = 12.0
_GAPS_MM = np.arange(20, 57)  # disc to disc: beyond the smallest and the tallest adults
_GAP_PER_ROOT_AREA = 0.95  # disc-to-disc distance over the root of the body's cross-section, training torso
_GAP_SD, _SMOOTH_SD = 0.22, 0.16  # of the logarithm of gap over expected gap, and of a gap over the one below
_PRIOR_WEIGHT, _CLASS_WEIGHT = 2.0, 0.7


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


@dataclass(frozen=True, slots=True, eq=False)
class DiscPlane:
    """The middle of a disc: point and cranial unit normal."""

    point: Floats
    normal: Floats

    def distance(self, points: Floats) -> Floats:
        """Signed distance of (..., 3) points in mm, positive above."""
        return np.asarray((points - self.point) @ self.normal)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A counted column.

    Attributes:
        profile: along the centre line.
        discs: planes from L5-S1 upwards; vertebra k (0 is L5) lies between planes k and k + 1.
        agreement: (n vertebrae,) how far phase, discs and body each bear the count out; the least of them, at most 1.
        gaps_mm: (n vertebrae,) distance between the planes along the centre line.
    """

    profile: Profile
    discs: tuple[DiscPlane, ...]
    agreement: Floats
    gaps_mm: Floats


def largest_component(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a mask; empty when the mask is."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == int(sizes.argmax()))


def find_s1(maps: SpineMaps, spacing_mm: float) -> npt.NDArray[np.bool_] | None:
    """The body of S1 as a mask on the canonical grid, or None when none is large enough to anchor names."""
    s1 = largest_component(maps.probabilities[SpineClass.S1_BODY] > 0.5)
    return s1 if np.count_nonzero(s1) * spacing_mm**3 >= SMALLEST_S1_MM3 else None


def trace_centreline(maps: SpineMaps, s1: npt.NDArray[np.bool_], spacing_mm: float) -> Floats | None:
    """(n, 3) points every millimetre from the centre of S1 cranially, or None when no vertebra stands on S1."""
    p = maps.probabilities
    column = (p[SpineClass.BODY] + p[SpineClass.DISC] > 0.5) | s1
    labels, _ = ndimage.label(ndimage.binary_dilation(column))
    attached = column & np.isin(labels, np.unique(labels[s1]))
    voxels = np.argwhere(attached) * spacing_mm
    start = np.argwhere(s1).mean(axis=0) * spacing_mm
    bodies = np.argwhere(attached & ~s1) * spacing_mm
    near = bodies[np.linalg.norm(bodies - start, axis=1) < 45.0]
    if len(near) * spacing_mm**3 < SMALLEST_S1_MM3:
        return None
    tangent = near.mean(axis=0) - start
    tangent /= np.linalg.norm(tangent)
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


def _segment_scores(profile: Profile) -> Floats:
    """(n, gaps) evidence for a vertebra from station i to i + gap: phase and classes against their ideal course."""
    n = len(profile.points)
    evidence = np.full((n, len(_GAPS_MM)), -np.inf)
    contrast = profile.disc - profile.body
    for g, gap in enumerate(_GAPS_MM.tolist()):
        if n <= gap:
            continue
        u = np.arange(gap + 1) / gap
        wave = np.stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)])
        ends = np.minimum(u, 1 - u)
        template = np.where(ends < 0.09, 1.0, np.where(ends > 0.2, -1.0, 0.0))
        windows = np.lib.stride_tricks.sliding_window_view(profile.phase, gap + 1, axis=0)  # (n - gap, 2, gap + 1)
        in_phase = np.einsum("ncg,cg->n", windows, wave)
        in_class = np.lib.stride_tricks.sliding_window_view(contrast, gap + 1) @ template
        evidence[: n - gap, g] = in_phase + _CLASS_WEIGHT * in_class
    return evidence


def agreement_of(profile: Profile, stations: list[int]) -> Floats:
    """(n vertebrae,) the least of: phase against the count, disc at both ends, body in the middle; each at most 1.

    Phase and classes are two outputs of the network that may fail apart; a count is trusted where both bear it out.
    Above the uppermost vertebra no disc is asked for when the column ends there, as it does at the edge of the scan,
    and its phase may stop short of a full turn: it may be as long as the vertebra below.
    """
    share = ndimage.uniform_filter1d(profile.disc / np.maximum(profile.disc + profile.body, 0.2), 3)
    last = len(share) - 1
    at_disc = [float(share[max(0, s - 5) : min(last, s + 5) + 1].max()) for s in stations]
    open_end = stations[-1] >= last - 8
    if open_end:
        at_disc[-1] = 1.0
    result = []
    for k, (low, high) in enumerate(pairwise(stations)):
        seen = profile.phase[low : high + 1]
        seen = seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1.0)
        lengths = [high - low]
        if open_end and high == stations[-1] and k > 0:
            lengths.append(max(high - low, low - stations[k - 1]))
        in_phase = max(_phase_agreement(seen, length) for length in lengths)
        third = (high - low) // 3
        in_body = float((1 - share[low + third : high - third + 1]).mean()) * float(
            min(1.0, 2 * profile.body[low + third : high - third + 1].mean())
        )
        result.append(min(in_phase, at_disc[k], at_disc[k + 1], in_body))
    return np.array(result)


def _phase_agreement(seen: Floats, length_mm: int) -> float:
    """Mean cosine between (n, 2) unit phases, one a millimetre, and a turn of ``length_mm`` that begins with them."""
    angle = 2 * np.pi * np.arange(len(seen)) / length_mm
    return float((seen * np.stack([np.cos(angle), np.sin(angle)], axis=1)).sum(axis=1).mean())


def count_discs(profile: Profile) -> list[int] | None:
    """Stations of the disc planes from L5-S1 upwards, by dynamic programming.

    Maximises the evidence under gaps that fit the cross-section and vary smoothly. None when nothing fits.
    """
    above = np.flatnonzero(profile.body + profile.disc > profile.s1)
    if len(above) < int(_GAPS_MM[0]):
        return None
    border = int(above[0])
    evidence = _segment_scores(profile)
    column = profile.body + profile.disc > 0.6
    expected = _GAP_PER_ROOT_AREA * float(np.sqrt(np.median(profile.area_mm2[column]))) if column.any() else 34.0
    size = -_PRIOR_WEIGHT * (np.log(_GAPS_MM / expected) / _GAP_SD) ** 2
    ratio = np.log(_GAPS_MM[:, None] / _GAPS_MM[None, :])  # gap above over gap below
    smooth = -_PRIOR_WEIGHT * np.minimum((ratio / _SMOOTH_SD) ** 2, 9.0)
    n = len(profile.points)
    best = np.full((n, len(_GAPS_MM)), -np.inf)  # best total of a chain whose last vertebra ends here with this gap
    came = np.full((n, len(_GAPS_MM)), -1)
    for end in range(n):
        for g, gap in enumerate(_GAPS_MM):
            begin = end - int(gap)
            if begin < 0:
                break
            own = evidence[begin, g] + size[g]
            if abs(begin - border) <= 12:
                best[end, g] = own - 0.1 * (begin - border) ** 2
            chained = best[begin] + smooth[g]
            k = int(chained.argmax())
            if chained[k] + own > best[end, g]:
                best[end, g] = chained[k] + own
                came[end, g] = k
    position, gap_index = (int(v) for v in np.unravel_index(int(best.argmax()), best.shape))
    if not best[position, gap_index] > 0:
        return None
    stations = [position]
    while True:
        begin = position - int(_GAPS_MM[gap_index])
        stations.append(begin)
        previous = int(came[position, gap_index])
        if previous < 0:
            break
        position, gap_index = begin, previous
    return stations[::-1]


def _disc_plane(maps: SpineMaps, point: Floats, tangent: Floats, spacing_mm: float) -> DiscPlane:
    """The plane of a disc: through the centre line, in the main plane of the disc's own voxels where these tell."""
    index = np.round(point / spacing_mm).astype(int)
    reach = int(30 / spacing_mm)
    low = np.maximum(index - reach, 0)
    window = tuple(slice(int(a), int(b)) for a, b in zip(low, index + reach + 1, strict=True))
    disc = maps.probabilities[SpineClass.DISC][window]
    places = (np.argwhere(disc > 0.4) + low) * spacing_mm
    offset = places - point
    along = offset @ tangent
    near = (np.abs(along) < 9.0) & (np.linalg.norm(offset - along[:, None] * tangent, axis=1) < 28.0)
    if np.count_nonzero(near) * spacing_mm**3 < 1500.0:
        return DiscPlane(point, tangent)
    cloud = places[near]
    _, _, axes = np.linalg.svd(cloud - cloud.mean(axis=0), full_matrices=False)
    normal = axes[2] * np.sign(axes[2] @ tangent)
    return DiscPlane(point, normal if normal @ tangent > np.cos(np.radians(_MAX_DISC_TILT_DEGREES)) else tangent)


def count_column(maps: SpineMaps, s1: npt.NDArray[np.bool_], spacing_mm: float) -> Column | None:
    """Trace and count the column that stands on S1; None when there is none to count."""
    points = trace_centreline(maps, s1, spacing_mm)
    if points is None:
        return None
    profile = sample_profile(maps, points, spacing_mm)
    stations = count_discs(profile)
    if stations is None:
        return None
    discs = tuple(_disc_plane(maps, profile.points[s], profile.tangents[s], spacing_mm) for s in stations)
    return Column(profile, discs, agreement_of(profile, stations), np.diff(np.array(stations, dtype=np.float64)))
