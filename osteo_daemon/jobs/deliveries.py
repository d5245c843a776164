"""Deliveries: report objects on their way to a destination, claimed like jobs."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import insert, select, update

from osteo_daemon.jobs.breakers import Breakers
from osteo_daemon.jobs.commitments import STORED_UNPROVEN, Commitments, with_omissions
from osteo_daemon.jobs.delivery_queue import next_delivery
from osteo_daemon.jobs.delivery_rows import (
    SELECT_DELIVERIES,
    claimed,
    end_delivered,
    loaded,
    move,
    move_row,
    note,
    send_again,
    set_values,
    to_report_object,
    with_objects,
)
from osteo_daemon.jobs.records import Delivery, DeliveryState, HeldReport, ReportKind, ReportObject
from osteo_daemon.jobs.schema import DeliveryObjectRow, DeliveryRow, JobRow, ReportObjectRow
from osteo_daemon.jobs.transitions import utc_now

_EXPIRED_AT_ONCE = 500


class Deliveries(Commitments, Breakers):
    """The deliverer's side of the store."""

    def claim_delivery(
        self, worker: str, lease_seconds: float, *, destination: str | None = None, now: datetime | None = None
    ) -> Delivery | None:
        """Take the next delivery for ``lease_seconds``, only of ``destination`` when given.

        Urgent studies go first, as in screening; within a class the oldest. A destination gets the revisions of a study
        in order: a later one waits while an earlier one is on its way. A delivery whose wait for a proof is over is
        claimed like any other, and that is no attempt.

        Returns:
            The delivery in state SENDING under a new fencing token, or None when nothing waits.
        """
        now = now or utc_now()
        if self._sqlite:
            # an idle lane polls: it must not take the one write lock for that
            with self._reading() as connection:
                if next_delivery(connection, now, destination, lock=False) is None:
                    return None
        with self._writing() as connection:
            row = next_delivery(connection, now, destination, lock=True)
            if row is None:
                return None
            move_row(
                connection,
                row,
                DeliveryState.SENDING,
                now,
                attempts=row.attempts + (row.state is not DeliveryState.AWAITING),
                fencing_token=row.fencing_token + 1,
                worker=worker,
                lease_until=now + timedelta(seconds=lease_seconds),
            )
            return loaded(connection, row.delivery_id)

    def heartbeat_delivery(self, delivery: Delivery, lease_seconds: float, *, now: datetime | None = None) -> None:
        """Extend the lease from now.

        Raises:
            LeaseLost: another worker has the delivery: stop sending.
        """
        now = now or utc_now()
        with self._writing() as connection:
            claimed(connection, delivery)
            until = now + timedelta(seconds=lease_seconds)
            # the change's time too: it tells whether the clock was set back since the lease was written
            set_values(connection, delivery.delivery_id, lease_until=until, changed_at=now)

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
            claimed(connection, delivery)
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
            row = claimed(connection, delivery)
            present = loaded(connection, delivery.delivery_id)
            if present.unsent:
                raise ValueError(f"{present.unsent[0].sop_instance_uid} was not accepted by {delivery.destination}")
            end_delivered(connection, present, row.worker, outcome, now)

    def delivery_retry(
        self, delivery: Delivery, not_before: datetime, detail: str, *, now: datetime | None = None
    ) -> None:
        """Try again, not before ``not_before``.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed(connection, delivery)
            move(connection, delivery.delivery_id, DeliveryState.PENDING, now, not_before=not_before, detail=detail)
            note(connection, delivery, row.worker, "delivery_retry", detail, now)

    def delivery_refused(self, delivery: Delivery, detail: str, *, now: datetime | None = None) -> None:
        """Dead letter: the destination refused for good; the objects stay and the job stays REPORTED.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed(connection, delivery)
            move(connection, delivery.delivery_id, DeliveryState.REFUSED, now, outcome="refused", detail=detail)
            note(connection, delivery, row.worker, "delivery_refused", detail, now)

    def delivery_release(self, delivery: Delivery, *, now: datetime | None = None) -> None:
        """Give the claim back because the worker stops: the attempt is not counted.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed(connection, delivery)
            attempts = max(row.attempts - 1, 0)
            move(connection, delivery.delivery_id, DeliveryState.PENDING, now, attempts=attempts, detail=row.detail)

    def expire_deliveries(
        self,
        destination: str,
        created_before: datetime,
        detail: str,
        *,
        accept_unproven: bool = False,
        now: datetime | None = None,
    ) -> int:
        """Patience ends for what has waited since before ``created_before``; returns how many deliveries that were.

        What was never accepted becomes a dead letter; what was accepted and not proven becomes UNPROVEN, or DELIVERED
        where the site accepts that.
        """
        now = now or utc_now()
        query = (
            select(DeliveryRow.delivery_id)
            .where(
                DeliveryRow.destination == destination,
                DeliveryRow.state.in_((DeliveryState.PENDING, DeliveryState.AWAITING)),
                DeliveryRow.created_at < created_before,
            )
            .limit(_EXPIRED_AT_ONCE)
        )
        with self._reading() as connection:
            if connection.execute(query).first() is None:
                return 0
        with self._writing() as connection:
            identifiers = connection.execute(query.with_for_update(skip_locked=True)).scalars().all()
            for delivery_id in identifiers:
                delivery = loaded(connection, delivery_id)
                if accept_unproven and not delivery.unsent:
                    end_delivered(connection, delivery, "deliverer", with_omissions(delivery, STORED_UNPROVEN), now)
                    continue
                state, outcome, event = DeliveryState.UNPROVEN, "unproven", "delivery_unproven"
                if delivery.unsent:
                    state, outcome, event = DeliveryState.REFUSED, "refused", "delivery_refused"
                move(connection, delivery_id, state, now, outcome=outcome, detail=detail)
                note(connection, delivery, "deliverer", event, detail, now)
        return len(identifiers)

    def resend(self, delivery_id: int, who: str, *, now: datetime | None = None) -> Delivery:
        """Take a dead letter or an unproven delivery up again: every object, from the first attempt.

        Raises:
            KeyError: there is no such delivery, or it is neither.
        """
        now = now or utc_now()
        with self._writing() as connection:
            delivery = _ended_badly(loaded(connection, delivery_id))
            move(
                connection,
                delivery_id,
                DeliveryState.PENDING,
                now,
                attempts=0,
                outcome=None,
                created_at=now,
                proof_rounds=0,
                proof_questions=0,
            )
            send_again(connection, delivery_id)
            note(connection, delivery, who, "delivery_resend", "by hand", now)
            return loaded(connection, delivery_id)

    def accept_delivery(self, delivery_id: int, who: str, reason: str, *, now: datetime | None = None) -> Delivery:
        """A person says that a dead letter or an unproven delivery is settled: it counts as delivered.

        Raises:
            KeyError: there is no such delivery, or it is neither.
        """
        now = now or utc_now()
        with self._writing() as connection:
            delivery = _ended_badly(loaded(connection, delivery_id))
            note(connection, delivery, who, "delivery_accepted", reason, now)
            end_delivered(connection, delivery, who, f"accepted by hand, {delivery.outcome}", now)
            return loaded(connection, delivery_id)

    def held_report(self, delivery: Delivery) -> HeldReport | None:
        """The structured report that the destination accepted last of earlier revisions of the study, or None."""
        query = (
            select(ReportObjectRow.__table__)
            .join(DeliveryObjectRow, DeliveryObjectRow.sop_instance_uid == ReportObjectRow.sop_instance_uid)
            .join(DeliveryRow, DeliveryRow.delivery_id == DeliveryObjectRow.delivery_id)
            .where(
                DeliveryRow.job_id == delivery.job_id,
                DeliveryRow.destination == delivery.destination,
                DeliveryRow.revision < delivery.revision,
                ReportObjectRow.kind == ReportKind.SR,
                DeliveryObjectRow.status.like("0x%"),
            )
            .order_by(DeliveryRow.revision.desc(), DeliveryObjectRow.position)
            .limit(1)
        )
        with self._reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        report = to_report_object(row)
        return HeldReport(report.sop_instance_uid, report.path)

    def replace_unsent(self, delivery: Delivery, sop_instance_uid: str, report: ReportObject) -> None:
        """This destination gets ``report``, already durable in the spool, in the place of an object not yet sent.

        Raises:
            LeaseLost: another worker has the delivery.
            KeyError: the object is not part of it, or was sent.
        """
        with self._writing() as connection:
            claimed(connection, delivery)
            known = select(ReportObjectRow.sha256).where(ReportObjectRow.sop_instance_uid == report.sop_instance_uid)
            if connection.execute(known).scalar_one_or_none() is None:
                connection.execute(
                    insert(ReportObjectRow).values(
                        sop_instance_uid=report.sop_instance_uid,
                        job_id=delivery.job_id,
                        revision=delivery.revision,
                        kind=report.kind,
                        variant=report.variant,
                        sop_class_uid=report.sop_class_uid,
                        path=str(report.path),
                        size_bytes=report.size_bytes,
                        sha256=report.sha256,
                    )
                )
            changed = connection.execute(
                update(DeliveryObjectRow)
                .where(
                    DeliveryObjectRow.delivery_id == delivery.delivery_id,
                    DeliveryObjectRow.sop_instance_uid == sop_instance_uid,
                    DeliveryObjectRow.status.is_(None),
                )
                .values(sop_instance_uid=report.sop_instance_uid)
            )
            if changed.rowcount != 1:
                raise KeyError(sop_instance_uid)

    def delivery(self, delivery_id: int) -> Delivery:
        """One delivery.

        Raises:
            KeyError: there is none.
        """
        with self._reading() as connection:
            return loaded(connection, delivery_id)

    def deliveries(
        self,
        *,
        state: DeliveryState | None = None,
        states: Collection[DeliveryState] = (),
        destination: str | None = None,
        study_instance_uid: str | None = None,
        before_delivery_id: int | None = None,
        limit: int = 100,
    ) -> list[Delivery]:
        """Deliveries, newest first; ``before_delivery_id`` pages on."""
        query = SELECT_DELIVERIES.order_by(DeliveryRow.delivery_id.desc()).limit(limit)
        if destination is not None:
            query = query.where(DeliveryRow.destination == destination)
        if before_delivery_id is not None:
            query = query.where(DeliveryRow.delivery_id < before_delivery_id)
        if study_instance_uid is not None:
            query = query.where(JobRow.study_instance_uid == study_instance_uid)
        # a query for each state: for "IN" every delivery in those states would be sorted
        wanted = {*states} if state is None else {*states, state}
        queries = [query.where(DeliveryRow.state == one) for one in wanted] or [query]
        with self._reading() as connection:
            rows = [row for one in queries for row in connection.execute(one)]
            rows.sort(key=lambda row: row.delivery_id, reverse=True)
            return with_objects(connection, rows[:limit])


def _ended_badly(delivery: Delivery) -> Delivery:
    if delivery.state not in (DeliveryState.REFUSED, DeliveryState.UNPROVEN):
        raise KeyError(delivery.delivery_id)
    return delivery
