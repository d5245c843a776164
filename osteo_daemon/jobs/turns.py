"""Whose job is next: by priority class, then the source that was served longest ago, then the oldest of its jobs.

Without turns, a thousand studies that one archive sends at once would stand before the one that a scanner sends next.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.jobs.schema import JobRow, SourceRow
from osteo_daemon.jobs.transitions import CLOCK_STEP


def is_due(now: datetime) -> ColumnElement[bool]:
    """READY and not told to wait, or told so by a clock that has been set back since."""
    waited = or_(JobRow.not_before.is_(None), JobRow.not_before <= now, JobRow.changed_at > now + CLOCK_STEP)
    return and_(JobRow.state == JobState.READY, waited)


def next_in_turn(connection: Connection, now: datetime, *, lock: bool = True) -> Row[Any] | None:
    """The job to claim, its row locked; jobs that another transaction is claiming are passed over.

    Without ``lock`` only a look at it.
    """
    for priority in Priority:
        waiting = and_(is_due(now), JobRow.priority == priority.value)
        sources = (
            select(SourceRow.source_ae)
            .where(exists().where(waiting, JobRow.source_ae == SourceRow.source_ae))
            .order_by(SourceRow.turn, SourceRow.source_ae)
        )
        for source_ae in connection.execute(sources).scalars().all():
            oldest = (
                select(JobRow.__table__).where(waiting, JobRow.source_ae == source_ae).order_by(JobRow.job_id).limit(1)
            )
            if lock:
                oldest = oldest.with_for_update(skip_locked=True)
            if (row := connection.execute(oldest).first()) is not None:
                return row
    return None


def take_turn(connection: Connection, source_ae: str) -> None:
    """The source was served: it stands behind the others now."""
    after_all = select(func.max(SourceRow.turn) + 1).scalar_subquery()
    connection.execute(update(SourceRow).where(SourceRow.source_ae == source_ae).values(turn=after_all))


def know_source(connection: Connection, source_ae: str) -> None:
    """A source that sends for the first time is served next."""
    statement = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(statement(SourceRow).values(source_ae=source_ae, turn=0).on_conflict_do_nothing())
