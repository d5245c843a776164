"""Where each destination's circuit breaker stands: it outlives the process and is there to be seen."""

from __future__ import annotations

from sqlalchemy import insert, select, update

from osteo_daemon.domain.breaker import Breaker
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.schema import BreakerRow


class Breakers(Database):
    """The breakers' side of the store."""

    def breakers(self) -> dict[str, Breaker]:
        """Every destination that was ever asked, by name."""
        with self._reading() as connection:
            rows = connection.execute(select(BreakerRow.__table__).order_by(BreakerRow.destination)).all()
        return {
            row.destination: Breaker(row.state, row.since, row.failures, row.next_probe_at, row.error) for row in rows
        }

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
