"""Claims: lease, heartbeat, fencing token, and every way in which a claimed job can end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, insert, or_, select, update

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.errors import LeaseLost
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.schema import DeliveryObjectRow, DeliveryRow, JobRow, ReportObjectRow, ResultRow
from osteo_daemon.jobs.transitions import NO_LEASE, change_state, claimed_row, to_job, utc_now

ATTEMPTS_SPENT = "attempts_spent"
"""Code of a job that failed as often as it may."""

_SENDING_ORDER = tuple(ReportKind)


class Claims(Database):
    """The screener's side of the store."""

    def claim(
        self, worker: str, lease_seconds: float, maximum_attempts: int = 3, *, now: datetime | None = None
    ) -> Job | None:
        """Take the next job for ``lease_seconds``; the attempt counts from here.

        Jobs whose lease ran out are taken back first. A job that has spent its attempts becomes FAILED: a study that
        kills its worker ends there, not in a loop.

        Returns:
            The job in state SCREENING under a new fencing token, or None when nothing waits.
        """
        now = now or utc_now()
        if not self._anything_waits(now):
            return None
        with self._writing() as connection:
            _take_back(connection, now)
            while (row := connection.execute(_next_ready(now).with_for_update(skip_locked=True)).first()) is not None:
                if row.attempts >= maximum_attempts:
                    _spend(connection, row, worker, maximum_attempts, now)
                    continue
                change_state(
                    connection,
                    row,
                    JobState.SCREENING,
                    who=worker,
                    event="job_claimed",
                    reason=f"attempt {row.attempts + 1}",
                    now=now,
                    attempts=row.attempts + 1,
                    fencing_token=row.fencing_token + 1,
                    worker=worker,
                    lease_until=now + timedelta(seconds=lease_seconds),
                    not_before=None,
                )
                return to_job(connection.execute(select(JobRow.__table__).where(JobRow.job_id == row.job_id)).one())
        return None

    def take_back_expired(self, *, now: datetime | None = None) -> int:
        """SCREENING to READY for jobs whose lease ran out; returns how many."""
        now = now or utc_now()
        with self._reading() as connection:
            if connection.execute(_expired(now).limit(1)).first() is None:
                return 0
        with self._writing() as connection:
            return _take_back(connection, now)

    def heartbeat(self, job: Job, lease_seconds: float, *, now: datetime | None = None) -> None:
        """Extend the lease from now.

        Raises:
            LeaseLost: the job is no longer this worker's: drop the work.
        """
        now = now or utc_now()
        with self._writing() as connection:
            changed = connection.execute(
                update(JobRow)
                .where(
                    JobRow.job_id == job.job_id,
                    JobRow.state == JobState.SCREENING,
                    JobRow.fencing_token == job.fencing_token,
                )
                .values(lease_until=now + timedelta(seconds=lease_seconds))
            )
            if changed.rowcount != 1:
                raise LeaseLost(f"job {job.job_id}, fencing token {job.fencing_token}")

    def commit_report(
        self,
        job: Job,
        result: Mapping[str, Any],
        objects: Sequence[ReportObject],
        deliveries: Sequence[NewDelivery],
        *,
        now: datetime | None = None,
    ) -> None:
        """SCREENING to REPORTED with result, report objects and delivery rows in one transaction.

        Without destinations the job stays REPORTED: nothing was delivered, and nobody should read that it was.

        Args:
            job: as claimed.
            result: the ``osteo-result/1`` document.
            objects: report objects, already durable in the spool.
            deliveries: one for each destination; sent in the order SEG, SR, SC.

        Raises:
            LeaseLost: another worker has the job or its study changed: nothing was written.
            ValueError: a delivery names an object that is not among ``objects``, or a known UID comes with other bytes.
        """
        now = now or utc_now()
        by_uid = {entry.sop_instance_uid: entry for entry in objects}
        for delivery in deliveries:
            if unknown := set(delivery.sop_instance_uids) - by_uid.keys():
                raise ValueError(f"{delivery.destination}: not among the report objects: {sorted(unknown)}")
        with self._writing() as connection:
            row = claimed_row(connection, job)
            _save_result(connection, job, result, now)
            for entry in objects:
                _save_object(connection, job, entry)
            for delivery in deliveries:
                _save_delivery(connection, job, delivery, by_uid, now)
            change_state(
                connection,
                row,
                JobState.REPORTED,
                who=row.worker,
                event="report_committed",
                reason=f"{len(objects)} objects for {len(deliveries)} destinations",
                now=now,
                code=None,
                detail=None,
                **NO_LEASE,
            )

    def exclude(
        self, job: Job, code: str, reason: str, result: Mapping[str, Any], *, now: datetime | None = None
    ) -> None:
        """SCREENING to EXCLUDED: not eligible, with a code of `domain.eligibility.ExclusionCode`.

        Raises:
            LeaseLost: another worker has the job.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed_row(connection, job)
            _save_result(connection, job, result, now)
            _end(connection, row, JobState.EXCLUDED, "study_excluded", code, reason, now)

    def hold(self, job: Job, code: str, reason: str, *, now: datetime | None = None) -> None:
        """SCREENING to HELD: what was received cannot be used; every byte stays.

        Raises:
            LeaseLost: another worker has the job.
        """
        self._finish(job, JobState.HELD, "study_held", code, reason, now)

    def fail(self, job: Job, code: str, reason: str, *, now: datetime | None = None) -> None:
        """SCREENING to FAILED for good, whatever attempts remain.

        Raises:
            LeaseLost: another worker has the job.
        """
        self._finish(job, JobState.FAILED, "job_failed", code, reason, now)

    def retry_later(
        self, job: Job, code: str, detail: str, not_before: datetime, *, now: datetime | None = None
    ) -> None:
        """SCREENING to READY, not to be claimed before ``not_before``; the attempt stays counted.

        Raises:
            LeaseLost: another worker has the job.
        """
        self._finish(job, JobState.READY, "job_retry", code, detail, now, not_before=not_before)

    def release(self, job: Job, *, now: datetime | None = None) -> None:
        """SCREENING to READY because the worker stops, not because the study is hard: the attempt is not counted.

        Raises:
            LeaseLost: another worker has the job.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed_row(connection, job)
            change_state(
                connection,
                row,
                JobState.READY,
                who=row.worker,
                event="lease_released",
                reason="the worker stops",
                now=now,
                attempts=max(row.attempts - 1, 0),
                **NO_LEASE,
            )

    def _finish(
        self, job: Job, state: JobState, event: str, code: str, reason: str, now: datetime | None, **values: Any
    ) -> None:
        with self._writing() as connection:
            _end(connection, claimed_row(connection, job), state, event, code, reason, now or utc_now(), **values)

    def _anything_waits(self, now: datetime) -> bool:
        # an idle worker polls: it must not take the write lock for that
        with self._reading() as connection:
            return any(
                connection.execute(query.limit(1)).first() is not None for query in (_next_ready(now), _expired(now))
            )


