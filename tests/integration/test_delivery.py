"""The deliverer against real peers: a storage SCP that counts, one that refuses, one that comes late, Orthanc."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pynetdicom import AE, build_context, evt
from pynetdicom.transport import AssociationSocket

from osteo_daemon.dicom.report_forms import BuiltReport
from osteo_daemon.dicom.storage_scu import judge, send_objects
from osteo_daemon.dicom.verification import echo
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import PeerBusy, PeerUnavailable, Refused
from osteo_daemon.jobs.records import DeliveryState, ReportKind
from tests.deliveries import (
    PATIENCE_S,
    SENT,
    built_report,
    commit,
    data_set_digest,
    ended,
    lanes,
    settings_for,
    spooled,
)
from tests.fakes import LOOPBACK, CountingScp, a_free_port, until
from tests.orthanc import running_orthanc
from tests.report_cases import STUDY_UID

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
COMPREHENSIVE_3D, COMPREHENSIVE = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33"
ENHANCED, BASIC_TEXT = "1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.88.11"
SEGMENTATION, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.7"
ALL_CLASSES = (SEGMENTATION, COMPREHENSIVE_3D, COMPREHENSIVE, ENHANCED, BASIC_TEXT, SECONDARY_CAPTURE)


@contextmanager
def peer(
    classes: Sequence[str],
    *,
    syntax: str = EXPLICIT,
    status: Callable[[Any], int] = lambda _event: 0x0000,
    called_ae_title: str = "PACS",
) -> Iterator[tuple[int, list[pydicom.Dataset]]]:
    """A storage SCP for these classes only; gives its port and what it has stored."""
    stored: list[pydicom.Dataset] = []

    def store(event: Any) -> int:
        answer = status(event)
        if answer == 0x0000:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            stored.append(dataset)
        return answer

    entity = AE(ae_title=called_ae_title)
    entity.require_called_aet = True
    entity.supported_contexts = [build_context(uid, [syntax]) for uid in classes]
    server = entity.start_server((LOOPBACK, 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server is not None
    try:
        yield server.server_address[1], stored
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def built() -> BuiltReport:
    """All objects that a destination with the default settings may need."""
    return built_report()


def test_each_object_arrives_once_with_the_bytes_of_the_file(tmp_path: Path, built: BuiltReport) -> None:
    with CountingScp() as first, CountingScp() as second:
        settings = settings_for(tmp_path, first.port, second.port)
        store = commit(settings, built)
        with lanes(settings, store):
            for name in ("pacs0", "pacs1"):
                delivery = until(lambda name=name: ended(store, name), PATIENCE_S)
                assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "stored")
        expected = [
            (entry.sop_class_uid, entry.sop_instance_uid, data_set_digest(entry.data))
            for entry in built.objects
            if entry.variant in SENT
        ]
        # SEG before the SR that points to it, then the picture
        assert first.received == expected
        assert second.received == expected
    job = store.job(STUDY_UID)
    assert job is not None
    assert job.state is JobState.DELIVERED
    store.close()


def test_a_retry_sends_the_same_bytes_and_only_what_is_missing(tmp_path: Path, built: BuiltReport) -> None:
    report_uid = next(each.sop_instance_uid for each in built.objects if each.variant == "comprehensive-3d+seg")

    def answer(uid: str, count: int) -> int:
        return 0xA700 if uid == report_uid and count < 3 else 0x0000

    with CountingScp(answer=answer) as pacs:
        settings = settings_for(tmp_path, pacs.port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.outcome == "stored"
        assert delivery.attempts == 3
        uids = [uid for _sop_class, uid, _digest in pacs.received]
        assert [uids.count(uid) for uid in dict.fromkeys(uids)] == [1, 3, 1]
        assert all(len(digests) == 1 for digests in pacs.digests.values())
    store.close()


def test_a_peer_that_comes_up_late_gets_everything(tmp_path: Path, built: BuiltReport) -> None:
    port = a_free_port()
    settings = settings_for(tmp_path, port)
    store = commit(settings, built)
    with lanes(settings, store):
        waiting = until(lambda: next((each for each in store.deliveries() if each.attempts >= 2), None), PATIENCE_S)
        assert waiting.state in (DeliveryState.PENDING, DeliveryState.SENDING)
        with CountingScp(port=port) as pacs:
            delivery = until(lambda: ended(store), PATIENCE_S)
            assert delivery.outcome == "stored"
            assert len(pacs.received) == 3
    store.close()


def test_one_dead_destination_holds_up_no_other(tmp_path: Path, built: BuiltReport) -> None:
    with CountingScp() as pacs:
        settings = settings_for(tmp_path, a_free_port(), pacs.port)
        store = commit(settings, built)
        with lanes(settings, store):
            assert until(lambda: ended(store, "pacs1"), PATIENCE_S).outcome == "stored"
            assert ended(store, "pacs0") is None
        job = store.job(STUDY_UID)
        assert job is not None
        assert job.state is JobState.REPORTED
    store.close()


def test_patience_ends(tmp_path: Path, built: BuiltReport) -> None:
    settings = settings_for(tmp_path, a_free_port(), give_up_after_seconds=0.5)
    store = commit(settings, built)
    with lanes(settings, store):
        delivery = until(lambda: ended(store), PATIENCE_S)
    assert delivery.state is DeliveryState.REFUSED
    assert delivery.detail is not None
    assert delivery.detail.startswith("gave up after")
    store.close()


def test_a_peer_that_does_not_know_us_is_not_asked_again(tmp_path: Path, built: BuiltReport) -> None:
    with peer(ALL_CLASSES, called_ae_title="OTHER") as (port, stored):
        settings = settings_for(tmp_path, port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.state, delivery.attempts) == (DeliveryState.REFUSED, 1), delivery.detail
        assert stored == []
    store.close()


def test_a_peer_that_stores_nothing_of_ours_is_not_asked_again(tmp_path: Path, built: BuiltReport) -> None:
    with peer(["1.2.840.10008.5.1.4.1.1.4"]) as (port, _stored):
        settings = settings_for(tmp_path, port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.state, delivery.attempts) == (DeliveryState.REFUSED, 1), delivery.detail
        assert delivery.detail is not None
        assert "presentation contexts" in delivery.detail
    store.close()


@pytest.mark.parametrize(
    ("refused", "expected_report"),
    [
        ({SEGMENTATION}, COMPREHENSIVE_3D),
        ({COMPREHENSIVE_3D}, COMPREHENSIVE),
        ({COMPREHENSIVE_3D, COMPREHENSIVE}, ENHANCED),
        ({COMPREHENSIVE_3D, COMPREHENSIVE, ENHANCED}, BASIC_TEXT),
        ({SEGMENTATION, COMPREHENSIVE_3D, COMPREHENSIVE, ENHANCED}, BASIC_TEXT),
        ({SEGMENTATION, COMPREHENSIVE_3D}, COMPREHENSIVE),
    ],
)
@pytest.mark.parametrize("how", ["no context", "status"])
def test_a_refused_class_has_a_fallback_and_nothing_dangles(
    tmp_path: Path, built: BuiltReport, refused: set[str], expected_report: str, how: str
) -> None:
    classes = [uid for uid in ALL_CLASSES if how == "status" or uid not in refused]

    def status(event: Any) -> int:
        return 0x0122 if str(event.request.AffectedSOPClassUID) in refused else 0x0000

    with peer(classes, status=status) as (port, stored):
        settings = settings_for(tmp_path, port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.DELIVERED
        by_class = {str(dataset.SOPClassUID): dataset for dataset in stored}
        assert set(by_class) == {expected_report, SECONDARY_CAPTURE} | ({SEGMENTATION} - refused)
        evidence = {
            str(instance.ReferencedSOPInstanceUID)
            for study in by_class[expected_report].CurrentRequestedProcedureEvidenceSequence
            for series in study.ReferencedSeriesSequence
            for instance in series.ReferencedSOPSequence
            if instance.ReferencedSOPClassUID == SEGMENTATION
        }
        there = {str(dataset.SOPInstanceUID) for dataset in stored if dataset.SOPClassUID == SEGMENTATION}
        assert evidence == there
        referenced = {
            str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
            for item in values_below(by_class[expected_report])
            if item.ReferencedSOPSequence[0].ReferencedSOPClassUID == SEGMENTATION
        }
        assert referenced == there
        assert delivery.outcome == ("stored without segmentation" if SEGMENTATION in refused else "stored")
    store.close()


def values_below(item: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """Every content item below that refers to an object."""
    for child in item.get("ContentSequence", ()):
        if "ReferencedSOPSequence" in child:
            yield child
        yield from values_below(child)


def test_a_peer_that_takes_no_report_at_all_gets_the_rest_and_is_a_dead_letter(
    tmp_path: Path, built: BuiltReport
) -> None:
    with peer([SEGMENTATION, SECONDARY_CAPTURE]) as (port, stored):
        settings = settings_for(tmp_path, port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.REFUSED
        assert delivery.detail is not None
        assert delivery.detail.startswith("sr not stored")
        assert {str(dataset.SOPClassUID) for dataset in stored} == {SEGMENTATION, SECONDARY_CAPTURE}
    store.close()


def test_a_peer_with_implicit_vr_only_gets_the_same_content(tmp_path: Path, built: BuiltReport) -> None:
    with peer(ALL_CLASSES, syntax=IMPLICIT) as (port, stored):
        settings = settings_for(tmp_path, port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.outcome, delivery.detail) == ("stored", None)
    store.close()
    sent = {entry.sop_instance_uid: entry.data for entry in built.objects}
    assert len(stored) == 3
    for dataset in stored:
        original = pydicom.dcmread(pydicom.filebase.DicomBytesIO(sent[str(dataset.SOPInstanceUID)]))
        assert dataset.file_meta.TransferSyntaxUID == IMPLICIT
        assert values(dataset) == values(original)


def values(dataset: pydicom.Dataset) -> list[Any]:
    """Tags and values; the reader of Implicit VR has to guess between OB and OW."""
    return [
        (element.tag, [values(item) for item in element.value] if element.VR == "SQ" else element.value)
        for element in dataset
    ]


def test_a_damaged_file_is_never_sent(tmp_path: Path, built: BuiltReport) -> None:
    with CountingScp() as pacs:
        settings = settings_for(tmp_path, pacs.port)
        store = commit(settings, built)
        victim = next(each for each in store.report_objects(STUDY_UID) if each.kind is ReportKind.SC)
        victim.path.chmod(0o600)
        data = bytearray(victim.path.read_bytes())
        data[-1] ^= 1
        victim.path.write_bytes(data)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.REFUSED
        assert delivery.detail is not None
        assert "changed on disk" in delivery.detail
        assert pacs.received == []
    store.close()


def test_sigterm_ends_the_role_after_the_object_in_hand(tmp_path: Path, built: BuiltReport) -> None:
    """The process itself: it starts, sends, and a SIGTERM amid a delivery gives the claim back."""
    begun = threading.Event()

    def slow(_uid: str, _count: int) -> int:
        begun.set()
        time.sleep(1.0)
        return 0x0000

    with CountingScp(answer=slow) as pacs:
        settings = settings_for(tmp_path, pacs.port)
        store = commit(settings, built)
        config = tmp_path / "osteo.toml"
        config.write_text(
            f'state_dir = "{settings.state_dir}"\n'
            f'[[destinations]]\nname = "pacs0"\nae_title = "PACS"\nhost = "{LOOPBACK}"\nport = {pacs.port}\n'
            'commitment = "none"\n'
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "osteo_daemon.cli", "run", "deliverer", "--config", str(config)],
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log.decode()
        assert b"deliverer_stopped" in log
        for secret in (b"Doe", b"Jane", b"P-17", b"ACC17", b"19560101"):
            assert secret not in log
        assert len(pacs.received) == 1
        delivery = store.deliveries()[0]
        assert (delivery.state, delivery.attempts) == (DeliveryState.PENDING, 0)
        assert next(entry.status for entry in delivery.objects) == "0x0000"
    store.close()


def test_sigterm_does_not_wait_for_a_peer_that_hangs(tmp_path: Path, built: BuiltReport) -> None:
    begun, over = threading.Event(), threading.Event()

    def hang(_uid: str, _count: int) -> int:
        begun.set()
        over.wait(120)
        return 0x0000

    with CountingScp(answer=hang) as pacs:
        settings = settings_for(tmp_path, pacs.port)
        store = commit(settings, built)
        config = tmp_path / "osteo.toml"
        config.write_text(
            f'state_dir = "{settings.state_dir}"\n[deliverer]\ndimse_timeout_seconds = 600\n'
            f'[[destinations]]\nname = "pacs0"\nae_title = "PACS"\nhost = "{LOOPBACK}"\nport = {pacs.port}\n'
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "osteo_daemon.cli", "run", "deliverer", "--config", str(config)],
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            assert begun.wait(PATIENCE_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            over.set()
        delivery = store.deliveries()[0]
        assert (delivery.state, delivery.attempts) == (DeliveryState.PENDING, 0)
        assert len(delivery.unsent) == len(delivery.objects)
    store.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (0x0000, None),
        (0xB000, None),
        (0xB006, None),
        (0xB007, None),
        (0xA700, PeerUnavailable),
        (0xA702, PeerUnavailable),
        (0x0110, PeerBusy),
        (0x0213, PeerBusy),
        (0x0122, Refused),
        (0x0124, Refused),
        (0xA900, Refused),
        (0xC000, Refused),
        (0xC123, Refused),
    ],
)
def test_what_a_status_means(status: int, kind: type[Exception] | None) -> None:
    found = judge(status, "PACS")
    assert found is None if kind is None else type(found) is kind


def test_a_silent_peer_is_transient(tmp_path: Path, built: BuiltReport) -> None:
    entry = spooled(tmp_path, built)[0]
    with peer(ALL_CLASSES, status=lambda _event: time.sleep(3) or 0x0000) as (port, _stored):
        verdicts = send_objects(
            RemoteAE("PACS", LOOPBACK, port), "OSTEO", [entry], connect_timeout_seconds=60, dimse_timeout_seconds=0.5
        )
    assert [type(verdict.error) for verdict in verdicts] == [PeerUnavailable]


@pytest.mark.parametrize(
    ("result", "source", "reason", "kind"),
    [
        (1, 1, 1, Refused),  # no reason given
        (1, 1, 2, Refused),  # application context name not supported
        (1, 1, 3, Refused),  # calling AE title not recognised
        (1, 1, 7, Refused),  # called AE title not recognised
        (1, 2, 2, Refused),  # protocol version not supported
        (2, 1, 1, PeerUnavailable),
        (2, 3, 1, PeerUnavailable),  # temporary congestion
        (2, 3, 2, PeerUnavailable),  # local limit exceeded
        (1, 3, 1, PeerUnavailable),  # a full house that the peer calls permanent
        (1, 3, 2, PeerUnavailable),
    ],
)
def test_which_rejections_are_for_good(result: int, source: int, reason: int, kind: type[Exception]) -> None:
    def reject(event: Any) -> None:
        event.assoc.acse.send_reject(result, source, reason)
        event.assoc.kill()

    entity = AE(ae_title="PACS")
    entity.supported_contexts = [build_context("1.2.840.10008.1.1")]
    server = entity.start_server((LOOPBACK, 0), block=False, evt_handlers=[(evt.EVT_REQUESTED, reject)])
    assert server is not None
    try:
        with pytest.raises(kind) as caught:
            echo(RemoteAE("PACS", LOOPBACK, server.server_address[1]), "OSTEO", timeout_seconds=60)
    finally:
        server.shutdown()
    assert type(caught.value) is kind


def test_a_rejection_that_comes_before_its_asker_wakes_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: the library's reactor has the answer, and has closed, before who asked looks."""

    class Slow(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            came = super().wait(timeout)
            time.sleep(0.3)
            return came

    def connect_and_sleep(self: AssociationSocket, *arguments: Any, **keywords: Any) -> None:
        made(self, *arguments, **keywords)
        if not self._ready.is_set():  # of the side that asks
            self._ready = Slow()

    made = AssociationSocket.__init__
    monkeypatch.setattr(AssociationSocket, "__init__", connect_and_sleep)
    with CountingScp() as pacs, pytest.raises(Refused, match="rejected"):
        echo(RemoteAE("OTHER", LOOPBACK, pacs.port), "OSTEO", timeout_seconds=60)


def test_echo(free_port: Callable[[], int]) -> None:
    with CountingScp() as pacs:
        assert 0 < echo(RemoteAE("PACS", LOOPBACK, pacs.port), "OSTEO", timeout_seconds=5) < 5
        with pytest.raises(Refused, match="OTHER"):
            echo(RemoteAE("OTHER", LOOPBACK, pacs.port), "OSTEO", timeout_seconds=60)
    with pytest.raises(PeerUnavailable):
        echo(RemoteAE("PACS", LOOPBACK, free_port()), "OSTEO", timeout_seconds=2)


def test_orthanc_files_the_objects_under_the_source_study(tmp_path: Path, built: BuiltReport) -> None:
    with running_orthanc(tmp_path / "orthanc", a_free_port(), a_free_port()) as orthanc:
        settings = settings_for(tmp_path, orthanc.dicom_port)
        destination = settings.destinations[0].model_copy(update={"ae_title": "ORTHANC"})
        settings = settings.model_copy(update={"destinations": (destination,)})
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.outcome == "stored"
        found = orthanc.find("Instance", StudyInstanceUID=STUDY_UID)
        received = {}
        for identifier in found:
            data = orthanc.read(f"/instances/{identifier}/file")
            dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data))
            received[str(dataset.SOPInstanceUID)] = data_set_digest(data)
            assert (str(dataset.PatientName), dataset.PatientID) == ("Doe^Jane", "P-17")
        assert received == {
            entry.sop_instance_uid: data_set_digest(entry.data) for entry in built.objects if entry.variant in SENT
        }
        assert len(orthanc.find("Study", PatientID="P-17")) == 1
    store.close()
