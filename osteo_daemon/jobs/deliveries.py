"""Deliveries: report objects on their way to a destination, claimed like jobs."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, and_, exists, or_, select, update
from sqlalchemy.orm import aliased

from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import LeaseLost
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import Delivery, DeliveryObject, DeliveryState, ReportObject
from osteo_daemon.jobs.schema import DeliveryObjectRow, DeliveryRow, JobRow, ReportObjectRow
from osteo_daemon.jobs.transitions import NO_LEASE, add_event, change_state, utc_now


class Deliveries(Database):
    """The deliverer's side of the store."""

    def claim_delivery(
        self, worker: str, lease_seconds: float, *, destination: str | None = None, now: datetime | None = None
    ) -> Delivery | None:
        """Take the next delivery for ``lease_seconds``, only of ``destination`` when given.

        A destination gets the revisions of a study in order: a later one waits while an earlier one is on its way.

        Returns:
            The delivery in state SENDING under a new fencing token, or None when nothing waits.
        """
        now = now or utc_now()
        query = _next_delivery(now, destination)
        with self._reading() as connection:
            if connection.execute(query).first() is None:
                return None
        with self._writing() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            connection.execute(
                update(DeliveryRow)
                .where(DeliveryRow.delivery_id == row.delivery_id)
                .values(
                    state=DeliveryState.SENDING,
                    attempts=row.attempts + 1,
                    fencing_token=row.fencing_token + 1,
                    worker=worker,
                    lease_until=now + timedelta(seconds=lease_seconds),
                    not_before=None,
                    changed_at=now,
                )
            )
            return _load(connection, row.delivery_id)

    def heartbeat_delivery(self, delivery: Delivery, lease_seconds: float, *, now: datetime | None = None) -> None:
        """Extend the lease from now.

        Raises:
            LeaseLost: another worker has the delivery: stop sending.
        """
        now = now or utc_now()
        with self._writing() as connection:
            _claimed(connection, delivery)
            _set(connection, delivery, lease_until=now + timedelta(seconds=lease_seconds))

    def delivery_object_sent(
        self, delivery: Delivery, sop_instance_uid: str, status: str, *, now: datetime | None = None
    ) -> None:
        """The destination accepted one object with ``status`` (for instance ``0x0000``): a retry skips it.

        Raises:
            LeaseLost: another worker has the delivery.
            KeyError: the object is not part of it.
        """
        now = now or utc_now()
        with self._writing() as connection:
            _claimed(connection, delivery)
            changed = connection.execute(
                update(DeliveryObjectRow)
                .where(
                    DeliveryObjectRow.delivery_id == delivery.delivery_id,
                    DeliveryObjectRow.sop_instance_uid == sop_instance_uid,
                )
                .values(status=status, sent_at=now)
            )
            if changed.rowcount != 1:
                raise KeyError(sop_instance_uid)

    def delivery_done(self, delivery: Delivery, outcome: str, *, now: datetime | None = None) -> None:
        """The destination has every object; ``outcome`` tells how that is known (``stored``, ``committed``, ...).

        The job becomes DELIVERED with the last delivery of its present revision.

        Raises:
            LeaseLost: another worker has the delivery.
            ValueError: an object was not yet accepted.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = _claimed(connection, delivery)
            waiting = select(DeliveryObjectRow.sop_instance_uid).where(
                DeliveryObjectRow.delivery_id == delivery.delivery_id, DeliveryObjectRow.status.is_(None)
            )
            if (missing := connection.execute(waiting).scalars().first()) is not None:
                raise ValueError(f"{missing} was not accepted by {delivery.destination}")
            _end(connection, delivery, DeliveryState.DELIVERED, now, outcome=outcome, detail=None)
            job = _note(connection, delivery, row.worker, "delivery_done", outcome, now)
            if (
                job.state is JobState.REPORTED
                and job.revision == delivery.revision
                and not _undelivered(connection, job)
            ):
                change_state(
                    connection,
                    job,
                    JobState.DELIVERED,
                    who=row.worker,
                    event="job_delivered",
                    reason="every destination has the report",
                    now=now,
                )

    def delivery_retry(
        self, delivery: Delivery, not_before: datetime, detail: str, *, now: datetime | None = None
    ) -> None:
        """Try again, not before ``not_before``.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = _claimed(connection, delivery)
            _end(connection, delivery, DeliveryState.PENDING, now, not_before=not_before, detail=detail)
            _note(connection, delivery, row.worker, "delivery_retry", detail, now)

    def delivery_refused(self, delivery: Delivery, detail: str, *, now: datetime | None = None) -> None:
        """Dead letter: the destination refused for good; the objects stay and the job stays REPORTED.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = _claimed(connection, delivery)
            _end(connection, delivery, DeliveryState.REFUSED, now, outcome="refused", detail=detail)
            _note(connection, delivery, row.worker, "delivery_refused", detail, now)

    def delivery_release(self, delivery: Delivery, *, now: datetime | None = None) -> None:
        """Give the claim back because the worker stops: the attempt is not counted.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = _claimed(connection, delivery)
            _end(connection, delivery, DeliveryState.PENDING, now, attempts=max(row.attempts - 1, 0))

    def resend(self, delivery_id: int, who: str, *, now: datetime | None = None) -> Delivery:
        """Take a dead letter up again: every object, from the first attempt.

        Raises:
            KeyError: there is no such dead letter.
        """
        now = now or utc_now()
        with self._writing() as connection:
            changed = connection.execute(
                update(DeliveryRow)
                .where(DeliveryRow.delivery_id == delivery_id, DeliveryRow.state == DeliveryState.REFUSED)
                .values(
                    state=DeliveryState.PENDING,
                    attempts=0,
                    not_before=None,
                    outcome=None,
                    created_at=now,
                    changed_at=now,
                )
            )
            if changed.rowcount != 1:
                raise KeyError(delivery_id)
            connection.execute(
                update(DeliveryObjectRow)
                .where(DeliveryObjectRow.delivery_id == delivery_id)
                .values(status=None, sent_at=None)
            )
            delivery = _load(connection, delivery_id)
            _note(connection, delivery, who, "delivery_resend", "by hand", now)
            return delivery

    def deliveries(
        self,
        *,
        state: DeliveryState | None = None,
        study_instance_uid: str | None = None,
        limit: int = 100,
    ) -> list[Delivery]:
        """Deliveries, newest first."""
        query = select(DeliveryRow.delivery_id).order_by(DeliveryRow.delivery_id.desc()).limit(limit)
        if state is not None:
            query = query.where(DeliveryRow.state == state)
        if study_instance_uid is not None:
            query = query.join(JobRow, JobRow.job_id == DeliveryRow.job_id).where(
                JobRow.study_instance_uid == study_instance_uid
            )
        with self._reading() as connection:
            return [_load(connection, delivery_id) for delivery_id in connection.execute(query).scalars()]


