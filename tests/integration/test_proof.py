"""Proof of storage: commitment on either association, partial, refused, never; queries; what stays unproven."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context

from osteo_daemon.dicom.report_forms import BuiltReport
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.commitments import PROOF_ROUNDS_MAXIMUM
from osteo_daemon.jobs.records import CommitmentState, Delivery, DeliveryState, ReportKind
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import Settings
from tests.archive import Archive
from tests.deliveries import (
    PATIENCE_S,
    SENT,
    built_report,
    commit,
    data_set_digest,
    ended,
    lanes,
    reached,
    settings_for,
)
from tests.fakes import LOOPBACK, RoleProcess, a_free_port, dcmtk, until
from tests.orthanc import running_orthanc
from tests.peers import rejection
from tests.report_cases import STUDY_UID

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(scope="module")
def built() -> BuiltReport:
    """All objects that a destination with the default settings may need."""
    return built_report()


def uid_of(built: BuiltReport, kind: str) -> str:
    """SOP Instance UID of the object of a kind that an archive gets which takes everything."""
    return next(entry.sop_instance_uid for entry in built.objects if entry.kind == kind and entry.variant in SENT)


def proving(folder: Path, port: int, commitment: str = "storage-commitment", **deliverer: float) -> Settings:
    """Settings that ask for proof, with short waits."""
    timing = {"commitment_linger_seconds": 1.0, "commitment_timeout_seconds": 30.0, **deliverer}
    return settings_for(folder, port, commitment=commitment, **timing)


@contextmanager
def receiver(settings: Settings) -> Iterator[int]:
    """The node's receiver, which knows nobody but the destinations; gives its port."""
    quick = settings.receiver.model_copy(update={"port": 0, "minimum_free_bytes": 0})
    listening = Receiver(settings.model_copy(update={"receiver": quick}))
    listening.start()
    try:
        yield listening.port
    finally:
        listening.stop(grace_seconds=0.0)


def deliver(settings: Settings, store: JobStore) -> Delivery:
    """Let the lanes work until the delivery has ended."""
    with lanes(settings, store):
        delivery: Delivery = until(lambda: ended(store), PATIENCE_S)
    return delivery


def job_state(store: JobStore) -> JobState:
    """Where the study stands."""
    job = store.job(STUDY_UID)
    assert job is not None
    return job.state


def test_a_commitment_on_the_same_association_proves(tmp_path: Path, built: BuiltReport) -> None:
    with Archive() as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=10.0)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "committed")
        assert {entry.proof for entry in delivery.objects if entry.stored} == {"committed"}
        # asked for what was stored and for nothing else, once
        assert [set(uids) for _transaction, uids in archive.transactions] == [set(archive.received)]
        assert archive.answers == [0x0000]
        assert not archive.questions
    assert job_state(store) is JobState.DELIVERED
    assert [entry.state for entry in store.commitments(delivery.delivery_id)] == [CommitmentState.COMMITTED]
    store.close()


def test_a_commitment_on_a_new_association_comes_to_the_receiver(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(where="never") as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=0.1)
        store = commit(settings, built)
        with receiver(settings) as port, lanes(settings, store):
            waiting = until(lambda: reached(store, DeliveryState.AWAITING), PATIENCE_S)
            assert (waiting.outcome, waiting.attempts) == (None, 1)
            assert job_state(store) is JobState.REPORTED
            archive.report_port = port
            assert archive.report(0) == 0x0000
            assert until(lambda: ended(store), PATIENCE_S).outcome == "committed"
            assert job_state(store) is JobState.DELIVERED
            # the same report again changes nothing
            assert archive.report(0) == 0x0000
            assert until(lambda: ended(store), PATIENCE_S).outcome == "committed"
    store.close()


def test_a_destination_that_is_no_source_may_report_and_not_store(tmp_path: Path, built: BuiltReport) -> None:
    settings = proving(tmp_path, a_free_port())
    store = commit(settings, built)
    with receiver(settings) as port:
        entity = AE(ae_title="PACS")
        entity.requested_contexts = [build_context(CT_IMAGE)]
        link = entity.associate(LOOPBACK, port, ae_title="OSTEO")
        assert not link.is_established
        assert rejection(port, "STRANGER", "OSTEO", "1.2.840.10008.1.20.1") == (1, 1, 3)
    store.close()


