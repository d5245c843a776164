"""Rows that a finished screening leaves: its result, its report objects, and the deliveries that wait."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from osteo_daemon.domain.job import Job
from osteo_daemon.jobs.counts import count_deliveries
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.schema import DeliveryObjectRow, DeliveryRow, ReportObjectRow, ResultRow

_SENDING_ORDER = tuple(ReportKind)


def save_result(connection: Connection, job: Job, result: Mapping[str, Any], now: datetime) -> None:
    """Keep the result of the job's revision."""
    key = (ResultRow.job_id == job.job_id, ResultRow.revision == job.revision)
    values = {"document": dict(result), "created_at": now}
    # a revision that was screened again (a retry after an exclusion) keeps its latest result; events keep the history
    if connection.execute(update(ResultRow).where(*key).values(**values)).rowcount == 0:
        connection.execute(insert(ResultRow).values(job_id=job.job_id, revision=job.revision, **values))


def save_object(connection: Connection, job: Job, entry: ReportObject) -> None:
    """Keep where a report object lies.

    Raises:
        ValueError: other bytes are committed under its UID.
    """
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


def save_delivery(
    connection: Connection, job: Job, delivery: NewDelivery, by_uid: Mapping[str, ReportObject], now: datetime
) -> None:
    """Let a destination's objects wait for the deliverer, in the order of sending."""
    delivery_id = connection.execute(
        insert(DeliveryRow)
        .values(
            job_id=job.job_id,
            revision=job.revision,
            destination=delivery.destination,
            state=DeliveryState.PENDING,
            priority=int(job.priority),
            attempts=0,
            fencing_token=0,
            created_at=now,
            changed_at=now,
        )
        .returning(DeliveryRow.delivery_id)
    ).scalar_one()
    count_deliveries(connection, {(delivery.destination, DeliveryState.PENDING): 1})
    ordered = sorted(delivery.sop_instance_uids, key=lambda uid: _SENDING_ORDER.index(by_uid[uid].kind))
    for position, uid in enumerate(ordered):
        connection.execute(
            insert(DeliveryObjectRow).values(delivery_id=delivery_id, sop_instance_uid=uid, position=position)
        )