def _next_delivery(now: datetime, destination: str | None) -> Any:
    earlier = aliased(DeliveryRow)
    blocked = exists().where(
        earlier.job_id == DeliveryRow.job_id,
        earlier.destination == DeliveryRow.destination,
        earlier.revision < DeliveryRow.revision,
        earlier.state.in_((DeliveryState.PENDING, DeliveryState.SENDING)),
    )
    query = (
        select(DeliveryRow.__table__)
        .where(
            or_(
                and_(
                    DeliveryRow.state == DeliveryState.PENDING,
                    or_(DeliveryRow.not_before.is_(None), DeliveryRow.not_before <= now),
                ),
                and_(DeliveryRow.state == DeliveryState.SENDING, DeliveryRow.lease_until < now),
            ),
            ~blocked,
        )
        .order_by(DeliveryRow.delivery_id)
        .limit(1)
    )
    return query if destination is None else query.where(DeliveryRow.destination == destination)


def _claimed(connection: Connection, delivery: Delivery) -> Row[Any]:
    row = connection.execute(
        select(DeliveryRow.__table__).where(DeliveryRow.delivery_id == delivery.delivery_id).with_for_update()
    ).one_or_none()
    if row is None or row.state is not DeliveryState.SENDING or row.fencing_token != delivery.fencing_token:
        raise LeaseLost(f"delivery {delivery.delivery_id}, fencing token {delivery.fencing_token}")
    return row


def _set(connection: Connection, delivery: Delivery, **values: Any) -> None:
    connection.execute(update(DeliveryRow).where(DeliveryRow.delivery_id == delivery.delivery_id).values(**values))


def _end(connection: Connection, delivery: Delivery, state: DeliveryState, now: datetime, **values: Any) -> None:
    _set(connection, delivery, state=state, changed_at=now, **NO_LEASE, **values)


def _undelivered(connection: Connection, job: Row[Any]) -> bool:
    others = select(DeliveryRow.delivery_id).where(
        DeliveryRow.job_id == job.job_id,
        DeliveryRow.revision == job.revision,
        DeliveryRow.state != DeliveryState.DELIVERED,
    )
    return connection.execute(others).first() is not None


def _note(connection: Connection, delivery: Delivery, who: str, event: str, detail: str, now: datetime) -> Row[Any]:
    job = connection.execute(select(JobRow.__table__).where(JobRow.job_id == delivery.job_id).with_for_update()).one()
    add_event(
        connection,
        study_instance_uid=job.study_instance_uid,
        job_id=job.job_id,
        now=now,
        who=who,
        event=event,
        reason=f"{delivery.destination}: {detail}",
        revision=delivery.revision,
    )
    return job


def _load(connection: Connection, delivery_id: int) -> Delivery:
    row = connection.execute(
        select(DeliveryRow.__table__, JobRow.study_instance_uid)
        .join(JobRow, JobRow.job_id == DeliveryRow.job_id)
        .where(DeliveryRow.delivery_id == delivery_id)
    ).one()
    objects = connection.execute(
        select(ReportObjectRow.__table__, DeliveryObjectRow.status)
        .join(DeliveryObjectRow, DeliveryObjectRow.sop_instance_uid == ReportObjectRow.sop_instance_uid)
        .where(DeliveryObjectRow.delivery_id == delivery_id)
        .order_by(DeliveryObjectRow.position)
    ).all()
    return Delivery(
        delivery_id=row.delivery_id,
        job_id=row.job_id,
        study_instance_uid=row.study_instance_uid,
        revision=row.revision,
        destination=row.destination,
        state=row.state,
        attempts=row.attempts,
        fencing_token=row.fencing_token,
        created_at=row.created_at,
        not_before=row.not_before,
        objects=tuple(DeliveryObject(to_report_object(entry), entry.status) for entry in objects),
        outcome=row.outcome,
        detail=row.detail,
    )


def to_report_object(row: Row[Any]) -> ReportObject:
    """A row of `ReportObjectRow` as a value."""
    return ReportObject(
        kind=row.kind,
        sop_class_uid=row.sop_class_uid,
        sop_instance_uid=row.sop_instance_uid,
        path=Path(row.path),
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        variant=row.variant,
    )
