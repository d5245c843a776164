"""The scheduler's own rows: who leads, what ran when, and what lies about after a worker died."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, or_, select, update

from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.delivery_rows import loaded, move, note
from osteo_daemon.jobs.records import DeliveryState, SchedulerRun
from osteo_daemon.jobs.schema import DeliveryRow, LeaseRow, SchedulerRunRow
from osteo_daemon.jobs.transitions import CLOCK_STEP, utc_now


class Upkeep(Database):
    """The scheduler's side of the store."""

    def lead(
        self,
        name: str,
        holder: str,
        lease_seconds: float,
        *,
        is_gone: Callable[[str], bool] = lambda _holder: False,
        now: datetime | None = None,
    ) -> bool:
        """Take or keep the lease of a role that only one process may have; False while another has it.

        Args:
            name: of the role.
            holder: who asks.
            lease_seconds: until when it is heard of again.
            is_gone: True for a holder that is known to have ended: its lease is not awaited.
            now: the present, for tests.
        """
        now = now or utc_now()
        until = now + timedelta(seconds=lease_seconds)
        with self._writing() as connection:
            self._alone(connection, f"lease {name}")
            row = connection.execute(select(LeaseRow.__table__).where(LeaseRow.name == name)).one_or_none()
            if row is None:
                connection.execute(
                    insert(LeaseRow).values(name=name, holder=holder, fencing_token=1, lease_until=until)
                )
                return True
            # no lease is longer than asked for: one that is was written before the clock was set back
            held = now <= row.lease_until <= until + CLOCK_STEP
            if row.holder != holder and held and not is_gone(row.holder):
                return False
            token = row.fencing_token + (row.holder != holder)
            connection.execute(
                update(LeaseRow)
                .where(LeaseRow.name == name)
                .values(holder=holder, fencing_token=token, lease_until=until)
            )
        return True

    def resign(self, name: str, holder: str, *, now: datetime | None = None) -> None:
        """Give the lease back, so that another may have it at once."""
        now = now or utc_now()
        with self._writing() as connection:
            connection.execute(
                update(LeaseRow)
                .where(LeaseRow.name == name, LeaseRow.holder == holder)
                .values(lease_until=now - timedelta(seconds=1))
            )

    def scheduler_runs(self) -> list[SchedulerRun]:
        """What the scheduler does, by name."""
        with self._reading() as connection:
            rows = connection.execute(select(SchedulerRunRow.__table__).order_by(SchedulerRunRow.step)).all()
        return [SchedulerRun(**row._mapping) for row in rows]

    def note_run(self, step: str, *, values: Mapping[str, Any], more: Mapping[str, int]) -> None:
        """Set columns of a step's row and add to its counters; makes the row when there is none."""
        with self._writing() as connection:
            self._alone(connection, f"step {step}")
            added = {name: getattr(SchedulerRunRow, name) + count for name, count in more.items()}
            changed = connection.execute(
                update(SchedulerRunRow).where(SchedulerRunRow.step == step).values(**values, **added)
            )
            if changed.rowcount == 0:
                counters = {"runs": 0, "failures": 0, "missed": 0, **more}
                connection.execute(insert(SchedulerRunRow).values(step=step, **values, **counters))

    def take_back_deliveries(self, *, now: datetime | None = None) -> int:
        """SENDING to PENDING for deliveries whose deliverer is gone; returns how many."""
        now = now or utc_now()
        expired = select(DeliveryRow.delivery_id, DeliveryRow.worker).where(
            DeliveryRow.state == DeliveryState.SENDING,
            or_(DeliveryRow.lease_until < now, DeliveryRow.changed_at > now + CLOCK_STEP),
        )
        with self._reading() as connection:
            if connection.execute(expired.limit(1)).first() is None:
                return 0
        with self._writing() as connection:
            rows = connection.execute(expired.with_for_update(skip_locked=True)).all()
            for row in rows:
                move(connection, row.delivery_id, DeliveryState.PENDING, now)
                delivery = loaded(connection, row.delivery_id)
                note(connection, delivery, "store", "delivery_lease_expired", f"no heartbeat from {row.worker}", now)
        return len(rows)
