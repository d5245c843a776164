from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError

from osteo_daemon.domain.job import TRANSITIONS, Job, JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError, IllegalTransition, LeaseLost, StoreUnavailable
from osteo_daemon.jobs import database
from osteo_daemon.jobs.inventory import LIFT
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, RecordOutcome, ReportKind, ReportObject
from osteo_daemon.jobs.schema import Base
from osteo_daemon.jobs.store import JobStore
from tests.postgres import Cluster
from tests.stores import complete_quiet, new_sqlite

START = datetime(2026, 1, 1, tzinfo=UTC)
STUDY = "1.2.3"
RESULT = {"schema": "osteo-result/1"}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def instance(number: int, study: str = STUDY, sha256: str | None = None) -> SopInstance:
    return SopInstance(
        study_instance_uid=study,
        series_instance_uid=f"{study}.1",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"{study}.1.{number}",
        transfer_syntax_uid="1.2.840.10008.1.2",
        path=Path(f"/spool/{study}/{number}"),
        size_bytes=100 + number,
        sha256=sha256 or f"{number:064d}",
    )


def report(kind: ReportKind, uid: str, sha256: str = "a" * 64) -> ReportObject:
    return ReportObject(kind, "1.2.840", uid, Path(f"/spool/{uid}"), 10, sha256)


THREE = [report(ReportKind.SC, "9.3"), report(ReportKind.SR, "9.2"), report(ReportKind.SEG, "9.1")]


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """A store of each kind: what holds on one must hold on the other."""
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


def ready(store: JobStore, study: str = STUDY, seconds: float = 0) -> None:
    store.record_instance(instance(1, study), "CT1", now=at(seconds))
    complete_quiet(store, 1, now=at(seconds + 2))


def claimed(store: JobStore, seconds: float = 10, study: str = STUDY, worker: str = "w") -> Job:
    ready(store, study, seconds - 5)
    job = store.claim(worker, 60, now=at(seconds))
    assert job is not None
    return job


def state_of(store: JobStore, study: str = STUDY) -> JobState:
    job = store.job(study)
    assert job is not None
    return job.state


