"""Outcomes: every way in which the holder of a claim ends it, each checked against its fencing token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.domain.observation import Observation, Scanner, observe
from osteo_daemon.jobs.claims import UNKNOWN_SCANNER, end_claim
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.observations import save_observation
from osteo_daemon.jobs.records import NewDelivery, ReportObject
from osteo_daemon.jobs.report_rows import save_delivery, save_object, save_result
from osteo_daemon.jobs.transitions import NO_CLAIM, change_state, claimed_row, utc_now


class Outcomes(Database):
    """What the screener writes."""

    def commit_report(
        self,
        job: Job,
        result: Mapping[str, Any],
        objects: Sequence[ReportObject],
        deliveries: Sequence[NewDelivery],
        *,
        scanner: Scanner = UNKNOWN_SCANNER,
        now: datetime | None = None,
    ) -> None:
        """SCREENING to REPORTED with result, report objects and delivery rows in one transaction.

        Without destinations the job stays REPORTED: nothing was delivered, and nobody should read that it was.

        Args:
            job: as claimed.
            result: the ``osteo-result/1`` document.
            objects: report objects, already durable in the spool.
            deliveries: one for each destination; sent in the order SEG, SR, SC.
            scanner: what acquired the screened series, for drift monitoring.
            now: the present, for tests.

        Raises:
            LeaseLost: another worker has the job or its study changed: nothing was written.
            ValueError: a delivery names an object that is not among ``objects``, or a known UID comes with other bytes.
        """
        now = now or utc_now()
        by_uid = _by_uid(objects, deliveries)
        with self._writing() as connection:
            row = claimed_row(connection, job)
            save_result(connection, job, result, now)
            save_observation(connection, job.job_id, job.priority, observe(result, scanner, now))
            for entry in objects:
                save_object(connection, job, entry)
            for delivery in deliveries:
                save_delivery(connection, job, delivery, by_uid, now)
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
                **NO_CLAIM,
            )

    def exclude(
        self,
        job: Job,
        code: str,
        reason: str,
        result: Mapping[str, Any],
        objects: Sequence[ReportObject] = (),
        deliveries: Sequence[NewDelivery] = (),
        *,
        scanner: Scanner = UNKNOWN_SCANNER,
        now: datetime | None = None,
    ) -> None:
        """SCREENING to EXCLUDED: not eligible, with a code of `domain.eligibility.ExclusionCode`.

        With deliveries the job goes on to REPORTED in the same transaction: somebody is to be told. Code and reason
        stay with it.

        Args:
            job: as claimed.
            code, reason: why.
            result: the ``osteo-result/1`` document.
            objects: reports of the exclusion, already durable in the spool.
            deliveries: one for each destination that is to be told.
            scanner: what acquired it, for drift monitoring.
            now: the present, for tests.

        Raises:
            LeaseLost: another worker has the job.
            ValueError: see `commit_report`.
        """
        now = now or utc_now()
        by_uid = _by_uid(objects, deliveries)
        with self._writing() as connection:
            row = claimed_row(connection, job)
            save_result(connection, job, result, now)
            save_observation(connection, job.job_id, job.priority, Observation(now, scanner, code))
            excluded = end_claim(connection, row, JobState.EXCLUDED, "study_excluded", code, reason, now)
            if not deliveries:
                return
            for entry in objects:
                save_object(connection, job, entry)
            for delivery in deliveries:
                save_delivery(connection, job, delivery, by_uid, now)
            told = f"exclusion for {len(deliveries)} destinations"
            change_state(
                connection, excluded, JobState.REPORTED, who=row.worker, event="report_committed", reason=told, now=now
            )

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
        self,
        job: Job,
        code: str,
        detail: str,
        not_before: datetime,
        *,
        charged: bool = True,
        now: datetime | None = None,
    ) -> None:
        """SCREENING to READY, not to be claimed before ``not_before``.

        Args:
            job: as claimed.
            code, detail: why.
            not_before: the next claim's earliest moment.
            charged: the attempt stays counted; False when the study is not to blame.
            now: the present, for tests.

        Raises:
            LeaseLost: another worker has the job.
        """
        with self._writing() as connection:
            row = claimed_row(connection, job)
            attempts = row.attempts if charged else max(row.attempts - 1, 0)
            values = {"not_before": not_before, "attempts": attempts}
            end_claim(connection, row, JobState.READY, "job_retry", code, detail, now or utc_now(), **values)

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
                **NO_CLAIM,
            )

    def _finish(self, job: Job, state: JobState, event: str, code: str, reason: str, now: datetime | None) -> None:
        with self._writing() as connection:
            end_claim(connection, claimed_row(connection, job), state, event, code, reason, now or utc_now())


def _by_uid(objects: Sequence[ReportObject], deliveries: Sequence[NewDelivery]) -> dict[str, ReportObject]:
    by_uid = {entry.sop_instance_uid: entry for entry in objects}
    for delivery in deliveries:
        if unknown := set(delivery.sop_instance_uids) - by_uid.keys():
            raise ValueError(f"{delivery.destination}: not among the report objects: {sorted(unknown)}")
    return by_uid
