"""What of a study is missing here, and what a retrieval of it came to: the archive's lists against our store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from osteo_daemon.domain.archive import FoundSeries, Retrieved
from osteo_daemon.jobs.pull_rows import PulledState, StudyHere


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt at a study came to; WANTED: not all of it came."""

    state: PulledState
    instances: int = 0
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What is missing here of a series.

    Attributes:
        missing: SOP Instance UIDs; None where the archive does not tell them.
        whole: nothing of it is here and all of it is wanted: the series is asked for at once.
        expected: how many objects it should have here in the end; None where nobody knows.
    """

    series_instance_uid: str
    missing: frozenset[str] | None
    whole: bool
    expected: int | None

    @property
    def asked_for(self) -> tuple[str, ...]:
        """SOP Instance UIDs to name; none for the whole series."""
        return () if self.whole or self.missing is None else tuple(sorted(self.missing))


def plan_series(
    series: FoundSeries, images: Mapping[str, str] | None, here: StudyHere, taken_classes: frozenset[str]
) -> Planned | None:
    """What to fetch of a series; None when nothing is missing.

    Args:
        images: what the archive has of it, SOP Instance UIDs with their classes; None when it doesn't tell.
        here: what this node has of the study.
        taken_classes: SOP classes that this node keeps: others are not asked for.
    """
    uid = series.series_instance_uid
    if images is None:
        if series.instances and here.count(uid) >= series.instances:
            return None
        return Planned(uid, None, True, series.instances)
    taken = {name for name, sop_class in images.items() if not sop_class or sop_class in taken_classes}
    # our own results are no news
    missing = frozenset(taken - here.own - here.stored.keys() - here.quarantined)
    if not missing:
        return None
    return Planned(uid, missing, len(missing) == len(images), len(taken))


def judge(plan: Sequence[Planned], retrieved: Retrieved, before: StudyHere, after: StudyHere) -> Outcome:
    """What a retrieval came to: what is stored after it that was not before."""
    fetched = len(after.stored) - len(before.stored)
    wanted = frozenset(uid for entry in plan for uid in entry.missing or ())
    missing = wanted - after.stored.keys() - after.own
    if conflicts := missing & after.quarantined:
        detail = f"{len(conflicts)} objects conflict with stored ones and are in quarantine"
        return Outcome(PulledState.FAILED, fetched, detail)
    if missing and missing <= retrieved.refused.keys():
        reasons = ", ".join(sorted({retrieved.refused[uid] for uid in missing}))
        return Outcome(PulledState.FAILED, fetched, f"{len(missing)} objects refused here: {reasons}")
    if missing:
        return Outcome(PulledState.WANTED, fetched, f"{len(missing)} of {len(wanted)} objects did not come")
    untold = [entry for entry in plan if entry.missing is None]
    short = [entry for entry in untold if after.count(entry.series_instance_uid) < (entry.expected or 1)]
    if short or (untold and retrieved.failed - after.stored.keys() - after.own):
        return Outcome(PulledState.WANTED, fetched, "some objects did not come")
    return Outcome(PulledState.FETCHED, fetched)
