"""Where each destination's circuit breaker stands: it outlives the process and is there to be seen."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import insert, select, update

from osteo_daemon.domain.breaker import Breaker
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.schema import BreakerRow, DeliveryRow


class Breakers(Database):
    """The breakers' side of the store."""

    def breakers(self) -> dict[str, Breaker]:
        """Every destination that was ever asked, by name."""
        with self._reading() as connection:
            rows = connection.execute(select(BreakerRow.__table__).order_by(BreakerRow.destination)).all()
        return {
            row.destination: Breaker(row.state, row.since, row.failures, row.next_probe_at, row.error) for row in rows
        }

    def last_delivered(self, destinations: Iterable[str]) -> dict[str, datetime]:
        """When each of these destinations last had all of a delivery; those that never had are left out."""
        found: dict[str, datetime] = {}
        with self._reading() as connection:
            for name in destinations:
                # the last entry of an index for each
                query = (
                    select(DeliveryRow.changed_at)
                    .where(DeliveryRow.destination == name, DeliveryRow.state == DeliveryState.DELIVERED)
                    .order_by(DeliveryRow.delivery_id.desc())
                    .limit(1)
                )
                at = connection.execute(query).scalar_one_or_none()
                if at is not None:
                    found[name] = at
        return found

    def save_breaker(self, destination: str, breaker: Breaker) -> None:
        """Write a breaker down."""
        values = {
            "state": breaker.state,
            "since": breaker.since,
            "failures": breaker.failures,
            "next_probe_at": breaker.next_probe_at,
            "error": breaker.error,
        }
        with self._writing() as connection:
            known = update(BreakerRow).where(BreakerRow.destination == destination).values(**values)
            if connection.execute(known).rowcount == 0:
                connection.execute(insert(BreakerRow).values(destination=destination, **values))
