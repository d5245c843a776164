"""What the store tells: jobs, histories, results."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select, tuple_

from osteo_daemon.domain.job import Job, JobKind, JobState, Priority
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.delivery_rows import to_report_object
from osteo_daemon.jobs.records import Event, JobSummary, ReportObject, StudyEvent
from osteo_daemon.jobs.schema import EventRow, JobRow, ReportObjectRow, ResultRow, StudyRow
from osteo_daemon.jobs.transitions import to_job

# what a list shows and no more: reading columns is most of its time
_SUMMARY: tuple[Any, ...] = (
    JobRow.job_id,
    JobRow.study_instance_uid,
    JobRow.state,
    JobRow.revision,
    JobRow.attempts,
    JobRow.priority,
    JobRow.source_ae,
    JobRow.code,
    JobRow.detail,
    JobRow.not_before,
    JobRow.changed_at,
    StudyRow.first_received_at,
    StudyRow.last_received_at,
    StudyRow.instances,
)


class Lists(Database):
    """The reader's side of the store."""

    def job(self, study_instance_uid: str) -> Job | None:
        """The screening job of a study, or None."""
        with self._reading() as connection:
            row = connection.execute(_of(study_instance_uid)).one_or_none()
        return None if row is None else to_job(row)

    def recent(
        self,
        *,
        state: JobState | None = None,
        source_ae: str | None = None,
        study_instance_uid: str | None = None,
        code: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before_job_id: int | None = None,
        limit: int = 50,
    ) -> list[JobSummary]:
        """Jobs as lists show them, newest first.

        Args:
            state: only jobs that stand here.
            source_ae: only studies of this sender.
            study_instance_uid: only this study.
            code: only jobs with this code of their last exclusion, hold, error or failure.
            since: only studies whose first instance came at or after this moment.
            until: only those whose first instance came before it.
            before_job_id: the last of a page: the next page follows it.
            limit: most rows.
        """
        query = (
            select(*_SUMMARY)
            .join(StudyRow, StudyRow.study_instance_uid == JobRow.study_instance_uid)
            .order_by(JobRow.created_at.desc(), JobRow.job_id.desc())
            .limit(limit)
        )
        equal = {
            JobRow.state: state,
            JobRow.source_ae: source_ae,
            JobRow.study_instance_uid: study_instance_uid,
            JobRow.code: code,
        }
        query = query.where(*(column == value for column, value in equal.items() if value is not None))
        if since is not None:
            query = query.where(JobRow.created_at >= since)
        if until is not None:
            query = query.where(JobRow.created_at < until)
        with self._reading() as connection:
            if before_job_id is not None:
                at = connection.execute(select(JobRow.created_at).where(JobRow.job_id == before_job_id)).scalar()
                if at is None:
                    return []
                # both columns of the index bound the page: the next one is found as quickly as the first
                query = query.where(tuple_(JobRow.created_at, JobRow.job_id) < tuple_(at, before_job_id))
            return [_summary(row) for row in connection.execute(query)]

    def oldest_by_state(self, states: Iterable[JobState]) -> dict[JobState, datetime]:
        """When the first image of the oldest job in each of these states came; a state without jobs is left out."""
        found: dict[JobState, datetime] = {}
        with self._reading() as connection:
            for state in states:
                # the first entry of an index for each, however many jobs there are
                query = (
                    select(JobRow.created_at).where(JobRow.state == state).order_by(JobRow.created_at, JobRow.job_id)
                )
                oldest = connection.execute(query.limit(1)).scalar_one_or_none()
                if oldest is not None:
                    found[state] = oldest
        return found

    def events(self, study_instance_uid: str) -> list[Event]:
        """A study's history, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                select(EventRow.__table__)
                .where(EventRow.study_instance_uid == study_instance_uid)
                .order_by(EventRow.event_id)
            ).all()
        return [_event(row) for row in rows]

    def latest_events(self, *, before_event_id: int | None = None, limit: int = 100) -> list[StudyEvent]:
        """Events of all studies, newest first; ``before_event_id`` pages on."""
        query = select(EventRow.__table__).order_by(EventRow.event_id.desc()).limit(limit)
        if before_event_id is not None:
            query = query.where(EventRow.event_id < before_event_id)
        with self._reading() as connection:
            return [StudyEvent(row.event_id, row.study_instance_uid, _event(row)) for row in connection.execute(query)]

    def result(self, study_instance_uid: str, revision: int | None = None) -> dict[str, Any] | None:
        """The ``osteo-result/1`` document of a revision, by default the latest that has one."""
        query = (
            select(ResultRow.document)
            .join(JobRow, JobRow.job_id == ResultRow.job_id)
            .where(JobRow.study_instance_uid == study_instance_uid)
            .order_by(ResultRow.revision.desc())
            .limit(1)
        )
        if revision is not None:
            query = query.where(ResultRow.revision == revision)
        with self._reading() as connection:
            document: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
        return document

    def report_objects(
        self, study_instance_uid: str, revision: int | None = None, *, also_removed: bool = False
    ) -> list[ReportObject]:
        """Committed report objects of a study, of one revision or of all, oldest revision first.

        Those whose files retention removed are left out unless ``also_removed``.
        """
        query = (
            select(ReportObjectRow.__table__)
            .join(JobRow, JobRow.job_id == ReportObjectRow.job_id)
            .where(JobRow.study_instance_uid == study_instance_uid)
            .order_by(ReportObjectRow.revision, ReportObjectRow.kind, ReportObjectRow.sop_instance_uid)
        )
        if revision is not None:
            query = query.where(ReportObjectRow.revision == revision)
        if not also_removed:
            query = query.where(ReportObjectRow.removed_at.is_(None))
        with self._reading() as connection:
            return [to_report_object(row) for row in connection.execute(query)]


def _of(study_instance_uid: str) -> Any:
    return select(JobRow.__table__).where(
        JobRow.study_instance_uid == study_instance_uid, JobRow.kind == JobKind.SCREEN
    )


def _event(row: Row[Any]) -> Event:
    return Event(
        at=row.at,
        who=row.who,
        event=row.event,
        from_state=None if row.from_state is None else JobState(row.from_state),
        to_state=None if row.to_state is None else JobState(row.to_state),
        revision=row.revision,
        reason=row.reason,
    )


def _summary(row: Row[Any]) -> JobSummary:
    return JobSummary(
        job_id=row.job_id,
        study_instance_uid=row.study_instance_uid,
        state=row.state,
        revision=row.revision,
        attempts=row.attempts,
        priority=Priority(row.priority),
        source_ae=row.source_ae,
        instances=row.instances,
        code=row.code,
        detail=row.detail,
        not_before=row.not_before,
        first_received_at=row.first_received_at,
        last_received_at=row.last_received_at,
        changed_at=row.changed_at,
    )