def test_a_report_on_nothing_of_ours_is_refused(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(where="never") as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=0.1)
        other = settings.destinations[0].model_copy(update={"name": "other", "ae_title": "OTHER"})
        settings = settings.model_copy(update={"destinations": (*settings.destinations, other)})
        one = settings.model_copy(update={"destinations": settings.destinations[:1]})
        store = commit(one, built)
        with receiver(settings) as port:
            with lanes(one, store):
                until(lambda: reached(store, DeliveryState.AWAITING), PATIENCE_S)
            archive.report_port = port
            unknown = Dataset()
            unknown.TransactionUID = "1.2.3.4"
            unknown.ReferencedSOPSequence = []
            assert archive.send_report(unknown, 1) == 0x0115
            without_transaction = Dataset()
            without_transaction.ReferencedSOPSequence = []
            assert archive.send_report(without_transaction, 1) == 0x0115
            assert archive.send_report(unknown, 7) == 0x0113
            # another destination cannot vouch for this one
            archive.report_ae_title = "OTHER"
            assert archive.report(0) == 0x0115
            assert reached(store, DeliveryState.AWAITING) is not None
    store.close()


def test_what_is_not_kept_is_sent_again(tmp_path: Path, built: BuiltReport) -> None:
    picture = uid_of(built, "sc")
    with Archive(failures=lambda number, _uids: {picture: 0x0110} if number == 0 else {}) as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=10.0)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert (delivery.outcome, delivery.proof_rounds) == ("committed", 1)
        counts = Counter(archive.received)
        assert counts[picture] == 2
        assert sum(counts.values()) == 4
        assert archive.transactions[1][1] == (picture,)
    states = [entry.state for entry in store.commitments(delivery.delivery_id)]
    assert states == [CommitmentState.COMMITTED, CommitmentState.PARTIAL]
    store.close()


def test_what_is_never_kept_becomes_a_dead_letter(tmp_path: Path, built: BuiltReport) -> None:
    report = uid_of(built, "sr")
    rounds = PROOF_ROUNDS_MAXIMUM + 1
    with Archive(failures=lambda number, _uids: {report: 0x0112} if number < rounds else {}) as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=10.0)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert delivery.state is DeliveryState.REFUSED
        assert delivery.detail is not None
        assert "0x0112" in delivery.detail
        assert Counter(archive.received)[report] == rounds
        assert job_state(store) is JobState.REPORTED
        # the archive is repaired: sent again by hand, it is asked again, and old reports count no more
        store.resend(delivery.delivery_id, "operator")
        assert deliver(settings, store).outcome == "committed"
        assert len(archive.transactions) == rounds + 1
        assert not archive.questions
    assert job_state(store) is JobState.DELIVERED
    store.close()


def test_a_class_that_is_kept_without_a_promise_is_proven_by_query(tmp_path: Path, built: BuiltReport) -> None:
    segmentation = uid_of(built, "seg")
    with Archive(failures=lambda _number, _uids: {segmentation: 0x0122}) as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=10.0)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert delivery.outcome == "committed and found"
        assert dict(archive.questions) == {segmentation: 1}
        assert len(archive.received) == 3
    store.close()


def test_what_a_report_leaves_out_is_asked_for(tmp_path: Path, built: BuiltReport) -> None:
    picture = uid_of(built, "sc")
    with Archive(where="never", silent_on=lambda uid: uid == picture) as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=0.1)
        store = commit(settings, built)
        with receiver(settings) as port, lanes(settings, store):
            until(lambda: reached(store, DeliveryState.AWAITING), PATIENCE_S)
            archive.report_port = port
            archive.report(0)
            assert until(lambda: ended(store), PATIENCE_S).outcome == "committed and found"
        assert dict(archive.questions) == {picture: 1}
    store.close()


@pytest.mark.parametrize("how", ["never reports", "no context", "refuses the request"])
def test_without_a_commitment_a_query_proves(tmp_path: Path, built: BuiltReport, how: str) -> None:
    archive = Archive(
        where="never", commits=how != "no context", action_status=0x0110 if how == "refuses the request" else 0
    )
    with archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=0.1, commitment_timeout_seconds=0.5)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "found")
        assert len(archive.received) == 3
    assert delivery.attempts == 1
    assert job_state(store) is JobState.DELIVERED
    store.close()


