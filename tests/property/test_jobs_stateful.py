"""The job store against a small model: any order of arrivals, claims, ends, deliveries, hands and clock steps."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Row, select

from osteo_daemon.domain.job import FINISHED, TRANSITIONS, Job, JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import IllegalTransition, LeaseLost
from osteo_daemon.jobs import outcomes
from osteo_daemon.jobs.records import Delivery, DeliveryState, NewDelivery, RecordOutcome, ReportKind, ReportObject
from osteo_daemon.jobs.schema import JobRow
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from tests.postgres import Cluster
from tests.stores import complete_quiet, new_sqlite

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
LEASE_SECONDS = 60.0
MAXIMUM_ATTEMPTS = 3
STUDIES = st.sampled_from(["1.1", "1.2"])
ENDS = st.sampled_from(
    ["report", "report_without_destination", "exclude", "hold", "fail", "retry", "retry_uncharged", "release"]
)
HANDS = st.sampled_from(["hold_study", "release_study", "retry_study", "reprocess_study"])
LIMIT_SECONDS = 100.0


class StoreMachine(RuleBasedStateMachine):
    """What must hold after every step stands in the invariants."""

    jobs = Bundle("jobs")
    deliveries = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        # in memory where there is such a folder: what is asked here is order, not durability
        self.folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
        self.store = self.open_store()
        self.spool = Spool(self.folder / "spool")
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.instances: dict[str, set[str]] = {}
        self.newest_claim: dict[str, Job] = {}
        self.newest_delivery: dict[int, Delivery] = {}
        self.committed: dict[tuple[str, int], tuple[str, ...]] = {}
        self.purged: set[tuple[str, int]] = set()

    def open_store(self) -> JobStore:
        return new_sqlite(self.folder)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def state(self, study: str) -> JobState | None:
        job = self.store.job(study)
        return None if job is None else job.state

    @rule(study=STUDIES, number=st.integers(1, 4), other=st.booleans())
    def instance_arrives(self, study: str, number: int, other: bool) -> None:
        uid = f"{study}.7.{number}"
        stored = self.spool.store_instance(study, f"{study}.7", uid, [f"{number} {other}".encode()])
        instance = SopInstance(study, f"{study}.7", "1.2", uid, "1.2", stored.path, stored.size_bytes, stored.sha256)
        known = uid in self.instances.get(study, set())
        before = self.store.job(study)
        outcome = self.store.record_instance(instance, "CT", now=self.now)
        after = self.store.job(study)
        assert after is not None
        if known:
            assert outcome in (RecordOutcome.DUPLICATE, RecordOutcome.CONFLICT)
            assert after == before
            return
        assert outcome is RecordOutcome.STORED
        self.instances.setdefault(study, set()).add(uid)
        if before is None:
            assert (after.state, after.revision) == (JobState.RECEIVING, 1)
        elif before.state is JobState.EXCLUDED and before.attempts == 0:
            # nothing but accompanying objects had come: nothing was screened, so this is no further revision
            assert (after.state, after.revision) == (JobState.RECEIVING, before.revision)
        elif before.state is JobState.RECEIVING or (before.state is JobState.HELD and after.state is JobState.HELD):
            assert after == before
        else:
            assert (after.state, after.revision) == (JobState.RECEIVING, before.revision + 1)

    @rule(study=STUDIES, number=st.integers(1, 2))
    def accompanying_object_arrives(self, study: str, number: int) -> None:
        uid = f"{study}.8.{number}"
        stored = self.spool.store_instance(study, f"{study}.8", uid, [b"%d" % number])
        instance = SopInstance(study, f"{study}.8", "1.3", uid, "1.2", stored.path, stored.size_bytes, stored.sha256)
        before = self.store.job(study)
        self.store.record_instance(instance, "CT", screenable=False, now=self.now)
        self.instances.setdefault(study, set()).add(uid)
        after = self.store.job(study)
        assert after is not None
        assert after == before or (before, after.state, after.attempts) == (None, JobState.EXCLUDED, 0)

    @rule(seconds=st.sampled_from([1.0, 30.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def sweep(self) -> None:
        complete_quiet(self.store, 20, now=self.now)

    @rule(target=jobs, worker=st.sampled_from(["w1", "w2"]))
    def claim(self, worker: str) -> object:
        before = {study: self.store.job(study) for study in self.instances}
        job = self.store.claim(worker, LEASE_SECONDS, MAXIMUM_ATTEMPTS, limit_seconds=LIMIT_SECONDS, now=self.now)
        if job is None:
            return multiple()
        previous = before[job.study_instance_uid]
        assert previous is not None
        assert job.fencing_token == previous.fencing_token + 1
        assert 1 <= job.attempts == previous.attempts + 1 <= MAXIMUM_ATTEMPTS
        if previous.state is JobState.SCREENING:
            assert previous.lease_until is not None
            assert previous.lease_until < self.now
        else:
            assert previous.state is JobState.READY
            assert previous.not_before is None or previous.not_before <= self.now
        self.newest_claim[job.study_instance_uid] = job
        return job

    @rule(study=STUDIES, number=st.integers(1, 4), end=ENDS, sent=st.booleans(), refused=st.booleans())
    def whole_way(self, study: str, number: int, end: str, sent: bool, refused: bool) -> None:
        """As most studies go: without it, random steps hardly ever reach the ends."""
        self.instance_arrives(study=study, number=number, other=False)
        self.time_passes(seconds=30.0)
        self.sweep()
        for _ in range(len(self.instances) + 1):
            job = self.claim(worker="w1")
            if isinstance(job, Job):
                self.end(job=job, end=end)
        while sent and isinstance(delivery := self.claim_delivery(), Delivery):
            self.end_delivery(delivery=delivery, end="refuse" if refused else "done")

    @rule(job=jobs)
    def heartbeat(self, job: Job) -> None:
        assert job.deadline is not None
        if self.holds(job) and self.now < job.deadline:
            self.store.heartbeat(job, LEASE_SECONDS, now=self.now)
            present = self.store.job(job.study_instance_uid)
            assert present is not None
            assert present.lease_until == min(self.now + timedelta(seconds=LEASE_SECONDS), job.deadline)
        else:
            with pytest.raises(LeaseLost):
                self.store.heartbeat(job, LEASE_SECONDS, now=self.now)

    def holds(self, job: Job) -> bool:
        present = self.store.job(job.study_instance_uid)
        assert present is not None
        return present.state is JobState.SCREENING and self.newest_claim[job.study_instance_uid] == job

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def worker_dies(self, worker: str) -> None:
        self.store.worker_ended(worker, "killed", now=self.now)

    @rule(job=consumes(jobs), end=ENDS)
    def end(self, job: Job, end: str) -> None:
        holds = self.holds(job)
        before = self.store.job(job.study_instance_uid)
        uids = tuple(f"{job.study_instance_uid}.9.{job.revision}.{job.fencing_token}.{n}" for n in range(2))
        try:
            self.do_end(job, end, uids)
        except LeaseLost:
            assert not holds
            assert self.store.job(job.study_instance_uid) == before
            assert not {o.sop_instance_uid for o in self.store.report_objects(job.study_instance_uid)} & set(uids)
            return
        assert holds
        if end.startswith("report"):
            assert (job.study_instance_uid, job.revision) not in self.committed
            self.committed[job.study_instance_uid, job.revision] = uids

    def do_end(self, job: Job, end: str, uids: tuple[str, ...]) -> None:
        result = {"schema": "osteo-result/1", "revision": job.revision}
        kinds = (ReportKind.SC, ReportKind.SR)
        path = self.spool.root / "reports" / "r"
        objects = [ReportObject(kind, "1.2", uid, path, 1, "a") for kind, uid in zip(kinds, uids, strict=True)]
        if end == "report":
            self.store.commit_report(
                job, result, objects, [NewDelivery("a", uids), NewDelivery("b", uids[:1])], now=self.now
            )
        elif end == "report_without_destination":
            self.store.commit_report(job, result, objects, [], now=self.now)
        elif end == "exclude":
            self.store.exclude(job, "no_ct_series", "none", result, now=self.now)
        elif end == "hold":
            self.store.hold(job, "damaged", "x", now=self.now)
        elif end == "fail":
            self.store.fail(job, "failed", "x", now=self.now)
        elif end.startswith("retry"):
            charged = end == "retry"
            self.store.retry_later(
                job, "Transient", "x", self.now + timedelta(seconds=40), charged=charged, now=self.now
            )
            present = self.store.job(job.study_instance_uid)
            assert present is not None
            assert present.attempts == job.attempts - (not charged)
        else:
            self.store.release(job, now=self.now)

    @rule(target=deliveries)
    def claim_delivery(self) -> object:
        delivery = self.store.claim_delivery("d", LEASE_SECONDS, now=self.now)
        if delivery is None:
            return multiple()
        assert [entry.report.kind for entry in delivery.objects] == sorted(
            (entry.report.kind for entry in delivery.objects), key=list(ReportKind).index
        )
        for other in self.store.deliveries(study_instance_uid=delivery.study_instance_uid):
            if other.destination == delivery.destination and other.revision < delivery.revision:
                assert other.state in (DeliveryState.DELIVERED, DeliveryState.REFUSED)
        self.newest_delivery[delivery.delivery_id] = delivery
        return delivery

    @rule(delivery=consumes(deliveries), end=st.sampled_from(["done", "retry", "refuse", "release"]))
    def end_delivery(self, delivery: Delivery, end: str) -> None:
        present = next(d for d in self.store.deliveries() if d.delivery_id == delivery.delivery_id)
        holds = present.state is DeliveryState.SENDING and present.fencing_token == delivery.fencing_token
        try:
            if end == "done":
                for entry in delivery.unsent:
                    self.store.delivery_object_sent(delivery, entry.sop_instance_uid, "0x0000", now=self.now)
                self.store.delivery_done(delivery, "stored", now=self.now)
            elif end == "retry":
                self.store.delivery_retry(delivery, self.now + timedelta(seconds=10), "x", now=self.now)
            elif end == "refuse":
                self.store.delivery_refused(delivery, "x", now=self.now)
            else:
                self.store.delivery_release(delivery, now=self.now)
        except LeaseLost:
            assert not holds
            return
        assert holds

    @precondition(lambda self: self.instances)
    @rule(study=STUDIES, hand=HANDS)
    def person_acts(self, study: str, hand: str) -> None:
        before = self.store.job(study)
        try:
            getattr(self.store, hand)(study, "operator", "because", now=self.now)
        except KeyError:
            assert before is None
        except IllegalTransition:
            assert self.store.job(study) == before

    @precondition(lambda self: self.instances)
    @rule(study=STUDIES, priority=st.sampled_from(Priority))
    def person_hurries(self, study: str, priority: Priority) -> None:
        before = self.store.job(study)
        try:
            self.store.prioritise_study(study, priority, "operator", "because", now=self.now)
        except KeyError:
            assert before is None
        except IllegalTransition:
            assert before is not None
            assert before.state in FINISHED
        else:
            assert before is not None
            assert self.store.job(study) == replace(before, priority=priority)

    @precondition(lambda self: self.instances)
    @rule(study=STUDIES, force=st.booleans())
    def person_purges(self, study: str, force: bool) -> None:
        before = self.store.job(study)
        owed = any(d.state is not DeliveryState.DELIVERED for d in self.store.deliveries(study_instance_uid=study))
        try:
            self.store.purge_study(study, self.spool, "operator", "because", force=force, now=self.now)
        except KeyError:
            assert before is None
        except IllegalTransition:
            assert before is not None
            assert not force
            assert owed or before.state not in FINISHED
            assert self.store.job(study) == before
        else:
            assert before is not None
            assert force or (before.state in FINISHED and not owed)
            self.gone(study, reports=True)
            assert self.store.report_objects(study) == []

    @rule(seconds=st.sampled_from([0.0, 60.0]), reports=st.booleans())
    def retention(self, seconds: float, reports: bool) -> None:
        before = self.now - timedelta(seconds=seconds)
        for study in self.store.purgeable_images(before):
            job = self.store.job(study)
            assert job is not None
            assert job.state in FINISHED
            assert self.store.purge_finished(study, self.spool, before=before, images=True, reports=False, now=self.now)
            self.gone(study, reports=False)
        for study in self.store.purgeable_reports(before) if reports else ():
            assert all(d.state is DeliveryState.DELIVERED for d in self.store.deliveries(study_instance_uid=study))
            assert self.store.purge_finished(study, self.spool, before=before, images=False, reports=True, now=self.now)
            self.gone(study, images=False)

    def gone(self, study: str, *, images: bool = True, reports: bool = True) -> None:
        if images:
            self.instances[study] = set()
            assert self.spool.received_files(study) == []
        if reports:
            self.purged |= {key for key in self.committed if key[0] == study}

    @rule()
    def fold(self) -> None:
        self.store.fold_counts()

    @invariant()
    def counters_count(self) -> None:
        counted = dict.fromkeys(JobState, 0)
        for study in self.instances:
            job = self.store.job(study)
            assert job is not None
            counted[job.state] += 1
        assert self.store.counts_by_state() == counted
        standing = Counter((delivery.destination, delivery.state) for delivery in self.store.deliveries(limit=10**6))
        assert self.store.delivery_counts() == standing
        assert self.store.wrong_counts() == {}
        for summary in self.store.recent():
            assert summary.instances == len(self.instances[summary.study_instance_uid])

    @invariant()
    def history_is_one_legal_walk(self) -> None:
        for study in self.instances:
            job = self.store.job(study)
            assert job is not None
            state, revision = None, 0
            for event in self.store.events(study):
                if event.to_state is None:
                    continue
                assert event.from_state is state
                if state is not None:
                    assert event.to_state in TRANSITIONS[state]
                assert event.revision >= revision
                state, revision = event.to_state, event.revision
            assert (state, revision) == (job.state, job.revision)

    @invariant()
    def what_is_reported_is_complete(self) -> None:
        for study in self.instances:
            job = self.store.job(study)
            assert job is not None
            assert {entry.sop_instance_uid for entry in self.store.instances(job)} == self.instances[study]
            assert all(entry.path.is_file() for entry in self.store.instances(job))
            if job.state in (JobState.RECEIVING, JobState.READY, JobState.SCREENING):
                assert self.instances[study]  # what is to be screened has images
            assert job.attempts <= MAXIMUM_ATTEMPTS
            assert (job.lease_until is not None) == (job.state is JobState.SCREENING)
            found = {entry.sop_instance_uid for entry in self.store.report_objects(study)}
            assert found == {
                uid
                for key, uids in self.committed.items()
                if key[0] == study and key not in self.purged
                for uid in uids
            }
            present = [d for d in self.store.deliveries(study_instance_uid=study) if d.revision == job.revision]
            if job.state in (JobState.REPORTED, JobState.DELIVERED):
                assert (study, job.revision) in self.committed
                assert self.store.result(study, job.revision) is not None
            if job.state is JobState.DELIVERED:
                assert present
                assert all(d.state is DeliveryState.DELIVERED for d in present)
            if job.state is JobState.REPORTED and present:
                assert any(d.state is not DeliveryState.DELIVERED for d in present)


HOW_LONG = settings(
    max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestStore = StoreMachine.TestCase
TestStore.settings = HOW_LONG


def test_store_in_postgresql(postgres: Cluster) -> None:
    class PostgresMachine(StoreMachine):
        def open_store(self) -> JobStore:
            self.url = postgres.new()
            return JobStore(self.url)

        def teardown(self) -> None:
            super().teardown()
            postgres.drop(self.url)

    run_state_machine_as_test(PostgresMachine, settings=settings(HOW_LONG, max_examples=8))


def test_the_model_catches_a_store_without_fencing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant: any worker may end a job that is being screened, whoever holds it."""

    def careless(connection: Connection, job: Job) -> Row[Any]:
        row = connection.execute(select(JobRow.__table__).where(JobRow.job_id == job.job_id)).one()
        if row.state is not JobState.SCREENING:
            raise LeaseLost("")
        return row

    monkeypatch.setattr(outcomes, "claimed_row", careless)
    machine = StoreMachine()
    try:
        machine.instance_arrives(study="1.1", number=1, other=False)
        machine.time_passes(seconds=30.0)
        machine.sweep()
        first = machine.claim(worker="w1")
        machine.time_passes(seconds=70.0)
        machine.claim(worker="w2")
        with pytest.raises(AssertionError):
            machine.end(job=first, end="report")
    finally:
        machine.teardown()
