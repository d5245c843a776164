"""Whose job is next: by priority class, then the source that was served longest ago, then the oldest of its jobs.

Without turns, a thousand studies that one archive sends at once would stand before the one that a scanner sends next.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Integer, Row, String, and_, bindparam, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.jobs.schema import JobRow, SourceRow, UtcDateTime
from osteo_daemon.jobs.transitions import CLOCK_STEP

_NOW = bindparam("now", type_=UtcDateTime)
_AHEAD = bindparam("ahead", type_=UtcDateTime)
_PRIORITY = bindparam("priority", type_=Integer)

# READY and not told to wait, or told so by a clock that has been set back since
_DUE = and_(
    JobRow.state == JobState.READY,
    or_(JobRow.not_before.is_(None), JobRow.not_before <= _NOW, JobRow.changed_at > _AHEAD),
)
_WAITING = and_(_DUE, JobRow.priority == _PRIORITY)

# made once: to put a query together takes longer than to run it
_ANY = select(JobRow.job_id).where(_DUE).limit(1)
_SOURCES = (
    select(SourceRow.source_ae)
    .where(exists().where(_WAITING, JobRow.source_ae == SourceRow.source_ae))
    .order_by(SourceRow.turn, SourceRow.source_ae)
)
_OLDEST = (
    select(JobRow.__table__)
    .where(_WAITING, JobRow.source_ae == bindparam("source_ae", type_=String))
    .order_by(JobRow.job_id)
    .limit(1)
)
_OLDEST_LOCKED = _OLDEST.with_for_update(skip_locked=True)


def anything_is_due(connection: Connection, now: datetime) -> bool:
    """True when a claim would find a job, were it not for others that claim."""
    return connection.execute(_ANY, _moments(now)).first() is not None


def next_in_turn(connection: Connection, now: datetime, *, lock: bool = True) -> Row[Any] | None:
    """The job to claim, its row locked; jobs that another transaction is claiming are passed over.

    Without ``lock`` only a look at it.
    """
    for priority in Priority:
        values = {**_moments(now), "priority": priority.value}
        for source_ae in connection.execute(_SOURCES, values).scalars().all():
            oldest = _OLDEST_LOCKED if lock else _OLDEST
            if (row := connection.execute(oldest, {**values, "source_ae": source_ae}).first()) is not None:
                return row
    return None


def _moments(now: datetime) -> dict[str, Any]:
    return {"now": now, "ahead": now + CLOCK_STEP}


def take_turn(connection: Connection, source_ae: str) -> None:
    """The source was served: it stands behind the others now."""
    after_all = select(func.max(SourceRow.turn) + 1).scalar_subquery()
    connection.execute(update(SourceRow).where(SourceRow.source_ae == source_ae).values(turn=after_all))


def know_source(connection: Connection, source_ae: str) -> None:
    """A source that sends for the first time is served next."""
    statement = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(statement(SourceRow).values(source_ae=source_ae, turn=0).on_conflict_do_nothing())