def test_an_archive_may_list_later_what_it_took(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(lists=lambda _uid, count: count > 2) as archive:
        settings = proving(tmp_path, archive.port, "c-find")
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert (delivery.outcome, delivery.attempts, delivery.proof_rounds) == ("found", 1, 0)
        assert len(archive.received) == 3
        assert archive.transactions == []
    store.close()


def test_what_is_never_listed_is_sent_again_and_then_a_dead_letter(tmp_path: Path, built: BuiltReport) -> None:
    picture = uid_of(built, "sc")
    with Archive(lists=lambda uid, _count: uid != picture) as archive:
        settings = proving(tmp_path, archive.port, "c-find", retry_base_seconds=0.02)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert delivery.state is DeliveryState.REFUSED
        assert Counter(archive.received)[picture] == PROOF_ROUNDS_MAXIMUM + 1
        assert len(archive.received) == 3 + PROOF_ROUNDS_MAXIMUM
    store.close()


def test_without_any_proof_a_delivery_stays_unproven_until_a_late_report(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(where="never", queries=False) as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=0.1, commitment_timeout_seconds=0.5)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert (delivery.state, delivery.outcome) == (DeliveryState.UNPROVEN, "unproven")
        assert job_state(store) is JobState.REPORTED
        assert "delivery_unproven" in [event.event for event in store.events(STUDY_UID)]
        with receiver(settings) as port:
            archive.report_port = port
            assert archive.report(0) == 0x0000
    assert until(lambda: ended(store), PATIENCE_S).outcome == "committed"
    assert job_state(store) is JobState.DELIVERED
    store.close()


def test_a_site_may_accept_what_is_unproven(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(commits=False, queries=False) as archive:
        settings = proving(tmp_path, archive.port)
        trusting = settings.destinations[0].model_copy(update={"accept_unproven": True})
        settings = settings.model_copy(update={"destinations": (trusting,)})
        store = commit(settings, built)
        delivery = deliver(settings, store)
    assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "stored, unproven")
    assert job_state(store) is JobState.DELIVERED
    store.close()


def test_a_person_may_accept_or_resend_what_is_unproven(tmp_path: Path, built: BuiltReport) -> None:
    with Archive(commits=False, queries=False) as archive:
        settings = proving(tmp_path, archive.port)
        store = commit(settings, built)
        delivery = deliver(settings, store)
        assert delivery.state is DeliveryState.UNPROVEN
        assert len(store.resend(delivery.delivery_id, "operator").unsent) == len(delivery.objects)
        assert deliver(settings, store).state is DeliveryState.UNPROVEN
        assert Counter(archive.received).most_common(1)[0][1] == 2
    accepted = store.accept_delivery(delivery.delivery_id, "operator", "seen in the viewer")
    assert (accepted.state, accepted.outcome) == (DeliveryState.DELIVERED, "accepted by hand, unproven")
    assert job_state(store) is JobState.DELIVERED
    with pytest.raises(KeyError):
        store.accept_delivery(delivery.delivery_id, "operator", "twice")
    store.close()


def test_a_request_cut_off_by_the_end_of_the_process_is_made_again(tmp_path: Path, built: BuiltReport) -> None:
    with Archive() as archive:
        settings = proving(tmp_path, archive.port, commitment_linger_seconds=10.0)
        store = commit(settings, built)
        claimed = store.claim_delivery("killed", 0.05)
        assert claimed is not None
        store.commitment_asked(claimed, "2.25.1")
        delivery = deliver(settings, store)
        assert delivery.outcome == "committed"
    states = {entry.transaction_uid: entry.state for entry in store.commitments(delivery.delivery_id)}
    assert len(states) == 2
    assert states.pop("2.25.1") is CommitmentState.ASKED
    assert set(states.values()) == {CommitmentState.COMMITTED}
    store.close()


def test_a_deliverer_killed_amid_an_object_and_amid_a_request_goes_on(tmp_path: Path, built: BuiltReport) -> None:
    moments = {"object": threading.Event(), "request": threading.Event()}
    killed = threading.Event()
    picture = uid_of(built, "sc")

    def hold(moment: str) -> None:
        if not moments[moment].is_set():
            moments[moment].set()
            killed.wait(PATIENCE_S)

    archive = Archive(
        before_store=lambda uid: hold("object") if uid == picture else None,
        before_action=lambda _number: hold("request"),
    )
    with archive:
        settings = proving(tmp_path, archive.port)
        store = commit(settings, built)
        config = tmp_path / "osteo.toml"
        config.write_text(
            f'state_dir = "{settings.state_dir}"\n[deliverer]\nlease_seconds = 1\npoll_seconds = 0.1\n'
            "commitment_linger_seconds = 60\n"
            f'[[destinations]]\nname = "pacs0"\nae_title = "PACS"\nhost = "{LOOPBACK}"\nport = {archive.port}\n'
        )
        for moment in ("object", "request", None):
            killed.clear()
            role = RoleProcess(["run", "deliverer", "--config", str(config)], tmp_path / "deliverer.log").start()
            if moment is None:
                delivery = until(lambda: ended(store), PATIENCE_S)
                assert role.stop() == 0
                continue
            assert moments[moment].wait(PATIENCE_S)
            role.stop(signal.SIGKILL)
            killed.set()
        assert (delivery.outcome, delivery.proof_rounds) == ("committed", 0)
        # at least once, and always the same bytes: the archive sees one object
        assert Counter(archive.received) == {uid: 2 if uid == picture else 1 for uid in set(archive.received)}
        assert len(archive.digests) == 3
        assert all(len(digests) == 1 for digests in archive.digests.values())
        assert [set(uids) for _transaction, uids in archive.transactions] == [set(archive.digests)] * 2
    store.close()


def test_a_loss_reported_while_a_deliverer_holds_the_delivery(tmp_path: Path, built: BuiltReport) -> None:
    """The report comes between request and wait: the objects go again, and the claim is not broken."""
    settings = proving(tmp_path, a_free_port())
    store = commit(settings, built)
    claimed = store.claim_delivery("here", 60)
    assert claimed is not None
    for entry in claimed.objects:
        store.delivery_object_sent(claimed, entry.report.sop_instance_uid, "0x0000")
    store.commitment_asked(claimed, "2.25.7")
    lost = next(entry.report for entry in claimed.objects if entry.report.kind is ReportKind.SC)
    others = [entry.report.sop_instance_uid for entry in claimed.objects if entry.report != lost]
    held = store.commitment_reported("2.25.7", {"pacs0"}, others, {lost.sop_instance_uid: 0x0112})
    assert held.state is DeliveryState.SENDING
    assert store.delivery_await(claimed, claimed.created_at, "waits") is DeliveryState.PENDING
    assert [report.sop_instance_uid for report in store.delivery(claimed.delivery_id).unsent] == [lost.sop_instance_uid]
    store.close()


def test_dcmtk_gives_no_proof_and_the_bytes_that_it_wrote_are_ours(tmp_path: Path, built: BuiltReport) -> None:
    port, folder = a_free_port(), tmp_path / "storescp"
    folder.mkdir()
    process = subprocess.Popen(
        [dcmtk("storescp"), "--aetitle", "PACS", "--bit-preserving", "--output-directory", str(folder), str(port)]
    )
    try:
        settings = proving(tmp_path, port)
        store = commit(settings, built)
        delivery = deliver(settings, store)
    finally:
        process.terminate()
        process.wait(60)
    assert (delivery.state, delivery.outcome) == (DeliveryState.UNPROVEN, "unproven")
    sent = {entry.report.sop_instance_uid for entry in delivery.objects if entry.stored}
    written = {data_set_digest(path.read_bytes()) for path in folder.iterdir()}
    assert len(sent) == 3
    assert written == {data_set_digest(entry.data) for entry in built.objects if entry.sop_instance_uid in sent}
    store.close()


def test_the_test_pacs_proves_by_query(tmp_path: Path, built: BuiltReport) -> None:
    port, pacs = a_free_port(), str(tmp_path / "pacs")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "osteo_daemon.cli",
            "test-pacs",
            "--port",
            str(port),
            "--ae-title",
            "PACS",
            "--folder",
            pacs,
        ],
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        settings = proving(tmp_path, port, breaker_failures=1000)
        store = commit(settings, built)
        delivery = deliver(settings, store)
    finally:
        process.terminate()
        process.wait(60)
    assert delivery.outcome == "found"
    assert len(list((tmp_path / "pacs").glob("*.dcm"))) == 3
    store.close()


