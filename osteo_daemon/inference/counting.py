"""Counting: where along the centre line the disc planes are, and how far image and phase bear that out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.inference.centreline import Profile

Floats = npt.NDArray[np.float64]

_GAPS_MM = np.arange(20, 57)  # disc to disc: beyond the smallest and the tallest adults
_GAP_PER_ROOT_AREA = 0.95  # disc-to-disc distance over the root of the body's cross-section, training torso
_GAP_SD, _SMOOTH_SD = 0.22, 0.16  # of the logarithm of gap over expected gap, and of a gap over the one below
_PRIOR_WEIGHT, _CLASS_WEIGHT = 2.0, 0.7
_OPEN_END_MM = 8
_LOWEST_DISC_MM = 60  # without S1 the lowest plane is sought this far above the lower end of the column


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
    open_end = stations[-1] >= last - _OPEN_END_MM
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


def count_discs(profile: Profile, on_s1: bool) -> list[int] | None:
    """Stations of the disc planes upwards, by dynamic programming.

    Maximises the evidence under gaps that fit the cross-section and vary smoothly. None when nothing fits.

    Args:
        profile: along the centre line.
        on_s1: whether the line begins in S1; then the first plane is L5-S1, else the lowest disc in view.
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
            if on_s1 and abs(begin - border) <= 12:
                best[end, g] = own - 0.1 * (begin - border) ** 2
            elif not on_s1 and begin <= _LOWEST_DISC_MM:
                best[end, g] = own
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