def _next_ready(now: datetime) -> Any:
    return (
        select(JobRow.__table__)
        .where(JobRow.state == JobState.READY, or_(JobRow.not_before.is_(None), JobRow.not_before <= now))
        .order_by(JobRow.priority, JobRow.job_id)
        .limit(1)
    )


def _expired(now: datetime) -> Any:
    return select(JobRow.__table__).where(JobRow.state == JobState.SCREENING, JobRow.lease_until < now)


def _take_back(connection: Connection, now: datetime) -> int:
    rows = connection.execute(_expired(now).with_for_update(skip_locked=True)).all()
    for row in rows:
        reason = f"no heartbeat from {row.worker}"
        change_state(
            connection, row, JobState.READY, who="store", event="lease_expired", reason=reason, now=now, **NO_LEASE
        )
    return len(rows)


def _spend(connection: Connection, row: Row[Any], worker: str, maximum_attempts: int, now: datetime) -> None:
    last = f"; last: {row.code}: {row.detail}" if row.code else "; the worker ended without a word"
    _end(
        connection,
        row,
        JobState.FAILED,
        "job_failed",
        ATTEMPTS_SPENT,
        f"{row.attempts} of {maximum_attempts} attempts{last}",
        now,
        who=worker,
    )


def _end(
    connection: Connection,
    row: Row[Any],
    state: JobState,
    event: str,
    code: str,
    reason: str,
    now: datetime,
    *,
    who: str | None = None,
    not_before: datetime | None = None,
) -> None:
    change_state(
        connection,
        row,
        state,
        who=who or row.worker,
        event=event,
        reason=f"{code}: {reason}",
        now=now,
        code=code,
        detail=reason,
        not_before=not_before,
        **NO_LEASE,
    )


def _save_result(connection: Connection, job: Job, result: Mapping[str, Any], now: datetime) -> None:
    key = (ResultRow.job_id == job.job_id, ResultRow.revision == job.revision)
    values = {"document": dict(result), "created_at": now}
    # a revision that was screened again (a retry after an exclusion) keeps its latest result; events keep the history
    if connection.execute(update(ResultRow).where(*key).values(**values)).rowcount == 0:
        connection.execute(insert(ResultRow).values(job_id=job.job_id, revision=job.revision, **values))


def _save_object(connection: Connection, job: Job, entry: ReportObject) -> None:
    known = connection.execute(
        select(ReportObjectRow.sha256).where(ReportObjectRow.sop_instance_uid == entry.sop_instance_uid)
    ).scalar_one_or_none()
    if known is not None:
        if known != entry.sha256:
            raise ValueError(f"report object {entry.sop_instance_uid} is already committed with other bytes")
        return
    connection.execute(
        insert(ReportObjectRow).values(
            sop_instance_uid=entry.sop_instance_uid,
            job_id=job.job_id,
            revision=job.revision,
            kind=entry.kind,
            variant=entry.variant,
            sop_class_uid=entry.sop_class_uid,
            path=str(entry.path),
            size_bytes=entry.size_bytes,
            sha256=entry.sha256,
        )
    )


def _save_delivery(
    connection: Connection, job: Job, delivery: NewDelivery, by_uid: Mapping[str, ReportObject], now: datetime
) -> None:
    delivery_id = connection.execute(
        insert(DeliveryRow)
        .values(
            job_id=job.job_id,
            revision=job.revision,
            destination=delivery.destination,
            state=DeliveryState.PENDING,
            attempts=0,
            fencing_token=0,
            created_at=now,
            changed_at=now,
        )
        .returning(DeliveryRow.delivery_id)
    ).scalar_one()
    ordered = sorted(delivery.sop_instance_uids, key=lambda uid: _SENDING_ORDER.index(by_uid[uid].kind))
    for position, uid in enumerate(ordered):
        connection.execute(
            insert(DeliveryObjectRow).values(delivery_id=delivery_id, sop_instance_uid=uid, position=position)
        )