def test_orthanc_that_does_not_know_us_proves_by_query(tmp_path: Path, built: BuiltReport) -> None:
    dicom_port = a_free_port()
    with running_orthanc(tmp_path / "orthanc", dicom_port, a_free_port()):
        settings = proving(tmp_path, dicom_port)
        destination = settings.destinations[0].model_copy(update={"ae_title": "ORTHANC"})
        settings = settings.model_copy(update={"destinations": (destination,)})
        store = commit(settings, built)
        delivery = deliver(settings, store)
    assert delivery.outcome == "found"
    assert [entry.state for entry in store.commitments(delivery.delivery_id)] == [CommitmentState.REFUSED]
    store.close()


def test_orthanc_commits_to_the_receiver_and_answers_queries(tmp_path: Path, built: BuiltReport) -> None:
    receiver_port, dicom_port = a_free_port(), a_free_port()
    settings = proving(tmp_path, dicom_port, commitment_linger_seconds=0.1)
    destination = settings.destinations[0].model_copy(update={"ae_title": "ORTHANC"})
    queried = destination.model_copy(update={"name": "queried", "commitment": "c-find"})
    node = settings.receiver.model_copy(update={"port": receiver_port, "minimum_free_bytes": 0})
    settings = settings.model_copy(update={"destinations": (destination, queried), "receiver": node})
    listening = Receiver(settings)
    listening.start()
    try:
        with running_orthanc(
            tmp_path / "orthanc", dicom_port, a_free_port(), modalities={"node": ["OSTEO", LOOPBACK, receiver_port]}
        ):
            store = commit(settings, built)
            with lanes(settings, store):
                assert until(lambda: ended(store, "pacs0"), PATIENCE_S).outcome == "committed"
                assert until(lambda: ended(store, "queried"), PATIENCE_S).outcome == "found"
            assert job_state(store) is JobState.DELIVERED
            store.close()
    finally:
        listening.stop(grace_seconds=0.0)
