"""What goes and what must stay, on files that are there."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import IllegalTransition, LeaseLost, StoreUnavailable, Transient
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, RecordOutcome, ReportKind, ReportObject
from osteo_daemon.jobs.schema import JobRow
from osteo_daemon.jobs.spool import Spool, StoredFile
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.retention_sweep import RetentionSweep
from osteo_daemon.settings import Settings
from tests.postgres import SHARED_MEMORY, Cluster
from tests.stores import complete_quiet, new_sqlite
from tests.unit.test_jobs_store import RESULT, at

STUDY = "1.2.3"


@pytest.fixture
def spool() -> Iterator[Spool]:
    # in memory: what is asked here is order, not durability
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        yield Spool(Path(folder) / "spool")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, spool: Spool) -> Iterator[JobStore]:
    if request.param == "sqlite":
        store = new_sqlite(spool.root.parent)
    else:
        server: Cluster = request.getfixturevalue("postgres")
        store = JobStore(server.new())
    yield store
    store.close()


def write(spool: Spool, number: int, study: str = STUDY, content: bytes = b"pixels") -> SopInstance:
    uid = f"{study}.1.{number}"
    stored = spool.store_instance(study, f"{study}.1", uid, [content, b"%d" % number])
    return SopInstance(study, f"{study}.1", "1.2", uid, "1.2", stored.path, stored.size_bytes, stored.sha256)


def receive(store: JobStore, spool: Spool, number: int, study: str = STUDY) -> SopInstance:
    instance = write(spool, number, study)
    assert store.record_instance(instance, "CT1", now=at(0)) is RecordOutcome.STORED
    return instance


def claimed(store: JobStore, spool: Spool, count: int = 3, study: str = STUDY) -> Job:
    for number in range(count):
        receive(store, spool, number, study)
    complete_quiet(store, 1, now=at(2))
    job = store.claim("w", 60, now=at(3))
    assert job is not None
    return job


def reported(store: JobStore, spool: Spool, job: Job) -> ReportObject:
    uid = f"{job.study_instance_uid}.9.{job.revision}"
    stored = spool.store_report(job.study_instance_uid, uid, [b"report"])
    entry = ReportObject(ReportKind.SR, "1.2", uid, stored.path, stored.size_bytes, stored.sha256)
    store.commit_report(job, RESULT, [entry], [NewDelivery("pacs", (uid,))], now=at(4))
    return entry


def delivered(store: JobStore, spool: Spool, count: int = 3, study: str = STUDY) -> ReportObject:
    entry = reported(store, spool, claimed(store, spool, count, study))
    delivery = store.claim_delivery("d", 60, now=at(5))
    assert delivery is not None
    store.delivery_object_sent(delivery, entry.sop_instance_uid, "0x0000", now=at(6))
    store.delivery_done(delivery, "stored", now=at(7))
    return entry


def test_images_of_delivered_studies_go_after_their_time(store: JobStore, spool: Spool) -> None:
    report = delivered(store, spool, 120)
    assert store.purgeable_images(at(7)) == []
    assert store.purgeable_images(at(8)) == [STUDY]
    assert not store.purge_finished(STUDY, spool, before=at(7), images=True, reports=False, now=at(9))
    assert store.purge_finished(STUDY, spool, before=at(8), images=True, reports=False, now=at(9))
    assert spool.received_files(STUDY) == []
    assert not spool.study_folder("received", STUDY).exists()
    assert report.path.exists()
    (job,) = store.recent()
    assert (job.state, job.instances) == (JobState.DELIVERED, 0)
    assert store.result(STUDY) == RESULT
    assert store.purgeable_images(at(1000)) == []
    assert store.purgeable_reports(at(8)) == [STUDY]
    store.purge_finished(STUDY, spool, before=at(8), images=False, reports=True, now=at(10))
    assert not report.path.exists()
    assert store.report_objects(STUDY) == []
    assert [entry.sop_instance_uid for entry in store.report_objects(STUDY, also_removed=True)] == [f"{STUDY}.9.1"]
    assert store.purgeable_reports(at(1000)) == []
    assert [event.event for event in store.events(STUDY)].count("study_purged") == 2
    with pytest.raises(IllegalTransition, match="removed on 2026-01-01"):
        store.reprocess_study(STUDY, "operator", "again")


@pytest.mark.parametrize(
    ("images_days", "excluded_days", "left"),
    [
        (30, None, {"1.young", "2.young"}),
        (30, 0, {"1.old", "1.young", "2.young"}),
        (0, 30, {"1.young", "2.old", "2.young"}),
        (0, None, {"1.old", "1.young", "2.old", "2.young"}),
        (60, 5, {"2.old", "2.young"}),
    ],
)
def test_each_finished_state_has_its_age(
    spool: Spool, images_days: float, excluded_days: float | None, left: set[str]
) -> None:
    """Studies 1 were excluded, studies 2 delivered; the old ones forty days ago, the young ones ten."""
    settings = Settings.model_validate(
        {
            "state_dir": spool.root.parent,
            "destinations": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}],
            "retention": {"images_days": images_days}
            | ({"excluded_days": excluded_days} if excluded_days is not None else {}),
        }
    )
    store = new_sqlite(spool.root.parent)
    now = datetime.now(UTC)
    numbers = {"1.old": "1.1", "1.young": "1.2", "2.old": "2.1", "2.young": "2.2"}
    for name, study in numbers.items():
        if name.startswith("2"):
            delivered(store, spool, 1, study)
        else:
            store.exclude(claimed(store, spool, 1, study), "no_ct_series", "none", RESULT, now=at(4))
        age = timedelta(days=40 if name.endswith("old") else 10)
        with store._writing() as connection:
            connection.execute(update(JobRow).where(JobRow.study_instance_uid == study).values(changed_at=now - age))
    RetentionSweep(settings, store, lambda: datetime.now(UTC), lambda: False).run()
    assert {name for name, study in numbers.items() if spool.received_files(study)} == left
    # by the store's own rule no caller can widen: unfinished states are none of a sweep's business
    assert store.purgeable_images(now + timedelta(days=99), states=[JobState.FAILED, JobState.READY]) == []
    store.close()


def test_a_file_that_a_later_header_replaced_goes_too(store: JobStore, spool: Spool) -> None:
    receive(store, spool, 1)
    other = write(spool, 1, content=b"other header")
    assert store.replace_instance(other, "CT1", now=at(0)) is RecordOutcome.REPLACED
    complete_quiet(store, 1, now=at(2))
    job = store.claim("w", 60, now=at(3))
    assert job is not None
    store.exclude(job, "no_ct_series", "none", RESULT, now=at(4))
    assert len(spool.received_files(STUDY)) == 2
    store.purge_finished(STUDY, spool, before=at(5), images=True, reports=True, now=at(6))
    assert spool.received_files(STUDY) == []


@pytest.mark.parametrize("state", ["RECEIVING", "READY", "SCREENING", "REPORTED", "HELD", "FAILED"])
def test_nothing_unfinished_ever_goes_by_itself(store: JobStore, spool: Spool, state: str) -> None:
    if state == "RECEIVING":
        receive(store, spool, 1)
    elif state == "READY":
        receive(store, spool, 1)
        complete_quiet(store, 1, now=at(2))
    else:
        job = claimed(store, spool, 1)
        if state == "REPORTED":
            reported(store, spool, job)
        elif state == "HELD":
            store.hold(job, "damaged", "x", now=at(4))
        elif state == "FAILED":
            store.fail(job, "x", "y", now=at(4))
    assert store.recent()[0].state.value == state
    ever = at(10**8)
    assert store.purgeable_images(ever) == store.purgeable_reports(ever) == []
    assert not store.purge_finished(STUDY, spool, before=ever, images=True, reports=True)
    with pytest.raises(IllegalTransition):
        store.purge_study(STUDY, spool, "operator", "room")
    assert len(spool.received_files(STUDY)) == 1
    assert store.being_purged() == []

    store.purge_study(STUDY, spool, "operator", "room", force=True, now=at(200))
    assert spool.received_files(STUDY) == spool.report_files(STUDY) == []
    (summary,) = store.recent()
    ended = {"REPORTED": "FAILED", "FAILED": "FAILED"}.get(state, "HELD")
    assert summary.state.value == ended
    assert store.claim("w", 60, now=at(10**6)) is None
    assert store.claim_delivery("d", 60, now=at(10**6)) is None
    assert all(entry.state is DeliveryState.REFUSED for entry in store.deliveries())
    event = store.events(STUDY)[-1]
    assert (event.who, event.event, event.reason) == ("operator", "study_purged", "room")
    # the study comes again: screened like a new one
    assert store.record_instance(write(spool, 1), "CT1", now=at(300)) is RecordOutcome.STORED
    again = store.job(STUDY)
    assert again is not None
    assert (again.state, again.revision) == (JobState.RECEIVING, 2)


def test_a_report_still_owed_to_one_destination_stays(store: JobStore, spool: Spool) -> None:
    delivered(store, spool)
    store.reprocess_study(STUDY, "operator", "x", now=at(10))
    job = store.claim("w", 60, now=at(11))
    assert job is not None
    reported(store, spool, job)
    delivery = store.claim_delivery("d", 60, now=at(12))
    assert delivery is not None
    store.delivery_refused(delivery, "0x0122", now=at(13))
    assert store.purgeable_reports(at(10**6)) == []


def test_a_purge_that_was_cut_off_goes_on(store: JobStore, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered(store, spool, 120)

    class PowerCut(BaseException):
        pass

    cut_after = iter([False, True])
    remove = spool.remove

    def failing(paths: object) -> None:
        listed = list(paths)  # type: ignore[call-overload]
        if next(cut_after):
            remove(listed[:7])
            raise PowerCut
        remove(listed)

    monkeypatch.setattr(spool, "remove", failing)
    with pytest.raises(PowerCut):
        store.purge_finished(STUDY, spool, before=at(8), images=True, reports=False, now=at(9))
    monkeypatch.undo()
    assert store.being_purged() == [STUDY]
    assert len(spool.received_files(STUDY)) == 120 - 50 - 7
    # meanwhile nothing may be acknowledged into it, new or known
    for number in (1, 119, 500):
        with pytest.raises(StoreUnavailable):
            store.record_instance(write(spool, number), "CT1", now=at(10))
    store.finish_purge(STUDY, spool, now=at(11))
    assert store.being_purged() == []
    assert spool.received_files(STUDY) == []
    assert store.recent()[0].instances == 0
    assert store.record_instance(write(spool, 1), "CT1", now=at(12)) is RecordOutcome.STORED


def test_a_file_that_went_before_its_row_came_is_not_acknowledged(store: JobStore, spool: Spool) -> None:
    """The sender's bytes are on disk, retention removes them, and only then the row is to be written."""
    delivered(store, spool)
    late = write(spool, 7)
    store.purge_finished(STUDY, spool, before=at(8), images=True, reports=False, now=at(9))
    with pytest.raises(StoreUnavailable):
        store.record_instance(late, "CT1", now=at(10))
    assert store.stored_instance(late.sop_instance_uid) is None