def test_migrations_make_the_tables_of_the_schema(tmp_path: Path) -> None:
    JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_sqlite_is_durable_and_checks_foreign_keys(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with store._reading() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    store.close()
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    JobStore(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigurationError, match="9999"):
        JobStore(f"sqlite:///{path}")


def test_the_names_of_migrations_tell_their_order() -> None:
    """A role knows by them whether the store is up to date, without what is needed to change it."""
    script = ScriptDirectory(str(Path(database.__file__).parent / "migrations"))
    assert script.get_heads() == [database.revisions()[-1]]
    assert [entry.revision for entry in script.walk_revisions()][::-1] == database.revisions()


def test_an_up_to_date_store_needs_no_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    JobStore(url).close()
    code = (
        f"import sys; from osteo_daemon.jobs.store import JobStore; JobStore({url!r}); print('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _open(url: str) -> None:
    JobStore(url).close()


def test_several_roles_may_create_the_store_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_open, args=(url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def test_a_locked_store_is_transient(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(f"sqlite:///{path}", busy_timeout_seconds=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.record_instance(instance(1), "CT1")
    other.execute("ROLLBACK")
    assert store.record_instance(instance(1), "CT1") is RecordOutcome.STORED
    other.close()
    store.close()


def test_first_instance_creates_the_job_with_its_event(store: JobStore) -> None:
    assert store.record_instance(instance(1), "CT1", now=START) is RecordOutcome.STORED
    assert store.record_instance(instance(2), "CT1", now=at(1)) is RecordOutcome.STORED
    job = store.job(STUDY)
    assert job is not None
    assert (job.state, job.revision, job.attempts) == (JobState.RECEIVING, 1, 0)
    (event,) = store.events(STUDY)
    assert (event.event, event.from_state, event.to_state, event.who) == (
        "instance_received",
        None,
        JobState.RECEIVING,
        "CT1",
    )
    assert store.instances(job) == [instance(1), instance(2)]


def test_duplicates_and_conflicts_change_nothing(store: JobStore) -> None:
    job = claimed(store)
    assert store.record_instance(instance(1), "CT1", now=at(20)) is RecordOutcome.DUPLICATE
    assert store.record_instance(instance(1, sha256="f" * 64), "CT1", now=at(20)) is RecordOutcome.CONFLICT
    assert state_of(store) is JobState.SCREENING
    assert store.instances(job) == [instance(1)]


def test_a_study_is_complete_when_it_was_quiet(store: JobStore) -> None:
    store.record_instance(instance(1), "CT1", now=START)
    store.record_instance(instance(2), "CT1", now=at(50))
    assert complete_quiet(store, 60, now=at(109)) == []
    (job,) = complete_quiet(store, 60, now=at(110))
    assert job.state is JobState.READY
    assert complete_quiet(store, 60, now=at(200)) == []


def test_an_open_association_keeps_its_study_incomplete_for_a_bounded_time(store: JobStore) -> None:
    store.record_instance(instance(1), "CT1", association_id="a", now=START)
    store.record_instance(instance(1, "1.9"), "CT1", association_id="b", now=START)
    assert complete_quiet(store, 10, now=at(50)) == []
    store.association_closed("b")
    assert [job.study_instance_uid for job in complete_quiet(store, 10, now=at(50))] == ["1.9"]
    assert [job.study_instance_uid for job in complete_quiet(store, 10, now=at(100))] == [STUDY]


def test_an_association_speaks_only_for_the_study_it_stored_last(store: JobStore) -> None:
    store.record_instance(instance(1), "CT1", association_id="a", now=START)
    store.record_instance(instance(1, "1.9"), "CT1", association_id="a", now=START)
    assert [job.study_instance_uid for job in complete_quiet(store, 10, now=at(50))] == [STUDY]
    store.forget_associations()
    assert [job.study_instance_uid for job in complete_quiet(store, 10, now=at(50))] == ["1.9"]


def test_nothing_is_claimed_before_it_is_ready(store: JobStore) -> None:
    assert store.claim("w", 60, now=START) is None
    store.record_instance(instance(1), "CT1", now=START)
    assert store.claim("w", 60, now=START) is None


def test_a_claim_counts_the_attempt_and_moves_the_token(store: JobStore) -> None:
    job = claimed(store, 10)
    assert (job.state, job.attempts, job.fencing_token) == (JobState.SCREENING, 1, 1)
    assert job.lease_until == at(70)
    assert store.claim("other", 60, now=at(11)) is None


def test_an_expired_lease_is_claimed_anew_and_the_first_worker_can_commit_nothing(store: JobStore) -> None:
    first = claimed(store, 10)
    second = store.claim("v", 60, now=at(71))
    assert second is not None
    assert (second.attempts, second.fencing_token) == (2, 2)
    with pytest.raises(LeaseLost):
        store.heartbeat(first, 60, now=at(72))
    with pytest.raises(LeaseLost):
        store.commit_report(first, RESULT, THREE, [NewDelivery("pacs", ("9.1",))], now=at(72))
    for attempt in (
        lambda: store.hold(first, "damaged", "x"),
        lambda: store.fail(first, "x", "x"),
        lambda: store.exclude(first, "x", "x", RESULT),
        lambda: store.retry_later(first, "x", "x", at(80)),
        lambda: store.release(first),
    ):
        with pytest.raises(LeaseLost):
            attempt()
    assert store.report_objects(STUDY) == []
    assert store.deliveries() == []
    store.commit_report(second, RESULT, THREE, [], now=at(73))
    assert "lease_expired" in [event.event for event in store.events(STUDY)]


def test_a_heartbeat_extends_the_lease(store: JobStore) -> None:
    job = claimed(store, 10)
    store.heartbeat(job, 60, now=at(60))
    assert store.claim("v", 60, now=at(100)) is None
    assert store.take_back_expired(now=at(100)) == 0
    assert store.take_back_expired(now=at(121)) == 1
    assert state_of(store) is JobState.READY


def test_a_study_that_kills_its_worker_ends_as_failed(store: JobStore) -> None:
    ready(store)
    for attempt in range(3):
        job = store.claim("w", 60, 3, now=at(100 * (attempt + 1)))
        assert job is not None
        assert job.attempts == attempt + 1
    assert store.claim("w", 60, 3, now=at(1000)) is None
    (summary,) = store.recent()
    assert (summary.state, summary.code) == (JobState.FAILED, "attempts_spent")
    assert "3 of 3" in (summary.detail or "")


def test_a_retry_waits_and_keeps_its_reason(store: JobStore) -> None:
    job = claimed(store, 10)
    store.retry_later(job, "StoreUnavailable", "disk busy", at(100), now=at(11))
    assert store.claim("w", 60, now=at(99)) is None
    again = store.claim("w", 60, now=at(100))
    assert again is not None
    assert again.attempts == 2
    store.retry_later(again, "StoreUnavailable", "disk busy", at(101), now=at(100))
    third = store.claim("w", 60, now=at(102))
    assert third is not None
    store.retry_later(third, "PeerUnavailable", "gone", at(103), now=at(102))
    assert store.claim("w", 60, now=at(104)) is None
    (summary,) = store.recent(state=JobState.FAILED)
    assert "PeerUnavailable: gone" in (summary.detail or "")


def test_release_does_not_count_the_attempt(store: JobStore) -> None:
    for second in range(10, 20):
        job = claimed(store, second) if second == 10 else store.claim("w", 60, now=at(second))
        assert job is not None
        assert job.attempts == 1
        store.release(job, now=at(second))
    assert state_of(store) is JobState.READY


@pytest.mark.parametrize("state", ["READY", "SCREENING", "REPORTED", "DELIVERED", "EXCLUDED", "HELD", "FAILED"])
def test_a_late_slice_returns_the_job_under_a_higher_revision(store: JobStore, state: str) -> None:
    job = None
    if state == "READY":
        ready(store)
    else:
        job = claimed(store, 10)
    if job is not None:
        if state in ("REPORTED", "DELIVERED"):
            store.commit_report(job, RESULT, THREE, [NewDelivery("pacs", ("9.2",))], now=at(11))
        if state == "DELIVERED":
            delivery = store.claim_delivery("d", 60, now=at(12))
            assert delivery is not None
            store.delivery_object_sent(delivery, "9.2", "0x0000")
            store.delivery_done(delivery, "stored")
        if state == "EXCLUDED":
            store.exclude(job, "no_ct_series", "none", RESULT)
        if state == "HELD":
            store.hold(job, "damaged", "x")
        if state == "FAILED":
            store.fail(job, "x", "y")
    assert state_of(store).value == state
    assert store.record_instance(instance(2), "CT1", now=at(100)) is RecordOutcome.STORED
    after = store.job(STUDY)
    assert after is not None
    assert (after.state, after.revision, after.attempts, after.lease_until) == (JobState.RECEIVING, 2, 0, None)
    if state == "SCREENING" and job is not None:
        with pytest.raises(LeaseLost):
            store.commit_report(job, RESULT, [], [])


def test_objects_that_only_accompany_a_ct_touch_no_job(store: JobStore) -> None:
    job = claimed(store, 10)
    store.commit_report(job, RESULT, THREE, [])
    assert store.record_instance(instance(7), "CT1", screenable=False) is RecordOutcome.STORED
    assert store.record_instance(instance(1, "1.9"), "CT1", screenable=False) is RecordOutcome.STORED
    assert state_of(store) is JobState.REPORTED
    assert len(store.instances(job)) == 2


def test_a_study_of_accompanying_objects_alone_is_excluded_until_its_ct_comes(store: JobStore) -> None:
    store.record_instance(instance(7), "CT1", screenable=False, priority=Priority.STAT, now=at(0))
    store.record_instance(instance(8), "CT1", screenable=False, now=at(1))
    (listed,) = store.recent(code="no_ct_series")
    assert (listed.state, listed.instances, listed.revision) == (JobState.EXCLUDED, 2, 1)
    assert store.counts_by_state()[JobState.EXCLUDED] == 1
    store.record_instance(instance(1), "CT1", now=at(2))
    job = store.job(STUDY)
    assert job is not None
    # the first report of a study is of its first revision, whatever came before the images
    assert (job.state, job.revision, job.priority) == (JobState.RECEIVING, 1, Priority.STAT)
    assert [event.to_state for event in store.events(STUDY)] == [JobState.EXCLUDED, JobState.RECEIVING]


def test_what_the_store_may_have_forgotten_is_lifted_before_its_ct_comes(store: JobStore, tmp_path: Path) -> None:
    """A restored store knows the dose report; the images came after the backup, and were reported then."""
    store.record_instance(instance(7), "CT1", screenable=False, now=at(0))
    store.after_restore(tmp_path, tmp_path, now=at(1))
    store.record_instance(instance(1), "CT1", now=at(2))
    job = store.job(STUDY)
    assert job is not None
    assert (job.state, job.revision) == (JobState.RECEIVING, 1 + LIFT)


def test_a_retry_does_not_wait_for_a_clock_that_was_set_back(store: JobStore) -> None:
    hours = 5 * 3600
    job = claimed(store, hours)
    store.retry_later(job, "x", "y", at(hours + 100), now=at(hours + 10))
    assert store.claim("w", 60, now=at(hours + 20)) is None
    # set back by less than a step: it waits; by hours: it does not
    assert store.claim("w", 60, now=at(hours - 40)) is None
    again = store.claim("w", 60, now=at(60))
    assert again is not None
    assert again.attempts == 2


def test_no_one_leads_for_as_long_as_the_clock_was_set_back(store: JobStore) -> None:
    assert store.lead("scheduler", "one", 15, now=at(5 * 3600))
    assert not store.lead("scheduler", "two", 15, now=at(5 * 3600 + 10))
    assert not store.lead("scheduler", "two", 15, now=at(5 * 3600 - 30))
    assert store.lead("scheduler", "two", 15, now=at(60))
    assert not store.lead("scheduler", "one", 15, now=at(61))


def test_our_own_results_are_known(store: JobStore) -> None:
    job = claimed(store, 10)
    store.commit_report(job, RESULT, [report(ReportKind.SC, f"{STUDY}.1.55")], [])
    assert store.record_instance(instance(55), "PACS") is RecordOutcome.OWN_RESULT
    assert state_of(store) is JobState.REPORTED
    assert store.stored_instance(f"{STUDY}.1.55") is None


def test_a_held_study_waits_for_a_person(store: JobStore) -> None:
    job = claimed(store, 10)
    store.hold_study(STUDY, "operator", "wrong patient", now=at(11))
    with pytest.raises(LeaseLost):
        store.commit_report(job, RESULT, [], [])
    store.record_instance(instance(2), "CT1", now=at(12))
    assert state_of(store) is JobState.HELD
    store.retry_study(STUDY, "operator", "is right after all", now=at(13))
    again = store.claim("w", 60, now=at(14))
    assert again is not None
    assert again.attempts == 1
    assert [event.who for event in store.events(STUDY)][-2:] == ["operator", "w"]


def test_by_hand_only_what_makes_sense(store: JobStore) -> None:
    with pytest.raises(KeyError):
        store.hold_study("9.9.9", "operator", "x")
    job = claimed(store, 10)
    with pytest.raises(IllegalTransition):
        store.retry_study(STUDY, "operator", "x")
    with pytest.raises(IllegalTransition):
        store.reprocess_study(STUDY, "operator", "x")
    store.commit_report(job, RESULT, THREE, [])
    with pytest.raises(IllegalTransition):
        store.hold_study(STUDY, "operator", "x")
    store.reprocess_study(STUDY, "operator", "new bundle", now=at(20))
    again = store.claim("w", 60, now=at(21))
    assert again is not None
    assert (again.revision, again.attempts) == (2, 1)
    store.commit_report(again, {**RESULT, "n": 2}, [report(ReportKind.SR, "9.9")], [])
    assert store.result(STUDY) == {**RESULT, "n": 2}
    assert store.result(STUDY, 1) == RESULT
    assert {entry.sop_instance_uid for entry in store.report_objects(STUDY, 2)} == {"9.9"}
    assert len(store.report_objects(STUDY)) == 4


def test_a_report_and_its_deliveries_are_one_transaction(store: JobStore) -> None:
    job = claimed(store, 10)
    with pytest.raises(ValueError, match="not among"):
        store.commit_report(job, RESULT, THREE, [NewDelivery("pacs", ("9.9",))])
    two_of_one = [NewDelivery("pacs", ("9.1",)), NewDelivery("pacs", ("9.2",))]
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        store.commit_report(job, RESULT, THREE, two_of_one)
    assert store.report_objects(STUDY) == []
    assert store.result(STUDY) is None
    assert state_of(store) is JobState.SCREENING
    store.commit_report(job, RESULT, THREE, two_of_one[:1])
    assert state_of(store) is JobState.REPORTED


def test_one_uid_never_stands_for_other_bytes(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, [report(ReportKind.SR, "9.2")], [])
    other = claimed(store, 100, "1.9")
    with pytest.raises(ValueError, match="other bytes"):
        store.commit_report(other, RESULT, [report(ReportKind.SR, "9.2", "b" * 64)], [])


def test_delivery_in_order_then_delivered(store: JobStore) -> None:
    job = claimed(store, 10)
    store.commit_report(
        job, RESULT, THREE, [NewDelivery("pacs", ("9.3", "9.2", "9.1")), NewDelivery("other", ("9.2",))], now=at(11)
    )
    first = store.claim_delivery("d", 60, now=at(12))
    assert first is not None
    assert first.destination == "pacs"
    assert [entry.report.kind for entry in first.objects] == [ReportKind.SEG, ReportKind.SR, ReportKind.SC]
    assert [entry.report for entry in first.objects] == [THREE[2], THREE[1], THREE[0]]
    with pytest.raises(ValueError, match="not accepted"):
        store.delivery_done(first, "stored")
    for entry in first.unsent:
        store.delivery_object_sent(first, entry.sop_instance_uid, "0x0000", now=at(13))
    store.delivery_done(first, "stored", now=at(14))
    assert state_of(store) is JobState.REPORTED
    second = store.claim_delivery("d", 60, now=at(15))
    assert second is not None
    assert second.destination == "other"
    store.delivery_object_sent(second, "9.2", "0xB000", now=at(16))
    store.delivery_done(second, "committed", now=at(17))
    assert state_of(store) is JobState.DELIVERED
    assert {entry.outcome for entry in store.deliveries(study_instance_uid=STUDY)} == {"stored", "committed"}
    assert store.claim_delivery("d", 60, now=at(1000)) is None


def test_a_retried_delivery_skips_what_was_accepted(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, THREE, [NewDelivery("pacs", ("9.1", "9.2"))], now=at(11))
    first = store.claim_delivery("d", 60, now=at(12))
    assert first is not None
    store.delivery_object_sent(first, "9.1", "0x0000")
    store.delivery_retry(first, at(100), "refused connection", now=at(13))
    assert store.claim_delivery("d", 60, now=at(99)) is None
    again = store.claim_delivery("d", 60, now=at(100))
    assert again is not None
    assert [entry.sop_instance_uid for entry in again.unsent] == ["9.2"]
    assert (again.attempts, again.detail, again.created_at) == (2, "refused connection", at(11))


def test_a_delivery_is_fenced(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, THREE, [NewDelivery("pacs", ("9.1",))], now=at(11))
    first = store.claim_delivery("d", 60, now=at(12))
    assert first is not None
    store.heartbeat_delivery(first, 60, now=at(60))
    assert store.claim_delivery("e", 60, now=at(119)) is None
    second = store.claim_delivery("e", 60, now=at(121))
    assert second is not None
    for attempt in (
        lambda: store.delivery_object_sent(first, "9.1", "0x0000"),
        lambda: store.delivery_done(first, "stored"),
        lambda: store.delivery_retry(first, at(1), "x"),
        lambda: store.delivery_refused(first, "x"),
        lambda: store.delivery_release(first),
        lambda: store.heartbeat_delivery(first, 60),
    ):
        with pytest.raises(LeaseLost):
            attempt()


def test_dead_letters_are_kept_and_sent_again_by_hand(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, THREE, [NewDelivery("pacs", ("9.1", "9.2"))], now=at(11))
    delivery = store.claim_delivery("d", 60, now=at(12))
    assert delivery is not None
    store.delivery_object_sent(delivery, "9.1", "0x0000")
    store.delivery_refused(delivery, "0x0122", now=at(13))
    assert store.claim_delivery("d", 60, now=at(99999)) is None
    assert state_of(store) is JobState.REPORTED
    (dead,) = store.deliveries(state=DeliveryState.REFUSED)
    assert dead.detail == "0x0122"
    store.resend(dead.delivery_id, "operator", now=at(20))
    again = store.claim_delivery("d", 60, now=at(21))
    assert again is not None
    assert (again.attempts, len(again.unsent), again.created_at) == (1, 2, at(20))
    with pytest.raises(KeyError):
        store.resend(dead.delivery_id, "operator")


def test_release_of_a_delivery_does_not_count(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, THREE, [NewDelivery("pacs", ("9.1",))], now=at(11))
    for _ in range(3):
        delivery = store.claim_delivery("d", 60, now=at(12))
        assert delivery is not None
        assert delivery.attempts == 1
        store.delivery_release(delivery, now=at(12))


def test_revisions_reach_a_destination_in_order(store: JobStore) -> None:
    store.commit_report(claimed(store, 10), RESULT, THREE[:1], [NewDelivery("pacs", ("9.3",))], now=at(11))
    store.reprocess_study(STUDY, "operator", "x", now=at(12))
    job = store.claim("w", 60, now=at(13))
    assert job is not None
    store.commit_report(job, RESULT, [report(ReportKind.SR, "9.9")], [NewDelivery("pacs", ("9.9",))], now=at(14))
    first = store.claim_delivery("d", 60, now=at(15))
    assert first is not None
    assert first.revision == 1
    assert store.claim_delivery("e", 60, now=at(15)) is None
    store.delivery_retry(first, at(1000), "down", now=at(16))
    assert store.claim_delivery("e", 60, now=at(17)) is None
    first = store.claim_delivery("d", 60, now=at(1000))
    assert first is not None
    store.delivery_object_sent(first, "9.3", "0x0000")
    store.delivery_done(first, "stored")
    assert state_of(store) is JobState.REPORTED
    second = store.claim_delivery("e", 60, now=at(1001))
    assert second is not None
    assert second.revision == 2
    store.delivery_object_sent(second, "9.9", "0x0000")
    store.delivery_done(second, "stored")
    assert state_of(store) is JobState.DELIVERED


def test_only_one_of_many_workers_gets_a_job(store: JobStore) -> None:
    for number in range(5):
        ready(store, f"1.{number}")
    got: list[Job] = []

    def work(worker: str) -> None:
        while (job := store.claim(worker, 600, now=at(10))) is not None:
            got.append(job)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job.study_instance_uid for job in got) == [f"1.{number}" for number in range(5)]


def test_classes_in_order_and_within_one_the_sources_in_turn(store: JobStore) -> None:
    arrivals = [
        ("1.1", "ARCHIVE", Priority.ROUTINE),
        ("1.2", "ARCHIVE", Priority.ROUTINE),
        ("1.3", "ARCHIVE", Priority.ROUTINE),
        ("2.1", "CT1", Priority.ROUTINE),
        ("2.2", "CT1", Priority.ROUTINE),
        ("3.1", "CT1", Priority.REFIT),
        ("4.1", "CT1", Priority.BACKFILL),
        ("4.2", "ARCHIVE", Priority.BACKFILL),
        ("5.1", "ARCHIVE", Priority.STAT),
    ]
    for seconds, (study, source, priority) in enumerate(arrivals):
        store.record_instance(instance(1, study), source, priority=priority, now=at(seconds))
        store.mark_complete(study, who="test", reason="test", now=at(seconds))
    order = []
    while (job := store.claim("w", 60, now=at(20))) is not None:
        order.append(job.study_instance_uid)
    # ARCHIVE was served with 5.1 and with each of its own, so that CT1 is next every time
    assert order == ["5.1", "2.1", "1.1", "2.2", "1.2", "1.3", "4.1", "4.2", "3.1"]


def test_lists_filter_and_page(store: JobStore) -> None:
    for number in range(1, 6):
        store.record_instance(instance(1, f"1.{number}"), f"CT{number % 2}", now=at(number))
        store.record_instance(instance(2, f"1.{number}"), f"CT{number % 2}", now=at(number))
    complete_quiet(store, 1, now=at(4))
    assert [job.study_instance_uid for job in store.recent(limit=2)] == ["1.5", "1.4"]
    page = store.recent(limit=2)
    assert [job.study_instance_uid for job in store.recent(before_job_id=page[-1].job_id)] == ["1.3", "1.2", "1.1"]
    assert [job.study_instance_uid for job in store.recent(source_ae="CT0")] == ["1.4", "1.2"]
    assert [job.instances for job in store.recent(state=JobState.READY)] == [2, 2, 2]
    assert [job.study_instance_uid for job in store.recent(study_instance_uid="1.2")] == ["1.2"]
    counts = store.counts_by_state()
    assert counts[JobState.READY] == 3
    assert counts[JobState.RECEIVING] == 2
    assert set(counts) == set(JobState)


def test_every_transition_of_the_table_leads_to_a_state_of_it() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for targets in TRANSITIONS.values() for state in targets} <= set(JobState)


def test_an_exclusion_that_somebody_wants_to_know_is_delivered_and_keeps_its_reason(store: JobStore) -> None:
    ready(store)
    job = claimed(store)
    told = report(ReportKind.SR, "9.1")
    with pytest.raises(ValueError, match="not among the report objects"):
        store.exclude(job, "uneven_geometry", "gaps", RESULT, [told], [NewDelivery("pacs", ("9.9",))])
    assert state_of(store) is JobState.SCREENING
    store.exclude(job, "uneven_geometry", "gaps", RESULT, [told], [NewDelivery("pacs", ("9.1",))], now=at(20))
    assert state_of(store) is JobState.REPORTED
    assert [event.to_state for event in store.events(STUDY)][-2:] == [JobState.EXCLUDED, JobState.REPORTED]
    (row,) = store.recent()
    assert (row.code, row.detail) == ("uneven_geometry", "gaps")
    assert [entry.sop_instance_uid for entry in store.report_objects(STUDY)] == ["9.1"]
    delivery = store.claim_delivery("d", 60, now=at(30))
    assert delivery is not None
    assert delivery.destination == "pacs"
