"""Names from two anchors: counted up from the sacrum, and down from the last pair of ribs.

Vertebrae of a column are numbered from its lower end. Each anchor says which number is T12; the rules that follow from
both stand in docs/localizer.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible
from osteo_daemon.inference.ribs import Bearing, RibEvidence

Floats = npt.NDArray[np.float64]

LEVELS_FROM_SACRUM = ("L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10")
T12 = LEVELS_FROM_SACRUM.index("T12")
L1 = LEVELS_FROM_SACRUM.index("L1")
N_MEASURED = 6  # L5 to T12, the levels that are reported

S1_AND_RIB, S1_ONLY, RIB_ONLY, NO_ANCHOR = "s1+rib", "s1", "rib", "none"

FEWEST_LUMBAR, MOST_LUMBAR = 4, 6
"""Vertebrae between the sacrum and the last pair of ribs; outside this range the count itself must be wrong."""

_FAIR_AGREEMENT = 0.55  # `Column.agreement`, mean of the measured vertebrae
_POOR_AGREEMENT = 0.40  # of any one vertebra
_UNEVEN_GAP = 0.30  # logarithm of a gap over the mean of its neighbours
_DOUBLE_GAP = 0.47  # the same, for two vertebrae counted as one (1.6 times)
_NO_DISC = 0.22  # `disc_contrast` over its median along the column
_VISIBLE_DISC_HU = 40.0  # median `disc_contrast` of a scan that shows discs at all: less in slices of 10 mm


@dataclass(frozen=True, slots=True)
class Naming:
    """Names of the vertebrae of a column.

    Attributes:
        offset: vertebra k of the column has the name ``LEVELS_FROM_SACRUM[k + offset]``.
        certain: (n,) whether that name is to be trusted.
        flags: remarks on the study.
        fused: vertebrae without a disc towards a neighbour (caution), or twice as tall as one (blocking).
        anchor: ``s1+rib``, ``s1``, ``rib`` or ``none``.
        alternative: what the other anchor would add to every ``offset``; 0 where the anchors do not disagree.
    """

    offset: int
    certain: tuple[bool, ...]
    flags: tuple[QualityFlag, ...]
    fused: Mapping[int, Severity]
    anchor: str
    alternative: int = 0

    def level(self, number: int) -> str | None:
        """Name of a vertebra; None below L5 and above T10."""
        place = number + self.offset
        return LEVELS_FROM_SACRUM[place] if 0 <= place < len(LEVELS_FROM_SACRUM) else None


def last_rib(evidence: Sequence[RibEvidence]) -> tuple[int, int | None] | None:
    """The lowest vertebra that bears ribs: its least and greatest possible number.

    The greatest is None when no rib was found. None altogether when a vertebra without ribs lies above one with ribs.
    """
    ribs = [k for k, found in enumerate(evidence) if found.bearing is Bearing.RIB]
    none = [k for k, found in enumerate(evidence) if found.bearing is Bearing.NONE]
    if ribs and none and none[-1] > ribs[0]:
        return None
    return (none[-1] + 1 if none else 0), (ribs[0] if ribs else None)


def doubts(gaps_mm: Floats, agreement: Floats) -> list[bool]:
    """For each vertebra: is the count doubtful there?"""
    doubtful = []
    for k in range(len(gaps_mm)):
        uneven = abs(_against_neighbours(gaps_mm, k)) > _UNEVEN_GAP
        doubtful.append(bool(uneven or agreement[k] < _POOR_AGREEMENT))
    return doubtful


def fused_vertebrae(gaps_mm: Floats, contrast_hu: Floats) -> Mapping[int, Severity]:
    """Vertebrae twice as tall as their neighbours, and pairs with no disc between them.

    Args:
        gaps_mm: (n,) distance between the planes of each vertebra.
        contrast_hu: (n + 1,) `disc_contrast` of each plane.
    """
    inner = contrast_hu[np.isfinite(contrast_hu)]
    usual = float(np.median(inner)) if len(inner) else 0.0
    bare = [k for k in range(1, len(gaps_mm)) if usual >= _VISIBLE_DISC_HU and contrast_hu[k] < _NO_DISC * usual]
    found = dict.fromkeys([number for k in bare for number in (k - 1, k)], Severity.CAUTION)
    for k in range(len(gaps_mm)):
        if _against_neighbours(gaps_mm, k) > _DOUBLE_GAP:
            found[k] = Severity.BLOCKING
    return found


def name_column(
    gaps_mm: Floats, agreement: Floats, contrast_hu: Floats, evidence: Sequence[RibEvidence], on_s1: bool
) -> Naming:
    """Apply the rules.

    Args:
        gaps_mm, agreement: (n,) of `Column`.
        contrast_hu: (n + 1,) `disc_contrast`.
        evidence: (n,) ribs of each vertebra.
        on_s1: whether vertebra 0 stands on S1.

    Raises:
        NotEligible: ``insufficient_coverage`` where there is no anchor and fewer than two vertebrae without ribs.
    """
    doubtful = doubts(gaps_mm, agreement)
    fused = fused_vertebrae(gaps_mm, contrast_hu)
    place = last_rib(evidence)
    first, last = place if place is not None else (0, None)
    if on_s1:
        return _from_s1(doubtful, agreement, fused, first, last)
    if last is not None and first == last and last > 0:
        return _from_ribs(doubtful, fused, last)
    return _without_anchor(len(gaps_mm), evidence, fused)


def _from_s1(
    doubtful: list[bool], agreement: Floats, fused: Mapping[int, Severity], first: int, last: int | None
) -> Naming:
    count = len(doubtful)
    lower = doubtful[:N_MEASURED]
    unsure = agreement[:N_MEASURED].mean() < _FAIR_AGREEMENT
    if first <= T12 and (last is None or last >= T12):
        if first == last and not unsure:
            # counted right from both ends: doubt at a vertebra is doubt about that vertebra only
            certain = tuple(not doubt for doubt in doubtful)
            return Naming(0, certain, _uncertain(lower), fused, S1_AND_RIB)
        upto = 0 if unsure else next((k for k in range(count) if doubtful[k]), count)
        certain = tuple(k < upto for k in range(count))
        flags = _uncertain([not c for c in certain[:N_MEASURED]])
        return Naming(0, certain, flags or (QualityFlag("last_rib_not_seen", Severity.CAUTION),), fused, S1_ONLY)
    rib = first if last is None else min(max(T12, first), last)
    if FEWEST_LUMBAR <= rib <= MOST_LUMBAR:
        # the numbers stand, the names may all be one off: how much that matters is known when they are measured
        flag = QualityFlag("possible_transitional_anatomy", Severity.BLOCKING)
        more = _uncertain(lower) or (_uncertain([True] * count) if unsure else ())
        return Naming(0, (False,) * count, (flag, *more), fused, S1_AND_RIB, alternative=T12 - rib)
    return Naming(0, (False,) * count, (QualityFlag("level_uncertain", Severity.BLOCKING),), fused, S1_ONLY)


def _from_ribs(doubtful: list[bool], fused: Mapping[int, Severity], rib: int) -> Naming:
    """Counting runs downwards: doubt at a vertebra is doubt about it and every one below."""
    certain = list(doubtful)
    trusted = True
    for k in range(rib, -1, -1):
        trusted = trusted and not doubtful[k]
        certain[k] = trusted
    for k in range(rib + 1, len(doubtful)):
        certain[k] = not doubtful[k]
    offset = T12 - rib
    flags = [QualityFlag("level_uncertain", Severity.CAUTION if all(certain[: rib + 1]) else Severity.BLOCKING)]
    if offset < 0:  # more than five vertebrae without ribs
        flags.append(QualityFlag("possible_transitional_anatomy", Severity.BLOCKING))
        certain = [False] * len(certain)
    return Naming(offset, tuple(certain), tuple(flags), fused, RIB_ONLY)


def _without_anchor(count: int, evidence: Sequence[RibEvidence], fused: Mapping[int, Severity]) -> Naming:
    """Names in the middle of what is possible, none of them certain."""
    none = [k for k in range(count) if evidence[k].bearing is Bearing.NONE]
    if len(none) < 2:
        raise NotEligible(
            ExclusionCode.INSUFFICIENT_COVERAGE,
            "neither the sacrum nor the last rib is in view, and fewer than two lumbar vertebrae",
        )
    offset = max(0, L1 - none[-1]) // 2 if none[-1] <= L1 else L1 - none[-1]
    flag = QualityFlag("level_uncertain", Severity.BLOCKING)
    return Naming(offset, (False,) * count, (flag,), fused, NO_ANCHOR)


def _uncertain(doubtful: Sequence[bool]) -> tuple[QualityFlag, ...]:
    """``level_uncertain``: blocking where it concerns L1 or lower."""
    if not any(doubtful):
        return ()
    severity = Severity.BLOCKING if any(doubtful[: L1 + 1]) else Severity.CAUTION
    return (QualityFlag("level_uncertain", severity),)


def _against_neighbours(gaps_mm: Floats, k: int) -> float:
    """Logarithm of a gap over the mean of the gaps beside it; 0 without neighbours."""
    beside = [gaps_mm[j] for j in (k - 1, k + 1) if 0 <= j < len(gaps_mm)]
    return float(np.log(gaps_mm[k] / np.mean(beside))) if beside else 0.0
