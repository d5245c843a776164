"""Named pulls (``[[pulls]]``): the scheduler writes one down when its time comes, the puller does what is written."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Final

from osteo_daemon.domain.archive import Span, Wanted
from osteo_daemon.jobs.pull_rows import Pull
from osteo_daemon.jobs.pulls import OPEN_PULLS
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.settings import NamedPullSettings, PullSettings

STEP_PREFIX: Final = "pull "
"""A named pull's step of the scheduler is this and its name."""


def enqueue(entry: NamedPullSettings, jobs: JobStore, today: date) -> str:
    """Write down a pull that begins now; says what was done.

    One that still has work is left alone: it is not written down twice. Study dates begin where the pull before ended,
    if that was longer ago than ``days``: what a node or an archive missed while it was down is fetched later.

    Args:
        today: by this machine's clock, as study dates are.

    Raises:
        StoreUnavailable: nothing was written.
    """
    before = jobs.latest_pull(entry.name)
    if before is not None and before.state in OPEN_PULLS:
        return f"pull {before.pull_id} is still at work"
    first = today - timedelta(days=entry.days - 1)
    if before is not None and (span := Criteria.of(before.criteria).span) is not None:
        first = min(first, span.last)
    wanted = Wanted(
        tuple(value.upper() for value in entry.modalities),
        tuple(value.upper() for value in entry.body_parts),
        entry.description,
        entry.whole_study,
    )
    criteria = Criteria(wanted, Span(first, today), limit=entry.limit, name=entry.name)
    return f"pull {jobs.create_pull(entry.archive, criteria.document())} from {entry.archive}"


def pace_of(entry: NamedPullSettings, own: PullSettings) -> PullSettings:
    """How gently: as ``[pull]`` says, but for what the entry says itself."""
    changed = {"between": entry.between, "studies_per_hour": entry.studies_per_hour}
    return own.model_copy(update={key: value for key, value in changed.items() if value is not None})


def next_open(jobs: JobStore, name: str) -> Pull | None:
    """The pull of this name that has something to do; None when there is none."""
    latest = jobs.latest_pull(name)
    return latest if latest is not None and latest.state in OPEN_PULLS else None
