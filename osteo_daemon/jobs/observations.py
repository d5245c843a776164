"""What is kept of finished studies for drift monitoring, and which of its alarms stand."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, update

from osteo_daemon.domain.job import Priority
from osteo_daemon.domain.observation import Observation, Scanner
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.drift_schema import DriftAlarmRow, ObservationRow
from osteo_daemon.jobs.records import DriftAlarm
from osteo_daemon.jobs.transitions import utc_now

_ROWS_AT_ONCE = 5000


def save_observation(connection: Connection, job_id: int, priority: int, observation: Observation) -> None:
    """Keep what a study's latest revision showed, at the time of its first.

    Studies fetched from an archive to catch up are of other times and of other scanners: they are passed over.
    """
    if priority == Priority.BACKFILL:
        return
    values: dict[str, Any] = {
        "manufacturer": observation.scanner.manufacturer,
        "model": observation.scanner.model,
        "kernel": observation.scanner.kernel,
        "outcome": observation.outcome,
        "values": {
            "category": observation.category,
            "levels_hu": dict(observation.levels_hu),
            "flags": list(observation.flags),
            "network": observation.network,
            "network_class": observation.network_class,
            "expert": observation.expert,
        },
    }
    known = update(ObservationRow).where(ObservationRow.job_id == job_id).values(**values)
    if connection.execute(known).rowcount == 0:
        connection.execute(insert(ObservationRow).values(job_id=job_id, at=observation.at, **values))


class Observations(Database):
    """Drift monitoring's side of the store."""

    def observations(self, since: datetime, until: datetime, limit: int) -> list[Observation]:
        """Studies that ended in [since, until), oldest first; of more than ``limit`` the newest."""
        found: list[Observation] = []
        query = (
            select(ObservationRow.__table__)
            .where(ObservationRow.at >= since, ObservationRow.at < until)
            .order_by(ObservationRow.at.desc(), ObservationRow.job_id.desc())
            .limit(limit)
        )
        with self._reading() as connection:
            rows = connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))
            found += (_observation(row._mapping) for row in rows)
        return found[::-1]

    def drift_alarms(self, *, standing: bool = True, limit: int = 200) -> list[DriftAlarm]:
        """Alarms, newest first; by default only those that stand."""
        query = select(DriftAlarmRow.__table__).order_by(DriftAlarmRow.alarm_id.desc()).limit(limit)
        if standing:
            query = query.where(DriftAlarmRow.cleared_at.is_(None))
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [DriftAlarm(row.chart, row.raised_at, row.cleared_at, row.detail) for row in rows]

    def note_drift(
        self, alarms: Mapping[str, str], quiet: frozenset[str], *, now: datetime | None = None
    ) -> tuple[list[str], list[str]]:
        """Raise alarms that don't stand yet and clear those of charts that are quiet again.

        Args:
            alarms: chart to what it says.
            quiet: charts that are back within their limits. A chart that is in neither keeps what it has.
            now: the present, for tests.

        Returns:
            The charts newly raised and those cleared.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, "drift alarms")
            standing = set(
                connection.execute(select(DriftAlarmRow.chart).where(DriftAlarmRow.cleared_at.is_(None))).scalars()
            )
            raised, cleared = sorted(alarms.keys() - standing), sorted(standing & quiet)
            for chart in raised:
                connection.execute(insert(DriftAlarmRow).values(chart=chart, raised_at=now, detail=alarms[chart]))
            for chart in cleared:
                connection.execute(
                    update(DriftAlarmRow)
                    .where(DriftAlarmRow.chart == chart, DriftAlarmRow.cleared_at.is_(None))
                    .values(cleared_at=now)
                )
        return raised, cleared


def _observation(row: RowMapping) -> Observation:
    values = row["observed"]
    return Observation(
        at=row["at"],
        scanner=Scanner(row["manufacturer"], row["model"], row["kernel"]),
        outcome=row["outcome"],
        **{**values, "flags": tuple(values["flags"])},
    )
