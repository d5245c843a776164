"""A state and the event that tells of it are one transaction, whatever the step; no table of states is passed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from osteo_daemon.domain.job import TRANSITIONS, Job, JobState, Priority
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.delivery_rows import move
from osteo_daemon.jobs.records import DELIVERY_TRANSITIONS, Delivery, DeliveryState, NewDelivery, ReportKind
from osteo_daemon.jobs.schema import Base, DeliveryRow, EventRow, JobRow
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.jobs.transitions import change_state, screening_job
from tests.postgres import Cluster
from tests.stores import new_sqlite
from tests.unit.test_jobs_store import RESULT, at, instance, report

NO_EVENTS = {
    "sqlite": "CREATE TRIGGER no_events BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'no event'); END",
    "postgresql": "ALTER TABLE events ADD CONSTRAINT no_events CHECK (event_id < 0) NOT VALID",
}


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    if request.param == "sqlite":
        store = new_sqlite(tmp_path)
        yield store
        store.close()
        return
    server: Cluster = request.getfixturevalue("postgres")
    store = JobStore(url := server.new())
    yield store
    store.close()
    server.drop(url)


def everything(store: JobStore) -> dict[str, list[Any]]:
    """All rows of all tables."""
    with store._reading() as connection:
        return {
            table.name: sorted(map(str, connection.execute(select(table)))) for table in Base.metadata.sorted_tables
        }


def test_without_its_event_no_step_changes_anything(store: JobStore, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")

    def received(study: str) -> None:
        store.record_instance(replace(instance(1, study), path=spool.root / study), "CT1", now=at(0))

    def ready(study: str) -> None:
        received(study)
        store.mark_complete(study, who="test", reason="test", now=at(1))

    def claimed(study: str) -> Job:
        ready(study)
        job = store.claim("w", 60, now=at(2))
        assert job is not None
        return job

    def reported(study: str) -> None:
        uid = f"{study}.9"
        made = replace(report(ReportKind.SR, uid), path=spool.root / uid)
        store.commit_report(claimed(study), RESULT, [made], [NewDelivery("pacs", (uid,))], now=at(3))

    def sent(study: str) -> Delivery:
        reported(study)
        delivery = store.claim_delivery("d", 60, now=at(4))
        assert delivery is not None
        store.delivery_object_sent(delivery, f"{study}.9", "0x0000", now=at(5))
        return delivery

    def refused(study: str) -> Delivery:
        delivery = sent(study)
        store.delivery_refused(delivery, "no", now=at(6))
        return delivery

    def prepared(make: Callable[[str], Any], study: str) -> Any:
        made = make(study)
        return made if made is not None else study

    objects = [report(ReportKind.SR, "8.8")]
    steps: list[tuple[Callable[[str], Any], Callable[[Any], object]]] = [
        (received, lambda study: store.mark_complete(study, who="test", reason="x", now=at(9))),
        (received, lambda study: store.hold_study(study, "operator", "x", now=at(9))),
        (ready, lambda study: store.record_instance(instance(2, study), "CT1", now=at(9))),
        (ready, lambda study: store.prioritise_study(study, Priority.STAT, "operator", "x", now=at(9))),
        (claimed, lambda job: store.commit_report(job, RESULT, objects, [NewDelivery("a", ("8.8",))], now=at(9))),
        (claimed, lambda job: store.exclude(job, "no_ct_series", "x", RESULT, now=at(9))),
        (claimed, lambda job: store.hold(job, "Damaged", "x", now=at(9))),
        (claimed, lambda job: store.fail(job, "Failed", "x", now=at(9))),
        (claimed, lambda job: store.retry_later(job, "Transient", "x", at(20), now=at(9))),
        (claimed, lambda job: store.release(job, now=at(9))),
        (claimed, lambda _job: store.worker_ended("w", "killed", now=at(9))),
        (claimed, lambda _job: store.take_back_expired(now=at(900))),
        (reported, lambda study: store.reprocess_study(study, "operator", "x", now=at(9))),
        (reported, lambda study: store.purge_study(study, spool, "operator", "x", force=True, now=at(9))),
        (sent, lambda delivery: store.delivery_done(delivery, "stored", now=at(9))),
        (sent, lambda delivery: store.delivery_refused(delivery, "no", now=at(9))),
        (sent, lambda delivery: store.delivery_unproven(delivery, "no", now=at(9))),
        (sent, lambda _delivery: store.take_back_deliveries(now=at(900))),
        (refused, lambda delivery: store.resend(delivery.delivery_id, "operator", now=at(9))),
        (refused, lambda delivery: store.accept_delivery(delivery.delivery_id, "operator", "x", now=at(9))),
    ]
    kind = "sqlite" if store._sqlite else "postgresql"
    for number, (make, act) in enumerate(steps):
        made = prepared(make, f"1.{number}")
        with store._writing() as connection:
            connection.execute(text(NO_EVENTS[kind]))
        before = everything(store)
        with pytest.raises(DBAPIError, match=r"no.event"):
            act(made)
        assert everything(store) == before, number
        with store._writing() as connection:
            drop = "DROP TRIGGER no_events" if kind == "sqlite" else "ALTER TABLE events DROP CONSTRAINT no_events"
            connection.execute(text(drop))
        act(made)  # the step itself is a right one
        with store._reading() as connection:
            events = connection.execute(select(func.count()).select_from(EventRow)).scalar_one()
        assert events > len(before["events"]), number
        with store._writing() as connection:  # out of the way of the next step's claim
            connection.execute(text("UPDATE jobs SET state = 'FAILED' WHERE state = 'READY'"))
            connection.execute(text("UPDATE deliveries SET state = 'REFUSED'"))


def test_the_store_takes_no_step_that_its_tables_do_not_name(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    store.record_instance(instance(1, "1.1"), "CT1", now=at(0))
    store.mark_complete("1.1", who="test", reason="test", now=at(1))
    job = store.claim("w", 60, now=at(2))
    assert job is not None
    store.commit_report(job, RESULT, [report(ReportKind.SR, "9.1")], [NewDelivery("pacs", ("9.1",))], now=at(3))
    (delivery,) = store.deliveries()
    refused = 0
    for before, after in product(JobState, JobState):
        with store._writing() as connection:
            connection.execute(JobRow.__table__.update().values(state=before))
        try:
            with store._writing() as connection:
                row = connection.execute(screening_job("1.1")).one()
                change_state(connection, row, after, who="w", event="e", reason="r", now=at(4))
        except IllegalTransition:
            refused += 1
            assert after not in TRANSITIONS[before]
        else:
            assert after in TRANSITIONS[before]
    assert refused == len(JobState) ** 2 - sum(map(len, TRANSITIONS.values()))
    refused = 0
    for before_, after_ in product(DeliveryState, DeliveryState):
        with store._writing() as connection:
            connection.execute(DeliveryRow.__table__.update().values(state=before_))
        try:
            with store._writing() as connection:
                move(connection, delivery.delivery_id, after_, at(4))
        except IllegalTransition:
            refused += 1
            assert after_ not in DELIVERY_TRANSITIONS[before_]
        else:
            assert after_ in {before_, *DELIVERY_TRANSITIONS[before_]}
    assert refused == len(DeliveryState) * (len(DeliveryState) - 1) - sum(map(len, DELIVERY_TRANSITIONS.values()))
    assert not DELIVERY_TRANSITIONS[DeliveryState.DELIVERED]  # what was proven is never taken back
    store.close()


def test_what_is_not_charged_is_tried_for_ever_and_what_is_ends(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    store.record_instance(instance(1, "1.1"), "CT1", now=at(0))
    store.mark_complete("1.1", who="test", reason="test", now=at(1))
    for number in range(10):
        job = store.claim("w", 60, 3, now=at(10 * number + 2))
        assert job is not None
        assert job.attempts == 1
        store.retry_later(job, "SpoolFull", "no room", at(10 * number + 9), charged=False, now=at(10 * number + 3))
        assert store.claim("w", 60, 3, now=at(10 * number + 8)) is None  # it waits all the same
    (summary,) = store.recent()
    assert (summary.state, summary.code, summary.detail) == (JobState.READY, "SpoolFull", "no room")
    for number in range(3):
        job = store.claim("w", 60, 3, now=at(200 + number))
        assert job is not None
        store.retry_later(job, "worker_died", "SIGSEGV", at(200 + number), now=at(200 + number))
    assert store.claim("w", 60, 3, now=at(300)) is None
    (summary,) = store.recent()
    assert (summary.state, summary.code) == (JobState.FAILED, "attempts_spent")
    assert "worker_died: SIGSEGV" in (summary.detail or "")
    store.close()
