"""Rows of deliveries: how they are read, and the steps that several transactions share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, select, update

from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import IllegalTransition, LeaseLost
from osteo_daemon.jobs.counts import count_deliveries
from osteo_daemon.jobs.records import DELIVERY_TRANSITIONS, Delivery, DeliveryObject, DeliveryState, ReportObject
from osteo_daemon.jobs.schema import DeliveryObjectRow, DeliveryRow, JobRow, ReportObjectRow
from osteo_daemon.jobs.transitions import NO_LEASE, add_event, change_state

# put together once, and with the columns that are used: both take longer than the query
SELECT_DELIVERIES: Any = select(
    DeliveryRow.delivery_id,
    DeliveryRow.job_id,
    DeliveryRow.revision,
    DeliveryRow.destination,
    DeliveryRow.state,
    DeliveryRow.attempts,
    DeliveryRow.fencing_token,
    DeliveryRow.created_at,
    DeliveryRow.not_before,
    DeliveryRow.outcome,
    DeliveryRow.detail,
    DeliveryRow.proof_rounds,
    DeliveryRow.proof_questions,
    JobRow.study_instance_uid,
).join(JobRow, JobRow.job_id == DeliveryRow.job_id)
"""The query of deliveries with their study, to be narrowed down and read by `with_objects`."""

_SELECT_OBJECTS: Any = (
    select(
        ReportObjectRow.kind,
        ReportObjectRow.sop_class_uid,
        ReportObjectRow.sop_instance_uid,
        ReportObjectRow.path,
        ReportObjectRow.size_bytes,
        ReportObjectRow.sha256,
        ReportObjectRow.variant,
        DeliveryObjectRow.delivery_id,
        DeliveryObjectRow.status,
        DeliveryObjectRow.proof,
    )
    .join(DeliveryObjectRow, DeliveryObjectRow.sop_instance_uid == ReportObjectRow.sop_instance_uid)
    .order_by(DeliveryObjectRow.delivery_id, DeliveryObjectRow.position)
)


def claimed(connection: Connection, delivery: Delivery) -> Row[Any]:
    """The row of a claimed delivery.

    Raises:
        LeaseLost: it is no longer sent under this claim's fencing token.
    """
    row = connection.execute(
        select(DeliveryRow.__table__).where(DeliveryRow.delivery_id == delivery.delivery_id).with_for_update()
    ).one_or_none()
    if row is None or row.state is not DeliveryState.SENDING or row.fencing_token != delivery.fencing_token:
        raise LeaseLost(f"delivery {delivery.delivery_id}, fencing token {delivery.fencing_token}")
    return row


def set_values(connection: Connection, delivery_id: int, **values: Any) -> None:
    """Change columns of `DeliveryRow`."""
    connection.execute(update(DeliveryRow).where(DeliveryRow.delivery_id == delivery_id).values(**values))


def move(connection: Connection, delivery_id: int, state: DeliveryState, now: datetime, **values: Any) -> None:
    """To another state, without lease unless ``values`` bring one.

    Raises:
        IllegalTransition: not in `DELIVERY_TRANSITIONS`.
    """
    present = select(DeliveryRow.delivery_id, DeliveryRow.destination, DeliveryRow.state)
    row = connection.execute(present.where(DeliveryRow.delivery_id == delivery_id).with_for_update()).one()
    move_row(connection, row, state, now, **values)


def move_row(connection: Connection, row: Any, state: DeliveryState, now: datetime, **values: Any) -> None:
    """As `move`, for a row that this transaction has read and locked."""
    if row.state is not state:
        if state not in DELIVERY_TRANSITIONS[row.state]:
            raise IllegalTransition(f"{row.state} to {state} (delivery {row.delivery_id})")
        count_deliveries(connection, {(row.destination, row.state): -1, (row.destination, state): 1})
    set_values(connection, row.delivery_id, state=state, changed_at=now, **{**NO_LEASE, "not_before": None, **values})


def send_again(connection: Connection, delivery_id: int, sop_instance_uids: frozenset[str] | None = None) -> None:
    """Forget answers and proofs of these objects, or of all: a deliverer sends them anew."""
    mine = update(DeliveryObjectRow).where(DeliveryObjectRow.delivery_id == delivery_id)
    if sop_instance_uids is not None:
        mine = mine.where(DeliveryObjectRow.sop_instance_uid.in_(sop_instance_uids))
    connection.execute(mine.values(status=None, sent_at=None, proof=None, proved_at=None))


def end_delivered(connection: Connection, delivery: Delivery, who: str, outcome: str, now: datetime) -> None:
    """DELIVERED; the job too, with the last delivery of its present revision."""
    move(connection, delivery.delivery_id, DeliveryState.DELIVERED, now, outcome=outcome, detail=None)
    job = note(connection, delivery, who, "delivery_done", outcome, now)
    if job.state is not JobState.REPORTED or job.revision != delivery.revision:
        return
    others = select(DeliveryRow.delivery_id).where(
        DeliveryRow.job_id == job.job_id,
        DeliveryRow.revision == job.revision,
        DeliveryRow.state != DeliveryState.DELIVERED,
    )
    if connection.execute(others).first() is None:
        reason = "every destination has the report"
        change_state(connection, job, JobState.DELIVERED, who=who, event="job_delivered", reason=reason, now=now)


def note(connection: Connection, delivery: Delivery, who: str, event: str, detail: str, now: datetime) -> Row[Any]:
    """Write an event row of the delivery's study; gives the job's row."""
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


def load(connection: Connection, delivery_id: int) -> Delivery | None:
    """A delivery with its objects in the order of sending, None when there is none."""
    return next(iter(load_all(connection, [delivery_id])), None)


def load_all(connection: Connection, delivery_ids: Sequence[int]) -> list[Delivery]:
    """Those deliveries that there are, in this order: two queries, however many."""
    rows = connection.execute(SELECT_DELIVERIES.where(DeliveryRow.delivery_id.in_(delivery_ids))).all()
    found = {delivery.delivery_id: delivery for delivery in with_objects(connection, rows)}
    return [found[delivery_id] for delivery_id in delivery_ids if delivery_id in found]


def with_objects(connection: Connection, rows: Sequence[Row[Any]]) -> list[Delivery]:
    """Rows of `SELECT_DELIVERIES` as values."""
    objects: dict[int, list[DeliveryObject]] = {row.delivery_id: [] for row in rows}
    for entry in connection.execute(_SELECT_OBJECTS.where(DeliveryObjectRow.delivery_id.in_(list(objects)))):
        objects[entry.delivery_id].append(DeliveryObject(to_report_object(entry), entry.status, entry.proof))
    return [_to_delivery(row, objects[row.delivery_id]) for row in rows]


def loaded(connection: Connection, delivery_id: int) -> Delivery:
    """As `load`, for a row that is known to exist.

    Raises:
        KeyError: there is no such delivery.
    """
    delivery = load(connection, delivery_id)
    if delivery is None:
        raise KeyError(delivery_id)
    return delivery


def _to_delivery(row: Row[Any], objects: Sequence[DeliveryObject]) -> Delivery:
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
        objects=tuple(objects),
        outcome=row.outcome,
        detail=row.detail,
        proof_rounds=row.proof_rounds,
        proof_questions=row.proof_questions,
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
