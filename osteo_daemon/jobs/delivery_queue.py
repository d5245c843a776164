"""Which delivery is next: the most urgent class first, within it the oldest; a destination's revisions in order."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Connection, Row, String, bindparam, exists, or_, select, type_coerce

from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.schema import DeliveryRow, UtcDateTime
from osteo_daemon.jobs.transitions import CLOCK_STEP

_NOW = bindparam("now", type_=UtcDateTime)
_AHEAD = bindparam("ahead", type_=UtcDateTime)
_CLAIMABLE = (DeliveryState.SENDING, DeliveryState.PENDING, DeliveryState.AWAITING)


def next_delivery(connection: Connection, now: datetime, destination: str | None, *, lock: bool) -> Row[Any] | None:
    """Of the deliveries that may be claimed the oldest of the most urgent class, its row locked; None for none.

    Only of ``destination`` when given. Without ``lock`` only a look at it.
    """
    values: dict[str, Any] = {"now": now, "ahead": now + CLOCK_STEP}
    if destination is not None:
        values["destination"] = destination
    rows = (connection.execute(_first(state, destination is not None, lock), values).first() for state in _CLAIMABLE)
    found = [row for row in rows if row is not None]
    return min(found, key=lambda row: (row.priority, row.delivery_id), default=None)


@cache
def _first(state: DeliveryState, of_one: bool, lock: bool) -> Any:
    # a query for each state, none with an OR over states: each walks an index to its first row, however many have
    # ended. Made once: to put it together takes longer than to run it
    set_back = DeliveryRow.changed_at > _AHEAD
    due = or_(DeliveryRow.not_before.is_(None), DeliveryRow.not_before <= _NOW, set_back)
    if state is DeliveryState.SENDING:
        due = or_(DeliveryRow.lease_until < _NOW, set_back)
    query = (
        select(DeliveryRow.__table__)
        .where(DeliveryRow.state == state, due, ~_blocked())
        .order_by(DeliveryRow.priority, DeliveryRow.delivery_id)
        .limit(1)
    )
    if of_one:
        query = query.where(DeliveryRow.destination == bindparam("destination", type_=String))
    return query.with_for_update(skip_locked=True) if lock else query


def _blocked() -> Any:
    earlier = DeliveryRow.__table__.alias("earlier")
    return exists().where(
        earlier.c.job_id == DeliveryRow.job_id,
        earlier.c.destination == DeliveryRow.destination,
        earlier.c.revision < DeliveryRow.revision,
        # an expression, not the column: else PostgreSQL may compare each waiting delivery with all that wait
        (type_coerce(earlier.c.state, String) + "").in_((DeliveryState.PENDING.value, DeliveryState.SENDING.value)),
    )
