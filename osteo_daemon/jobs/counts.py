"""How many jobs and deliveries stand where, without reading them: sums of what every transition appended.

One counter row for each state would make transitions of several processes wait for each other; so each appends a
row of its own, in its transaction, and the scheduler folds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.schema import DeliveryCountRow, DeliveryRow, InstanceRow, JobCountRow, JobRow, StudyRow


def count_jobs(connection: Connection, changes: Mapping[JobState, int]) -> None:
    """So many jobs more (or fewer) stand in each state, in the transaction that moves them."""
    rows = [{"state": state, "jobs": jobs} for state, jobs in changes.items()]
    connection.execute(insert(JobCountRow).values(rows))


def count_deliveries(connection: Connection, changes: Mapping[tuple[str, DeliveryState], int]) -> None:
    """So many deliveries more (or fewer) to a destination stand in a state, in the transaction that moves them."""
    rows = [
        {"destination": destination, "state": state, "deliveries": count}
        for (destination, state), count in changes.items()
    ]
    connection.execute(insert(DeliveryCountRow).values(rows))


class Counts(Database):
    """The counters' side of the store."""

    def counts_by_state(self) -> dict[JobState, int]:
        """How many jobs stand in each state; every state is named."""
        with self._reading() as connection:
            return dict.fromkeys(JobState, 0) | _counted_jobs(connection)

    def delivery_counts(self) -> dict[tuple[str, DeliveryState], int]:
        """How many deliveries of each destination stand in each state; what there is none of is left out."""
        with self._reading() as connection:
            return {key: count for key, count in _counted_deliveries(connection).items() if count}

    def fold_counts(self) -> int:
        """Replace the rows behind the counters by one for each; returns how many went."""
        # on PostgreSQL only what this transaction itself removes is counted: others may append meanwhile
        with self._writing() as connection:
            gone = connection.execute(delete(JobCountRow).returning(JobCountRow.state, JobCountRow.jobs)).all()
            jobs: Counter[JobState] = Counter()
            for row in gone:
                jobs[row.state] += row.jobs
            if jobs:
                count_jobs(connection, jobs)
            returned = (DeliveryCountRow.destination, DeliveryCountRow.state, DeliveryCountRow.deliveries)
            sent = connection.execute(delete(DeliveryCountRow).returning(*returned)).all()
            deliveries: Counter[tuple[str, DeliveryState]] = Counter()
            for destination, state, count in sent:
                deliveries[destination, state] += count
            # a state without deliveries, or a destination of long ago, needs no row
            if left := {key: count for key, count in deliveries.items() if count}:
                count_deliveries(connection, left)
        return len(gone) + len(sent)

    def wrong_counts(self) -> dict[str, tuple[int, int]]:
        """Counters that differ from what they count: by name, counted and true."""
        with self._reading() as connection:
            pairs: dict[str, tuple[int, int]] = {}
            jobs, true_jobs = _counted_jobs(connection), _true_jobs(connection)
            for state in JobState:
                pairs[state.value] = (jobs.get(state, 0), true_jobs.get(state, 0))
            sent, true_sent = _counted_deliveries(connection), _true_deliveries(connection)
            for destination, delivery_state in sorted({*sent, *true_sent}):
                key = (destination, delivery_state)
                pairs[f"deliveries to {destination} {delivery_state}"] = (sent.get(key, 0), true_sent.get(key, 0))
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def recount(self) -> None:
        """Count jobs, deliveries and instances anew."""
        with self._writing() as connection:
            if not self._sqlite:
                connection.exec_driver_sql("LOCK TABLE jobs, deliveries, instances, studies IN SHARE MODE")
            connection.execute(delete(JobCountRow))
            if jobs := _true_jobs(connection):
                count_jobs(connection, jobs)
            connection.execute(delete(DeliveryCountRow))
            if sent := _true_deliveries(connection):
                count_deliveries(connection, sent)
            count = (
                select(func.count())
                .where(InstanceRow.study_instance_uid == StudyRow.study_instance_uid)
                .scalar_subquery()
            )
            connection.execute(update(StudyRow).where(StudyRow.instances != count).values(instances=count))


def _counted_jobs(connection: Connection) -> dict[JobState, int]:
    return _by_state(connection, select(JobCountRow.state, func.sum(JobCountRow.jobs)).group_by(JobCountRow.state))


def _true_jobs(connection: Connection) -> dict[JobState, int]:
    return _by_state(connection, select(JobRow.state, func.count()).group_by(JobRow.state))


def _counted_deliveries(connection: Connection) -> dict[tuple[str, DeliveryState], int]:
    key = (DeliveryCountRow.destination, DeliveryCountRow.state)
    return _by_key(connection, select(*key, func.sum(DeliveryCountRow.deliveries)).group_by(*key))


def _true_deliveries(connection: Connection) -> dict[tuple[str, DeliveryState], int]:
    key = (DeliveryRow.destination, DeliveryRow.state)
    return _by_key(connection, select(*key, func.count()).group_by(*key))


def _by_state(connection: Connection, query: Any) -> dict[JobState, int]:
    return {state: int(jobs) for state, jobs in connection.execute(query)}


def _by_key(connection: Connection, query: Any) -> dict[tuple[str, DeliveryState], int]:
    return {(destination, state): int(count) for destination, state, count in connection.execute(query)}
