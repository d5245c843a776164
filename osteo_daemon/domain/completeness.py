"""When a study is complete: evidence of several kinds, one verdict.

A list or a count that names what is not here makes the study wait, for a bounded time: long for images of a series
that has begun, shorter for a series that has not, which may never be sent here. A list that is wholly here ends the
wait at once; a count that agrees, or slices whose headers leave nothing open, shorten it. Without any of these the
source's own quiet time decides. Nothing waits for ever: every wait has an end in terms of the last arrival.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

OPEN_ASSOCIATION_FACTOR = 10.0
"""An association left open keeps its last study incomplete for at most this many quiet times."""

GAPS_KEPT = 40
"""So many studies of a source tell how it sends; older ones are forgotten."""

GAPS_NEEDED = 8
"""With fewer studies the configured quiet time holds."""

GAP_QUANTILE = 0.95
"""Of the largest gaps within a source's studies; the longest of all never counts, two of forty may be anything."""

QUIET_FACTOR = 2.0
EARLY_FACTOR = 1.5
"""Quiet times as multiples of that quantile: without and with other evidence that the study is complete."""


@dataclass(frozen=True, slots=True)
class QuietLimits:
    """What the site allows, in seconds.

    Attributes:
        quiet_seconds: of a source that is not known yet.
        minimum_seconds: a learnt quiet time is no shorter.
        maximum_seconds: and no longer; longer gaps are no gaps but further sendings.
        early_seconds: the least quiet time where other evidence says that the study is complete.
        missing_seconds: how long a study waits for what it is known to lack.
        series_seconds: how long for whole series of which nothing came; 0: not at all.
    """

    quiet_seconds: float
    minimum_seconds: float
    maximum_seconds: float
    early_seconds: float
    missing_seconds: float
    series_seconds: float = 0.0

    @property
    def shortest_seconds(self) -> float:
        """No study of which nothing is announced is complete before this."""
        return min(self.early_seconds, self.quiet_seconds)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How long a source's studies must be quiet, in seconds: without other evidence, and with it."""

    quiet_seconds: float
    early_seconds: float


class SliceOrder(StrEnum):
    """What the headers of a study's slices say."""

    COUNTED = "counted"  # Images in Acquisition (0020,1002) agrees with what is here
    EVEN = "even"  # numbered from 1 without a hole, evenly spaced, long enough for a lumbar spine
    HOLE = "hole"  # a place on the even grid and its instance number are both missing
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Slices:
    """What the headers say, and in words."""

    order: SliceOrder = SliceOrder.UNKNOWN
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Lists:
    """Objects that peers announced for a study, of the classes that are screened.

    Attributes:
        kinds: which services brought the lists, for people.
        in_progress: a procedure step has not ended.
        ended: at least one list is final.
        listed: objects named.
        here: of these, those that are here.
        missing: not here, of series of which something is here.
        unlisted: here and in no list.
        absent: series named of which nothing is here.
    """

    kinds: str = ""
    in_progress: bool = False
    ended: bool = False
    listed: int = 0
    here: int = 0
    missing: int = 0
    unlisted: int = 0
    absent: int = 0

    @property
    def complete(self) -> bool:
        """Everything that was announced is here, and nothing else."""
        return self.ended and not self.in_progress and 0 < self.listed == self.here and not self.unlisted


@dataclass(frozen=True, slots=True)
class Count:
    """What the source itself counts in a study.

    Attributes:
        missing: so many more than are here, in the series that are here.
        compared: what was compared, for people.
        absent: series of which nothing is here.
    """

    missing: int
    compared: str
    absent: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything known of a study at one moment.

    Attributes:
        source: AE title, for people.
        asking: the source was asked for its count and has not answered yet.
    """

    quiet_seconds: float
    open_association: bool
    source: str
    lists: Lists = Lists()
    slices: Slices = Slices()
    count: Count | None = None
    asking: bool = False


class Outcome(StrEnum):
    """What is to be done."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"  # something is known to be missing, and the wait for it is over
    WAIT = "wait"


class Lacks(StrEnum):
    """What an incomplete study lacks: the code of the quality flag that its report carries."""

    IMAGES = "study_incomplete"  # images of a series that is here, or a procedure step that has not ended
    SERIES = "series_missing"  # whole series of which nothing came


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done, why, and after how many seconds time alone may change it; ``lacks`` when INCOMPLETE."""

    outcome: Outcome
    reason: str
    wait_seconds: float = 0.0
    lacks: Lacks | None = None


def rhythm_of(gaps_seconds: Sequence[float], limits: QuietLimits) -> Rhythm:
    """Quiet times of a source from the largest gap in each of its last studies.

    Args:
        gaps_seconds: in any order; see `GAPS_KEPT`, `GAPS_NEEDED`.
    """
    # a site that sets a shorter or longer time than the bounds means it
    shortest = min(limits.minimum_seconds, limits.quiet_seconds)
    longest = max(limits.maximum_seconds, limits.quiet_seconds)
    if len(gaps_seconds) < GAPS_NEEDED:
        return Rhythm(limits.quiet_seconds, min(limits.early_seconds, limits.quiet_seconds))
    ordered = sorted(gaps_seconds)
    gap = ordered[min(math.ceil(GAP_QUANTILE * len(ordered)) - 1, len(ordered) - 2)]
    quiet = min(max(QUIET_FACTOR * gap, shortest), longest)
    return Rhythm(quiet, min(max(limits.early_seconds, EARLY_FACTOR * gap), quiet))


def with_gap(gaps_seconds: Sequence[float], gap_seconds: float) -> list[float]:
    """The gaps of a source's last studies with those of one more."""
    return [*gaps_seconds, round(gap_seconds, 3)][-GAPS_KEPT:]


