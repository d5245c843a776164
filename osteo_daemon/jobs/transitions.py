"""The one function through which a job changes state, with its event row in the same transaction."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.domain.job import TRANSITIONS, Job, JobKind, JobState, Priority
from osteo_daemon.errors import IllegalTransition, LeaseLost
from osteo_daemon.jobs.counts import count_jobs
from osteo_daemon.jobs.schema import EventRow, JobRow

NO_LEASE: dict[str, Any] = {"worker": None, "lease_until": None}
"""Column values of a delivery that nobody works on."""

NO_CLAIM: dict[str, Any] = {**NO_LEASE, "claimed_at": None, "deadline": None}
"""Column values of a job that nobody works on."""


CLOCK_STEP = timedelta(seconds=60)
"""A time this far in the future was written by a clock that has been set back since."""


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


def change_state(
    connection: Connection,
    job: Row[Any],
    state: JobState,
    *,
    who: str,
    event: str,
    reason: str,
    now: datetime,
    **values: Any,
) -> Row[Any]:
    """Move a job to ``state``, set ``values`` and write the event row; returns the job's row as it is now.

    Args:
        connection: an open writing transaction.
        job: the job's row as read in this transaction.
        state: where it goes.
        who: worker, sender or operator.
        event: slug of what happened.
        reason: one line for people, without patient identity.
        now: the present.
        values: further columns of `JobRow`.

    Raises:
        IllegalTransition: not in `domain.job.TRANSITIONS`.
        LeaseLost: the row changed since it was read.
    """
    if state not in TRANSITIONS[job.state]:
        raise IllegalTransition(f"{job.state} to {state} (job {job.job_id})")
    changed = connection.execute(
        update(JobRow)
        .where(JobRow.job_id == job.job_id, JobRow.state == job.state, JobRow.fencing_token == job.fencing_token)
        .values(state=state, changed_at=now, **values)
        .returning(JobRow.__table__)
    ).one_or_none()
    if changed is None:
        raise LeaseLost(f"job {job.job_id}")
    count_jobs(connection, {job.state: -1, state: 1})
    add_event(
        connection,
        study_instance_uid=job.study_instance_uid,
        job_id=job.job_id,
        now=now,
        who=who,
        event=event,
        reason=reason,
        revision=values.get("revision", job.revision),
        from_state=job.state,
        to_state=state,
    )
    return changed


def add_event(
    connection: Connection,
    *,
    study_instance_uid: str,
    job_id: int | None,
    now: datetime,
    who: str,
    event: str,
    reason: str,
    revision: int,
    from_state: JobState | None = None,
    to_state: JobState | None = None,
) -> None:
    """Write one event row."""
    connection.execute(
        insert(EventRow).values(
            study_instance_uid=study_instance_uid,
            job_id=job_id,
            at=now,
            who=who,
            event=event,
            from_state=from_state,
            to_state=to_state,
            revision=revision,
            reason=reason,
        )
    )


def screening_job(study_instance_uid: str) -> Any:
    """The query of a study's screening job, its row locked."""
    return (
        select(JobRow.__table__)
        .where(JobRow.study_instance_uid == study_instance_uid, JobRow.kind == JobKind.SCREEN)
        .with_for_update()
    )


def claimed_row(connection: Connection, job: Job) -> Row[Any]:
    """The row of a claimed job.

    Raises:
        LeaseLost: the job is no longer screened under this claim's fencing token.
    """
    row = connection.execute(
        select(JobRow.__table__).where(JobRow.job_id == job.job_id).with_for_update()
    ).one_or_none()
    if row is None or row.state is not JobState.SCREENING or row.fencing_token != job.fencing_token:
        raise LeaseLost(f"job {job.job_id}, fencing token {job.fencing_token}")
    return row


def to_job(row: Row[Any]) -> Job:
    """A row of `JobRow` as the domain's value."""
    return Job(
        job_id=row.job_id,
        kind=row.kind,
        study_instance_uid=row.study_instance_uid,
        state=row.state,
        revision=row.revision,
        attempts=row.attempts,
        fencing_token=row.fencing_token,
        lease_until=row.lease_until,
        not_before=row.not_before,
        priority=Priority(row.priority),
        claimed_at=row.claimed_at,
        deadline=row.deadline,
        localizer_bundle=row.localizer_bundle,
        network_bundle=row.network_bundle,
        lacks=None if row.lacks is None else Lacks(row.lacks),
    )
