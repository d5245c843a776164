"""`JobStore`: the one door to the database; lists and what a person may do stand here, the rest in its parts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select

from osteo_daemon.domain.job import Job, JobKind, JobState
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.claims import Claims
from osteo_daemon.jobs.deliveries import Deliveries, to_report_object
from osteo_daemon.jobs.intake import HELD_BY_HAND, Intake
from osteo_daemon.jobs.records import Event, JobSummary, ReportObject
from osteo_daemon.jobs.schema import EventRow, InstanceRow, JobRow, ReportObjectRow, ResultRow, StudyRow
from osteo_daemon.jobs.transitions import NO_LEASE, change_state, to_job, utc_now

__all__ = ["JobStore"]


class JobStore(Intake, Claims, Deliveries):
    """Studies, jobs, reports and deliveries of one node; every process and thread may use it at once."""

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
        before_job_id: int | None = None,
        limit: int = 50,
    ) -> list[JobSummary]:
        """Jobs as lists show them, newest first; ``before_job_id`` pages on."""
        count = (
            select(func.count())
            .select_from(InstanceRow)
            .where(InstanceRow.study_instance_uid == JobRow.study_instance_uid)
            .correlate(JobRow)
            .scalar_subquery()
        )
        query = (
            select(
                JobRow.__table__,
                StudyRow.source_ae,
                StudyRow.first_received_at,
                StudyRow.last_received_at,
                count.label("instances"),
            )
            .join(StudyRow, StudyRow.study_instance_uid == JobRow.study_instance_uid)
            .order_by(JobRow.job_id.desc())
            .limit(limit)
        )
        if state is not None:
            query = query.where(JobRow.state == state)
        if source_ae is not None:
            query = query.where(StudyRow.source_ae == source_ae)
        if study_instance_uid is not None:
            query = query.where(JobRow.study_instance_uid == study_instance_uid)
        if before_job_id is not None:
            query = query.where(JobRow.job_id < before_job_id)
        with self._reading() as connection:
            return [_summary(row) for row in connection.execute(query)]

    def counts_by_state(self) -> dict[JobState, int]:
        """How many jobs stand in each state; every state is named."""
        with self._reading() as connection:
            rows = connection.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).all()
        counts = dict.fromkeys(JobState, 0)
        counts.update((state, count) for state, count in rows)
        return counts

    def events(self, study_instance_uid: str) -> list[Event]:
        """A study's history, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                select(EventRow.__table__)
                .where(EventRow.study_instance_uid == study_instance_uid)
                .order_by(EventRow.event_id)
            ).all()
        return [
            Event(
                at=row.at,
                who=row.who,
                event=row.event,
                from_state=None if row.from_state is None else JobState(row.from_state),
                to_state=None if row.to_state is None else JobState(row.to_state),
                revision=row.revision,
                reason=row.reason,
            )
            for row in rows
        ]

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

    def report_objects(self, study_instance_uid: str, revision: int | None = None) -> list[ReportObject]:
        """Committed report objects of a study, of one revision or of all, oldest revision first."""
        query = (
            select(ReportObjectRow.__table__)
            .join(JobRow, JobRow.job_id == ReportObjectRow.job_id)
            .where(JobRow.study_instance_uid == study_instance_uid)
            .order_by(ReportObjectRow.revision, ReportObjectRow.kind, ReportObjectRow.sop_instance_uid)
        )
        if revision is not None:
            query = query.where(ReportObjectRow.revision == revision)
        with self._reading() as connection:
            return [to_report_object(row) for row in connection.execute(query)]

    def hold_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person stops a study; a worker on it loses its lease.

        Raises:
            KeyError: no such study.
            IllegalTransition: it has already ended.
        """
        self._by_hand(
            study_instance_uid, JobState.HELD, "study_held", who, reason, now, code=HELD_BY_HAND, detail=reason
        )

    def retry_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person lets a held, failed or excluded study run again, from the first attempt, under the same revision.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is not held, failed or excluded, or waits already.
        """
        self._by_hand(
            study_instance_uid,
            JobState.READY,
            "study_retried",
            who,
            reason,
            now,
            sources=frozenset({JobState.HELD, JobState.FAILED, JobState.EXCLUDED}),
            attempts=0,
            not_before=None,
        )

    def reprocess_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person wants a new report: a higher revision, screened again.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is being received, waits or is being screened.
        """
        self._by_hand(
            study_instance_uid,
            JobState.READY,
            "study_reprocessed",
            who,
            reason,
            now,
            sources=frozenset(
                {JobState.REPORTED, JobState.DELIVERED, JobState.EXCLUDED, JobState.HELD, JobState.FAILED}
            ),
            new_revision=True,
            attempts=0,
            not_before=None,
        )

    def _by_hand(
        self,
        study_instance_uid: str,
        state: JobState,
        event: str,
        who: str,
        reason: str,
        now: datetime | None,
        *,
        sources: frozenset[JobState] = frozenset(JobState),
        new_revision: bool = False,
        **values: Any,
    ) -> None:
        with self._writing() as connection:
            row = connection.execute(_of(study_instance_uid).with_for_update()).one_or_none()
            if row is None:
                raise KeyError(study_instance_uid)
            if row.state not in sources:
                raise IllegalTransition(f"{event}: the study is {row.state}")
            if new_revision:
                values["revision"] = row.revision + 1
            change_state(
                connection, row, state, who=who, event=event, reason=reason, now=now or utc_now(), **NO_LEASE, **values
            )


def _of(study_instance_uid: str) -> Any:
    return select(JobRow.__table__).where(
        JobRow.study_instance_uid == study_instance_uid, JobRow.kind == JobKind.SCREEN
    )


def _summary(row: Row[Any]) -> JobSummary:
    return JobSummary(
        job_id=row.job_id,
        study_instance_uid=row.study_instance_uid,
        state=row.state,
        revision=row.revision,
        attempts=row.attempts,
        source_ae=row.source_ae,
        instances=row.instances,
        code=row.code,
        detail=row.detail,
        not_before=row.not_before,
        first_received_at=row.first_received_at,
        last_received_at=row.last_received_at,
        changed_at=row.changed_at,
    )
