"""When a study is complete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import exists, or_, select

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.schema import AssociationRow, JobRow, StudyRow
from osteo_daemon.jobs.transitions import CLOCK_STEP, change_state, screening_job, to_job, utc_now

OPEN_ASSOCIATION_FACTOR = 10.0
"""An association left open keeps its last study incomplete for at most this many quiet times."""


class Completeness(Database):
    """The scheduler's side of what arrives."""

    def complete_quiet_studies(
        self, quiet_seconds: float, *, now: datetime | None = None, who: str = "scheduler"
    ) -> Sequence[Job]:
        """RECEIVING to READY for studies of which nothing arrived for ``quiet_seconds``.

        A study into which an open association stored last stays incomplete, at most `OPEN_ASSOCIATION_FACTOR`
        quiet times.
        """
        now = now or utc_now()
        quiet = _quiet_jobs(now, timedelta(seconds=quiet_seconds))
        with self._reading() as connection:
            # the sweep mostly finds nothing and must not take the write lock for that
            candidates = connection.execute(quiet).all()
        done = []
        for candidate in candidates:
            with self._writing() as connection:
                self._alone(connection, candidate.study_instance_uid)
                # read again: an instance may have come in between
                row = connection.execute(quiet.where(JobRow.job_id == candidate.job_id)).one_or_none()
                if row is None:
                    continue
                reason = f"nothing arrived for {quiet_seconds:g} s"
                change_state(connection, row, JobState.READY, who=who, event="study_complete", reason=reason, now=now)
                done.append(to_job(connection.execute(screening_job(row.study_instance_uid)).one()))
        return done

    def mark_complete(self, study_instance_uid: str, *, who: str, reason: str, now: datetime | None = None) -> None:
        """RECEIVING to READY at once, on other evidence than the quiet time.

        Raises:
            IllegalTransition: the study isn't being received.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = connection.execute(screening_job(study_instance_uid)).one()
            change_state(connection, row, JobState.READY, who=who, event="study_complete", reason=reason, now=now)


def _quiet_jobs(now: datetime, quiet: timedelta) -> Any:
    open_association = exists().where(AssociationRow.study_instance_uid == JobRow.study_instance_uid)
    return (
        select(JobRow.__table__)
        .join(StudyRow, StudyRow.study_instance_uid == JobRow.study_instance_uid)
        .where(
            JobRow.state == JobState.RECEIVING,
            # a moment in the future was written by a clock that has been set back since: nothing arrived after that
            or_(StudyRow.last_received_at <= now - quiet, StudyRow.last_received_at > now + CLOCK_STEP),
            or_(
                ~open_association,
                StudyRow.last_received_at <= now - quiet * OPEN_ASSOCIATION_FACTOR,
                StudyRow.last_received_at > now + CLOCK_STEP,
            ),
        )
        .order_by(JobRow.job_id)
    )
