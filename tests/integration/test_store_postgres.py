"""The job store in PostgreSQL: what differs from SQLite, and what many processes at once may not break."""

from __future__ import annotations

import select
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine

from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError, StoreUnavailable
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.schema import Base
from osteo_daemon.jobs.store import JobStore
from tests.fakes import LOOPBACK
from tests.postgres import Cluster
from tests.stores import complete_quiet
from tests.unit.test_jobs_store import at, instance, ready


def in_threads(count: int, work: Callable[[int], None]) -> None:
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))  # raises what a thread raised


def test_migrations_make_the_tables_of_the_schema(postgres: Cluster) -> None:
    url = postgres.new(migrated=False)
    JobStore(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_several_roles_may_create_the_store_at_once(postgres: Cluster) -> None:
    url = postgres.new(migrated=False)
    in_threads(6, lambda _number: JobStore(url).close())


def test_commits_are_durable_and_readers_see_one_state(postgres: Cluster) -> None:
    store = JobStore(postgres.new(), busy_timeout_seconds=7)
    with store._writing() as connection:
        values = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("synchronous_commit", "fsync", "lock_timeout", "transaction_isolation")
        }
    assert values == {
        "synchronous_commit": "on",
        "fsync": "on",
        "lock_timeout": "7s",
        "transaction_isolation": "read committed",
    }
    with store._reading() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "repeatable read"
        before = connection.exec_driver_sql("SELECT count(*) FROM studies").scalar_one()
        store.record_instance(instance(1), "CT1", now=at(0))
        assert connection.exec_driver_sql("SELECT count(*) FROM studies").scalar_one() == before
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("osteo:", "osteo:wrong"), "refuses this user or password"),
        (lambda url: url.rpartition("/")[0] + "/nowhere", "does not exist"),
    ],
)
def test_what_settings_must_mend_is_said_without_the_password(
    postgres: Cluster, change: Callable[[str], str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        JobStore(change(postgres.new()))
    assert postgres.password not in str(caught.value)


def test_a_server_that_is_away_may_come_back(free_port: Callable[[], int]) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        JobStore(f"postgresql+pg8000://osteo:geheim@127.0.0.1:{free_port()}/osteo")
    assert "geheim" not in str(caught.value)


def test_a_lock_is_not_awaited_for_ever(postgres: Cluster) -> None:
    url = postgres.new()
    holder, waiter = JobStore(url), JobStore(url, busy_timeout_seconds=0.2)
    holder.record_instance(instance(1), "CT1", now=at(0))
    with holder._writing() as connection:
        holder._alone(connection, "1.2.3")
        with pytest.raises(StoreUnavailable):
            waiter.record_instance(instance(2), "CT1", now=at(1))
    assert waiter.record_instance(instance(2), "CT1", now=at(2)) is RecordOutcome.STORED
    holder.close()
    waiter.close()


def test_connections_that_the_server_ended_are_replaced(postgres: Cluster) -> None:
    store = JobStore(postgres.new())
    store.record_instance(instance(1), "CT1", now=at(0))
    postgres.end_connections()
    assert store.record_instance(instance(2), "CT1", now=at(1)) is RecordOutcome.STORED
    store.close()


def test_a_connection_that_ends_within_a_transaction_may_be_tried_again(postgres: Cluster) -> None:
    """Nobody can see it before the statement is sent: the error is one that passes, and nothing is half written."""
    store = JobStore(postgres.new())

    def cut_off(block: Callable[[], AbstractContextManager[Connection]], *, said_more: bool) -> None:
        with block() as connection:
            store._alone(connection, "1.2.3")
            postgres.end_connections()
            if said_more:
                connection.exec_driver_sql("SELECT 1")

    for block, said_more in ((store._reading, True), (store._writing, True), (store._writing, False)):
        with pytest.raises(StoreUnavailable):
            cut_off(block, said_more=said_more)
    assert store.record_instance(instance(1), "CT1", now=at(0)) is RecordOutcome.STORED
    assert [job.instances for job in store.recent()] == [1]
    store.close()


def test_a_connection_that_is_reset_may_be_tried_again(postgres: Cluster) -> None:
    """What a server that dies does: its kernel answers with a reset, which the driver reads as another error."""
    store = JobStore(postgres.new())

    def close_unread(accepted: socket.socket) -> None:
        with accepted:
            select.select([accepted], [], [], 30.0)

    def cut_off() -> None:
        with socket.create_server((LOOPBACK, 0)) as server, store._writing() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            client = socket.create_connection(server.getsockname())
            driver._usock, driver._sock = client, client.makefile("rwb")
            threading.Thread(target=close_unread, args=(server.accept()[0],)).start()
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(StoreUnavailable):
        cut_off()
    assert store.record_instance(instance(1), "CT1", now=at(0)) is RecordOutcome.STORED
    store.close()


def test_objects_of_a_new_study_may_arrive_at_one_moment(postgres: Cluster) -> None:
    store = JobStore(postgres.new())
    outcomes: Counter[RecordOutcome] = Counter()

    def send(number: int) -> None:
        for study in ("1.1", "1.2", "1.3"):
            outcomes[store.record_instance(instance(number, study), f"CT{number % 2}")] += 1
            outcomes[store.record_instance(instance(100, study), f"CT{number % 2}")] += 1

    in_threads(8, send)
    assert outcomes == {RecordOutcome.STORED: 27, RecordOutcome.DUPLICATE: 21}
    assert [job.instances for job in store.recent()] == [9, 9, 9]
    assert store.counts_by_state()[JobState.RECEIVING] == 3
    store.close()


def test_claims_of_many_workers_never_meet(postgres: Cluster) -> None:
    store = JobStore(postgres.new())
    for number in range(40):
        ready(store, f"1.{number}")
    claimed: Counter[str] = Counter()

    def work(number: int) -> None:
        while (job := store.claim(f"w{number}", 600)) is not None:
            claimed[job.study_instance_uid] += 1
            store.exclude(job, "no_ct_series", "none", {})

    in_threads(8, work)
    assert claimed == {f"1.{number}": 1 for number in range(40)}
    counts = store.counts_by_state()
    assert (counts[JobState.EXCLUDED], sum(counts.values())) == (40, 40)
    assert store.fold_counts() > 40
    assert store.counts_by_state() == counts
    store.close()


def test_an_arrival_and_the_sweep_do_not_cross(postgres: Cluster) -> None:
    """An object that is being recorded while the sweep looks makes its study anything but quiet."""
    store = JobStore(postgres.new())
    store.record_instance(instance(1), "CT1", now=at(0))
    swept: list[object] = []
    with store._writing() as connection:
        store._alone(connection, "1.2.3")
        sweeper = threading.Thread(target=lambda: swept.extend(complete_quiet(store, 5, now=at(10))))
        sweeper.start()
        sweeper.join(0.3)
        connection.exec_driver_sql(
            "UPDATE studies SET last_received_at = %s", (datetime(2026, 1, 1, 0, 0, 9, tzinfo=UTC),)
        )
    sweeper.join()
    assert swept == []
    job = store.job("1.2.3")
    assert job is not None
    assert job.state is JobState.RECEIVING
    store.close()


def test_uids_stay_out_of_the_texts_of_errors(postgres: Cluster) -> None:
    store = JobStore(postgres.new())
    study = "1.2.999.4711"
    broken = SopInstance(study, "x" * 100, "1", study + ".1", "1", Path("/x"), 1, "0" * 64)
    with pytest.raises(Exception, match="too long") as caught:
        store.record_instance(broken, "CT1")
    assert study not in str(caught.value)
    store.close()