def largest_gap(
    moments_seconds: Iterable[float], limits: QuietLimits, spoken_for: Collection[float] = ()
) -> float | None:
    """The longest pause between two arrivals that a quiet time has to bridge; None when nothing tells.

    Args:
        moments_seconds: of all arrivals, in any order.
        spoken_for: arrivals after which an association stayed open until the next one: no quiet time is needed there.

    Pauses longer than any quiet time are none: what came after them is another sending.
    """
    longest = max(limits.maximum_seconds, limits.quiet_seconds)
    ordered = sorted(moments_seconds)
    gaps = [after - before for before, after in itertools.pairwise(ordered) if before not in spoken_for]
    bridged = [gap for gap in gaps if gap <= longest]
    if len(ordered) < 2 or (gaps and not bridged):
        return None
    return max(bridged, default=0.0)


def judge(evidence: Evidence, rhythm: Rhythm, limits: QuietLimits) -> Verdict:
    """Weigh the evidence of one study that is being received."""
    quiet = evidence.quiet_seconds
    lacking = _lacking(evidence)
    if lacking:
        patience = max(limits.missing_seconds, rhythm.quiet_seconds)
        if quiet >= patience:
            return _incomplete(lacking, patience, Lacks.IMAGES)
        return Verdict(Outcome.WAIT, lacking, patience - quiet)
    if evidence.lists.complete:
        return Verdict(
            Outcome.COMPLETE, f"all {evidence.lists.listed} images listed by {evidence.lists.kinds} are here"
        )
    needed = rhythm.quiet_seconds * (OPEN_ASSOCIATION_FACTOR if evidence.open_association else 1.0)
    absent = _absent(evidence) if limits.series_seconds else ""
    if absent:
        patience = max(limits.series_seconds, needed)
        if quiet >= patience:
            return _incomplete(absent, patience, Lacks.SERIES)
        return Verdict(Outcome.WAIT, absent, patience - quiet)
    proof = _proof(evidence)
    if proof and quiet >= rhythm.early_seconds:
        return Verdict(Outcome.COMPLETE, f"{proof}; nothing came for {rhythm.early_seconds:g} s")
    if quiet >= needed:
        return Verdict(Outcome.COMPLETE, f"nothing came for {needed:g} s, the quiet time of {evidence.source}")
    until = min(needed, rhythm.early_seconds) if proof or quiet < rhythm.early_seconds else needed
    return Verdict(Outcome.WAIT, "", until - quiet)


def _incomplete(what: str, patience_seconds: float, lacks: Lacks) -> Verdict:
    return Verdict(Outcome.INCOMPLETE, f"{what}; nothing came for {patience_seconds:g} s", lacks=lacks)


def _absent(evidence: Evidence) -> str:
    absent = []
    if evidence.lists.absent:
        absent.append(f"{evidence.lists.kinds} lists {evidence.lists.absent} more series of which nothing came")
    if evidence.count is not None and evidence.count.absent:
        absent.append(f"{evidence.source} has {evidence.count.absent} more series of which nothing came")
    return "; ".join(absent)


def _lacking(evidence: Evidence) -> str:
    lacking = []
    if evidence.lists.missing:
        lacking.append(f"{evidence.lists.kinds} lists {evidence.lists.missing} more images of the series that are here")
    if evidence.lists.in_progress:
        lacking.append("the procedure step is still in progress")
    if evidence.count is not None and evidence.count.missing:
        lacking.append(f"{evidence.source} has {evidence.count.missing} more ({evidence.count.compared})")
    if evidence.slices.order is SliceOrder.HOLE:
        lacking.append(evidence.slices.detail)
    return "; ".join(lacking)


def _proof(evidence: Evidence) -> str:
    if evidence.count is not None and not evidence.count.absent:
        return f"{evidence.source} has no more ({evidence.count.compared})"
    if evidence.asking:
        return ""  # whoever knows best is about to say it
    if evidence.slices.order is SliceOrder.COUNTED:
        return evidence.slices.detail
    # even slices say nothing of what an open association may still bring
    if evidence.slices.order is SliceOrder.EVEN and not evidence.open_association:
        return evidence.slices.detail
    return ""