def test_arrivals_and_purges_at_once_lose_nothing_acknowledged(store: JobStore, spool: Spool) -> None:
    acknowledged: set[Path] = set()
    ended = threading.Event()
    sent = purges = 0

    def send() -> None:
        nonlocal sent
        try:
            for number in range(60):
                with suppress(Transient):  # not acknowledged: the sender sends it again
                    instance = write(spool, number % 5)
                    store.record_instance(instance, "CT1", now=at(0))
                    acknowledged.add(instance.path)
                sent += 1
        finally:
            ended.set()

    sender = threading.Thread(target=send)
    sender.start()
    while not ended.is_set():
        complete_quiet(store, 0, now=at(1))
        if (job := store.claim("w", 60, now=at(2))) is not None:
            with suppress(LeaseLost):  # a further slice came meanwhile
                store.exclude(job, "no_ct_series", "none", RESULT, now=at(3))
        purges += store.purge_finished(STUDY, spool, before=at(4), images=True, reports=True, now=at(5))
    sender.join()
    job = store.job(STUDY)
    assert job is not None
    assert all(entry.path.exists() for entry in store.instances(job))
    assert purges > 0
    assert sent == 60
    assert acknowledged


def test_quarantine_and_history_go_by_age(store: JobStore, spool: Spool) -> None:
    delivered(store, spool)
    entry = write(spool, 1, content=b"conflict")
    kept = spool.quarantine(STUDY, entry.sop_instance_uid, StoredFile(entry.path, entry.size_bytes, entry.sha256))
    conflict = SopInstance(
        STUDY, f"{STUDY}.1", "1.2", entry.sop_instance_uid, "1.2", kept.path, kept.size_bytes, kept.sha256
    )
    store.quarantine_instance(conflict, "CT1", "other pixels", now=at(20))
    assert store.purge_quarantine(at(20), spool) == 0
    assert store.purge_quarantine(at(21), spool) == 1
    assert not kept.path.exists()
    assert store.quarantined() == []
    receive(store, spool, 1, "1.9")
    before = len(store.events(STUDY))
    assert store.forget_events(at(2)) == 1
    assert len(store.events(STUDY)) == before - 1
    assert len(store.events("1.9")) == 1  # unfinished: its history stays


def test_only_files_of_the_spool_are_removed(spool: Spool) -> None:
    outside = spool.root.parent / "outside.dcm"
    outside.write_bytes(b"x")
    for path in (outside, spool.root / ".." / "outside.dcm"):
        with pytest.raises(ValueError, match="not in the spool"):
            spool.remove([path])
    assert outside.exists()


def test_accompanying_objects_go_too(store: JobStore, spool: Spool) -> None:
    alone = write(spool, 1, "1.9")
    store.record_instance(alone, "CT1", screenable=False, now=at(0))
    delivered(store, spool)
    for study in (STUDY, "1.9"):
        assert study in store.purgeable_images(at(1000))
        assert store.purge_finished(study, spool, before=at(1000), images=True, reports=False, now=at(1000))
    assert not alone.path.exists()
    # one that comes after its study's images went waits its own time, and goes
    late = write(spool, 9)
    store.record_instance(late, "CT1", screenable=False, now=at(2000))
    assert store.purgeable_images(at(2000)) == []
    assert store.purgeable_images(at(3000)) == [STUDY]
    assert store.purge_finished(STUDY, spool, before=at(3000), images=True, reports=False, now=at(3000))
    assert not late.path.exists()
    assert store.purgeable_images(at(4000)) == []
