"""Deliveries and their proof in any order: claims, answers, crashes, reports early, late, twice and wrong, queries."""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection, select

from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import LeaseLost
from osteo_daemon.jobs import commitments
from osteo_daemon.jobs.commitments import PROOF_ROUNDS_MAXIMUM, proven_outcome
from osteo_daemon.jobs.records import (
    CommitmentState,
    Delivery,
    DeliveryState,
    NewDelivery,
    ReportKind,
    ReportObject,
)
from osteo_daemon.jobs.schema import DeliveryRow
from osteo_daemon.jobs.store import JobStore
from tests.postgres import Cluster

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
STUDY = "1.2.3"
UIDS = ("1.2.3.91", "1.2.3.92", "1.2.3.93")
LEASE_SECONDS = 60.0
SUBSETS = st.sets(st.sampled_from(UIDS))
ENDED = (DeliveryState.DELIVERED, DeliveryState.UNPROVEN, DeliveryState.REFUSED)


class ProofMachine(RuleBasedStateMachine):
    """One study, one destination, three objects; the model is what the archive was sent and what it said of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
        self.store = self.open_store()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.claims: list[Delivery] = []
        self.transactions: list[str] = []
        self.sent: dict[str, int] = dict.fromkeys(UIDS, 0)
        self.vouched: set[str] = set()  # named as kept or found since it was last sent
        self.by_hand = False
        source = SopInstance(STUDY, f"{STUDY}.1", "1.2", f"{STUDY}.1.1", "1.2", self.folder, 1, "0" * 64)
        self.store.record_instance(source, "CT1", now=self.now)
        self.store.mark_complete(STUDY, who="test", reason="all sent", now=self.now)
        job = self.store.claim("test", 60, 3, now=self.now)
        assert job is not None
        objects = [
            ReportObject(kind, "1.2.840", uid, self.folder / uid, 1, uid[-1] * 64)
            for kind, uid in zip((ReportKind.SEG, ReportKind.SR, ReportKind.SC), UIDS, strict=True)
        ]
        self.store.commit_report(job, {}, objects, [NewDelivery("pacs", UIDS)], now=self.now)
        self.delivery_id = self.store.deliveries()[0].delivery_id

    def open_store(self) -> JobStore:
        return JobStore(f"sqlite:///{self.folder / 'jobs.sqlite'}")

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @property
    def present(self) -> Delivery:
        return self.store.delivery(self.delivery_id)

    @property
    def holds(self) -> bool:
        """Whether the newest claim is the one that the store knows."""
        return bool(self.claims) and (
            (now := self.present).state is DeliveryState.SENDING and now.fencing_token == self.claims[-1].fencing_token
        )

    @rule(seconds=st.sampled_from([1.0, 30.0, 90.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def claim(self) -> None:
        before = self.present
        claimed = self.store.claim_delivery("lane", LEASE_SECONDS, destination="pacs", now=self.now)
        if claimed is None:
            return
        assert before.state not in ENDED
        assert claimed.attempts == before.attempts + (before.state is not DeliveryState.AWAITING)
        self.claims.append(claimed)

    @precondition(lambda self: self.holds)
    @rule()
    def send(self) -> None:
        for report in self.present.unsent:
            self.store.delivery_object_sent(self.claims[-1], report.sop_instance_uid, "0x0000", now=self.now)
            self.sent[report.sop_instance_uid] += 1
            self.vouched.discard(report.sop_instance_uid)

    @precondition(lambda self: self.holds)
    @rule(accepted=st.sampled_from([None, CommitmentState.ACCEPTED, CommitmentState.REFUSED]))
    def ask(self, accepted: CommitmentState | None) -> None:
        if self.present.unsent:
            return
        uid = f"2.25.{len(self.transactions)}"
        self.store.commitment_asked(self.claims[-1], uid, now=self.now)
        self.transactions.append(uid)
        if accepted is not None:
            self.store.commitment_answered(uid, accepted)

    @precondition(lambda self: self.transactions)
    @rule(data=st.data(), kept=SUBSETS, lost=SUBSETS, stranger=st.booleans(), reason=st.sampled_from([0x0110, 0x0122]))
    def archive_reports(self, data: st.DataObject, kept: set[str], lost: set[str], stranger: bool, reason: int) -> None:
        uid = data.draw(st.sampled_from(self.transactions))
        lost -= kept
        before = self.present
        if stranger:
            with pytest.raises(KeyError):
                self.store.commitment_reported(uid, {"other"}, kept, dict.fromkeys(lost, reason), now=self.now)
            assert self.present == before
            return
        self.store.commitment_reported(uid, {"pacs"}, kept, dict.fromkeys(lost, reason), now=self.now)
        self.vouched |= {entry.report.sop_instance_uid for entry in before.objects if entry.stored} & kept

    @precondition(lambda self: self.holds)
    @rule(found=SUBSETS)
    def query_finds(self, found: set[str]) -> None:
        if self.present.unsent:
            return
        present = self.store.objects_proved(self.claims[-1], found, "found", now=self.now)
        self.vouched |= found
        if not present.unproven:
            self.store.delivery_done(self.claims[-1], proven_outcome(present), now=self.now)

    @precondition(lambda self: self.holds)
    @rule(missing=SUBSETS.filter(bool))
    def query_misses(self, missing: set[str]) -> None:
        if not self.present.unsent:
            self.store.delivery_lost(self.claims[-1], frozenset(missing), "not found", now=self.now)

    @precondition(lambda self: self.holds)
    @rule(how=st.sampled_from(["await", "retry", "refused", "unproven", "release"]))
    def end(self, how: str) -> None:
        claim, later = self.claims[-1], self.now + timedelta(seconds=60)
        if how == "await":
            state = self.store.delivery_await(claim, later, "waits", now=self.now)
            assert state in (DeliveryState.AWAITING, DeliveryState.PENDING, DeliveryState.DELIVERED)
        elif how == "retry":
            self.store.delivery_retry(claim, later, "away", now=self.now)
        elif how == "refused":
            self.store.delivery_refused(claim, "never", now=self.now)
        elif how == "unproven" and not self.present.unsent:
            self.store.delivery_unproven(claim, "no proof", now=self.now)
        elif how == "release":
            self.store.delivery_release(claim, now=self.now)

    @precondition(lambda self: len(self.claims) > 1)
    @rule(data=st.data())
    def a_worker_that_was_given_up_comes_back(self, data: st.DataObject) -> None:
        stale = data.draw(st.sampled_from(self.claims[:-1]))
        before = self.present
        for act in (
            lambda: self.store.delivery_object_sent(stale, UIDS[0], "0x0000", now=self.now),
            lambda: self.store.commitment_asked(stale, "2.25.999", now=self.now),
            lambda: self.store.objects_proved(stale, UIDS, "found", now=self.now),
            lambda: self.store.delivery_await(stale, self.now, "", now=self.now),
            lambda: self.store.delivery_done(stale, "stored", now=self.now),
            lambda: self.store.delivery_unproven(stale, "", now=self.now),
            lambda: self.store.delivery_lost(stale, frozenset(UIDS), "", now=self.now),
        ):
            with pytest.raises(LeaseLost):
                act()
        assert self.present == before

    @rule(trusting=st.sampled_from([False, False, False, True]))
    def patience_ends(self, trusting: bool) -> None:
        before, limit = self.present, self.now - timedelta(seconds=500)
        if not self.store.expire_deliveries("pacs", limit, "gave up", accept_unproven=trusting, now=self.now):
            return
        assert before.state in (DeliveryState.PENDING, DeliveryState.AWAITING)
        if before.unsent:
            assert self.present.state is DeliveryState.REFUSED
        else:
            assert self.present.state is (DeliveryState.DELIVERED if trusting else DeliveryState.UNPROVEN)
            self.by_hand |= trusting  # the site's word, as good as a person's

    @precondition(lambda self: self.present.state in (DeliveryState.REFUSED, DeliveryState.UNPROVEN))
    @rule(accept=st.sampled_from([False, False, False, True]))
    def a_person_acts(self, accept: bool) -> None:
        if accept:
            self.store.accept_delivery(self.delivery_id, "operator", "seen", now=self.now)
            self.by_hand = True
        else:
            self.store.resend(self.delivery_id, "operator", now=self.now)
            self.sent = dict.fromkeys(UIDS, 0)
            self.vouched.clear()

    @invariant()
    def delivered_means_proven(self) -> None:
        present = self.present
        job = self.store.job(STUDY)
        assert job is not None
        assert job.state is (JobState.DELIVERED if present.state is DeliveryState.DELIVERED else JobState.REPORTED)
        if present.state is DeliveryState.DELIVERED and not self.by_hand:
            assert not present.unsent
            assert not present.unproven
            assert self.vouched == set(UIDS)

    @invariant()
    def what_is_proven_was_sent_and_vouched_for(self) -> None:
        for entry in self.present.objects:
            if entry.proof is not None:
                assert entry.stored
                assert entry.report.sop_instance_uid in self.vouched

    @invariant()
    def rounds_are_bounded(self) -> None:
        assert self.present.proof_rounds <= PROOF_ROUNDS_MAXIMUM
        assert max(self.sent.values()) <= PROOF_ROUNDS_MAXIMUM + 1

    @invariant()
    def only_a_claimed_delivery_has_a_worker(self) -> None:
        with self.store._reading() as connection:
            row = connection.execute(select(DeliveryRow.__table__)).one()
        claimed = row.state is DeliveryState.SENDING
        assert (row.worker is not None, row.lease_until is not None) == (claimed, claimed)
        if row.not_before is not None:
            assert row.state in (DeliveryState.PENDING, DeliveryState.AWAITING)
        if row.state is DeliveryState.AWAITING:
            assert not self.present.unsent


HOW_LONG = settings(
    max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestProof = ProofMachine.TestCase
TestProof.settings = HOW_LONG


def test_proof_in_postgresql(postgres: Cluster) -> None:
    class PostgresMachine(ProofMachine):
        def open_store(self) -> JobStore:
            self.url = postgres.new()
            return JobStore(self.url)

        def teardown(self) -> None:
            super().teardown()
            postgres.drop(self.url)

    run_state_machine_as_test(PostgresMachine, settings=settings(HOW_LONG, max_examples=3))


def test_the_model_catches_a_store_that_delivers_on_any_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant: whatever a report says of one object counts for all."""
    prove = commitments._prove

    def careless(connection: Connection, delivery_id: int, _uids: object, proof: str, now: datetime) -> None:
        prove(connection, delivery_id, UIDS, proof, now)

    monkeypatch.setattr(commitments, "_prove", careless)
    machine = ProofMachine()
    try:
        machine.claim()
        machine.send()
        machine.ask(accepted=CommitmentState.ACCEPTED)
        machine.end(how="await")
        machine.store.commitment_reported("2.25.0", {"pacs"}, UIDS[:1], {}, now=machine.now)
        machine.vouched |= {UIDS[0]}
        with pytest.raises(AssertionError):
            machine.delivered_means_proven()
    finally:
        machine.teardown()
