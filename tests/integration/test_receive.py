"""The receiver as a peer sees it: real processes, real DCMTK, loopback sockets."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE

from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.store import JobStore
from tests.fakes import (
    CALLED,
    CALLING,
    LOOPBACK,
    RoleProcess,
    dcmtk,
    local_receiver,
    receiver_process,
    settings_text,
    storescu,
    until,
    write_ct,
)
from tests.peers import rejection
from tests.stores import complete_quiet


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """One receiver for the tests that leave it alive: its state folder and port."""
    folder = tmp_path_factory.mktemp("receiver")
    with receiver_process(folder) as (_role, port):
        yield folder / "state", port


def _store(state: Path) -> JobStore:
    return JobStore(f"sqlite:///{state / 'jobs.sqlite'}")


def _study(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True).StudyInstanceUID)


def _instances(state: Path, study: str) -> list[Any]:
    store = _store(state)
    try:
        job = store.job(study)
        return [] if job is None else store.instances(job)
    finally:
        store.close()


def _associate(port: int, *contexts: tuple[str, str], calling: str = CALLING, called: str = CALLED) -> Any:
    entity = AE(ae_title=calling)
    for abstract, transfer in contexts:
        entity.add_requested_context(abstract, transfer)
    return entity.associate(LOOPBACK, port, ae_title=called)


def _send(port: int, data_set: Dataset) -> tuple[int, str]:
    association = _associate(port, (data_set.SOPClassUID, data_set.file_meta.TransferSyntaxUID))
    assert association.is_established
    answer = association.send_c_store(data_set)
    association.release()
    return int(answer.Status), str(answer.get("ErrorComment", ""))


def test_storescu_study_is_durable_and_bytes_are_as_sent(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    files = write_ct(tmp_path / "ct", count=5)
    sent = storescu(port, files)
    assert sent.returncode == 0, sent.stderr
    stored = _instances(state, _study(files[0]))
    assert {entry.sop_instance_uid for entry in stored} == {str(dcmread(path).SOPInstanceUID) for path in files}
    for entry in stored:
        assert hashlib.sha256(entry.path.read_bytes()).hexdigest() == entry.sha256
        assert entry.path.stat().st_size == entry.size_bytes
    originals = {str(data_set.SOPInstanceUID): data_set for data_set in map(dcmread, files)}
    for entry in stored:
        assert dcmread(entry.path) == originals[entry.sop_instance_uid]
    assert not list((state / "spool" / "tmp").iterdir())


def test_c_echo(shared: tuple[Path, int]) -> None:
    command = [dcmtk("echoscu"), "-aet", CALLING, "-aec", CALLED, LOOPBACK, str(shared[1])]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(("calling", "called"), [("STRANGER", CALLED), (CALLING, "ELSEWHERE"), ("modality", CALLED)])
def test_unknown_titles_are_rejected_for_good(shared: tuple[Path, int], calling: str, called: str) -> None:
    # permanent, by the service user: calling or called AE title not recognised (PS3.8 table 9-21)
    assert rejection(shared[1], calling, called, CTImageStorage) == (1, 1, 3 if called == CALLED else 7)


def test_known_title_from_another_address_is_rejected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = '[[sources]]\nae_title = "ELSEWHERE"\naddresses = ["192.0.2.0/24"]\n'
    with local_receiver(tmp_path, settings_text(tmp_path / "state", 0, extra=extra)) as port:
        assert rejection(port, "ELSEWHERE", abstract_syntax=CTImageStorage) == (1, 1, 3)
        assert _associate(port, (CTImageStorage, ImplicitVRLittleEndian)).is_established
    assert "an address that is not its own" in "".join(capfd.readouterr())


def test_without_sources_nobody_may_connect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    closed = f'state_dir = "{tmp_path / "state"}"\n[receiver]\nport = 0\n'
    with local_receiver(tmp_path, closed) as port:
        assert not _associate(port, (CTImageStorage, ImplicitVRLittleEndian)).is_established
    output = "".join(capfd.readouterr())
    assert "no_sources" in output
    assert "connection_refused" in output


@pytest.mark.parametrize(
    ("syntax", "option"),
    [
        (ImplicitVRLittleEndian, "+ti"),
        (ExplicitVRLittleEndian, "+te"),
        (ExplicitVRBigEndian, "+tb"),
        (DeflatedExplicitVRLittleEndian, "+td"),
    ],
)
def test_every_encoding_is_stored_as_received(
    shared: tuple[Path, int], tmp_path: Path, syntax: str, option: str
) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1)
    converted = tmp_path / "converted.dcm"
    subprocess.run([dcmtk("dcmconv"), option, path, converted], check=True, timeout=60)
    assert _send(port, dcmread(converted)) == (0x0000, "")
    (stored,) = _instances(state, _study(path))
    assert stored.transfer_syntax_uid == syntax
    assert (dcmread(stored.path).pixel_array == dcmread(path).pixel_array).all()


def test_compressed_objects_pass_undecoded(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1)
    data_set = dcmread(path)
    data_set.compress(RLELossless)
    assert _send(port, data_set)[0] == 0x0000
    (stored,) = _instances(state, str(data_set.StudyInstanceUID))
    assert dcmread(stored.path).PixelData == data_set.PixelData


def test_a_resent_study_changes_nothing(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    files = write_ct(tmp_path / "ct")
    assert storescu(port, files).returncode == 0
    before = _instances(state, _study(files[0]))
    assert storescu(port, files).returncode == 0
    assert _instances(state, _study(files[0])) == before
    store = _store(state)
    assert [entry.event for entry in store.events(_study(files[0]))] == ["instance_received"]
    store.close()


def test_changed_demographics_replace_the_instance_under_a_new_revision(
    shared: tuple[Path, int], tmp_path: Path
) -> None:
    state, port = shared
    files = write_ct(tmp_path / "ct")
    assert storescu(port, files).returncode == 0
    study = _study(files[0])
    store = _store(state)
    store.mark_complete(study, who="test", reason="test")
    data_set = dcmread(files[1])
    data_set.PatientName = "Corrected^Name"
    assert _send(port, data_set)[0] == 0x0000
    job = store.job(study)
    assert job is not None
    assert (job.state, job.revision) == (JobState.RECEIVING, 2)
    names = {str(dcmread(entry.path).PatientName) for entry in store.instances(job)}
    assert names == {"Test^Virtual", "Corrected^Name"}
    store.close()


def test_another_transfer_syntax_of_the_same_pixels_is_no_conflict(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1)
    assert storescu(port, [path]).returncode == 0
    data_set = dcmread(path)
    data_set.compress(RLELossless, generate_instance_uid=False)
    assert _send(port, data_set)[0] == 0x0000
    (stored,) = _instances(state, str(data_set.StudyInstanceUID))
    assert stored.transfer_syntax_uid == RLELossless


@pytest.mark.parametrize("change", ["pixels", "geometry", "study"])
def test_other_content_under_a_known_uid_is_quarantined_and_refused(
    shared: tuple[Path, int], tmp_path: Path, change: str
) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1)
    assert storescu(port, [path]).returncode == 0
    study = _study(path)
    before = _instances(state, study)
    data_set = dcmread(path)
    if change == "pixels":
        data_set.PixelData = bytes(reversed(data_set.PixelData))
    elif change == "geometry":
        data_set.ImagePositionPatient = [0, 0, 999]
    else:
        data_set.StudyInstanceUID = generate_uid()
    sent = bytes(data_set.PixelData)
    status, comment = _send(port, data_set)
    assert status == 0xC010
    assert comment
    assert _instances(state, study) == before
    assert dcmread(before[0].path) == dcmread(path)
    store = _store(state)
    (kept,) = store.quarantined(str(data_set.StudyInstanceUID))
    assert dcmread(kept.path).PixelData == sent
    assert hashlib.sha256(kept.path.read_bytes()).hexdigest() == kept.sha256
    assert _send(port, data_set)[0] == 0xC010
    assert store.quarantined(str(data_set.StudyInstanceUID)) == [kept]
    store.close()


def test_unsupported_class_is_not_negotiated(shared: tuple[Path, int]) -> None:
    association = _associate(shared[1], (MRImageStorage, ExplicitVRLittleEndian))
    assert not association.accepted_contexts
    if association.is_established:
        association.abort()


def _raw_store(port: int, data_set: Dataset, body: bytes, sop_instance: str | None = None) -> int:
    """C-STORE with a data set of our own making."""
    from io import BytesIO

    from pynetdicom.dimse_primitives import C_STORE

    association = _associate(port, (CTImageStorage, ExplicitVRLittleEndian))
    assert association.is_established
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = CTImageStorage
    request.AffectedSOPInstanceUID = sop_instance or data_set.SOPInstanceUID
    request.Priority = 2
    request.DataSet = BytesIO(body)
    association._reactor_checkpoint.clear()
    until(lambda: association._is_paused)
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _context, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()
    assert answer is not None
    return int(answer.Status)


def _encoded(data_set: Dataset) -> bytes:
    from pynetdicom.dsutils import encode

    encoded = encode(data_set, False, True)
    assert encoded is not None
    return encoded


def test_bad_data_sets_are_refused_with_a_reason_and_leave_nothing(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1)
    good = dcmread(path)
    body = _encoded(good)
    log = state.parent / "receiver.log"
    count = sum(1 for _ in (state / "spool" / "received").rglob("*.dcm"))

    assert _raw_store(port, good, body[:-20]) == 0xC000  # ends inside the pixels
    assert _raw_store(port, good, b"no DICOM at all, just text") == 0xC000
    assert _raw_store(port, good, b"\x00" * 64) == 0xC000
    assert _raw_store(port, good, body, sop_instance="1.2.3") == 0xA900
    other_class = dcmread(path)
    other_class.SOPClassUID = MRImageStorage
    assert _raw_store(port, good, _encoded(other_class)) == 0xA900
    no_study = dcmread(path)
    del no_study.StudyInstanceUID
    assert _raw_store(port, good, _encoded(no_study)) == 0xC000
    evil = dcmread(path)
    evil["StudyInstanceUID"]._value = "../../../../etc/x"
    assert _raw_store(port, good, _encoded(evil)) == 0xC000

    assert log.read_text().count("object_refused") >= 7
    assert sum(1 for _ in (state / "spool" / "received").rglob("*.dcm")) == count
    assert _raw_store(port, good, body) == 0x0000


def test_four_senders_of_one_study_at_once(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    files = write_ct(tmp_path / "ct", count=24)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda part=files[n::3]: results.append(storescu(port, part).returncode))
        for n in (0, 1, 2)
    ]
    threads.append(threading.Thread(target=lambda: results.append(storescu(port, files).returncode)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0, 0, 0]
    assert len(_instances(state, _study(files[0]))) == 24


def test_objects_that_accompany_a_ct_are_kept_and_start_no_screening(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    (path,) = write_ct(tmp_path, count=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    assert storescu(port, [path]).returncode == 0
    store = _store(state)
    job = store.job(_study(path))
    assert job is not None
    assert job.state is JobState.EXCLUDED
    stored = store.stored_instance(str(dcmread(path).SOPInstanceUID))
    assert stored is not None
    assert stored.path.exists()
    store.close()


def test_our_own_result_coming_back_is_acknowledged_and_forgotten(tmp_path: Path) -> None:
    from osteo_daemon.jobs.records import ReportKind, ReportObject

    with local_receiver(tmp_path) as port:
        files = write_ct(tmp_path / "ct", count=1)
        assert storescu(port, files).returncode == 0
        store = _store(tmp_path / "state")
        study = _study(files[0])
        store.mark_complete(study, who="test", reason="test")
        job = store.claim("test", 60)
        assert job is not None
        (own,) = write_ct(tmp_path / "own", count=1, study_uid=study, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
        uid = str(dcmread(own).SOPInstanceUID)
        report = ReportObject(ReportKind.SC, "1.2.840.10008.5.1.4.1.1.7", uid, own, own.stat().st_size, "0" * 64)
        store.commit_report(job, {"schema": "osteo-result/1"}, [report], [])
        assert storescu(port, [own]).returncode == 0
        after = store.job(study)
        assert after is not None
        assert (after.state, after.revision) == (JobState.REPORTED, 1)
        assert store.stored_instance(uid) is None
        store.close()


def test_full_disk_is_a_transient_refusal_and_leaves_nothing(tmp_path: Path) -> None:
    text = settings_text(tmp_path / "state", 0).replace("minimum_free_bytes = 0", f"minimum_free_bytes = {1 << 62}")
    (path,) = write_ct(tmp_path, count=1)
    with local_receiver(tmp_path, text) as port:
        assert _send(port, dcmread(path))[0] == 0xA700
    assert not list((tmp_path / "state" / "spool").rglob("*.dcm"))
    with local_receiver(tmp_path) as port:
        assert _send(port, dcmread(path))[0] == 0x0000


def test_nothing_acknowledged_is_lost_when_the_receiver_is_killed(tmp_path: Path) -> None:
    """kill -9 in the middle of an association; the sender's own ledger judges."""
    files = write_ct(tmp_path / "ct", count=60, size=64)
    acknowledged: list[str] = []
    with receiver_process(tmp_path) as (role, port):
        association = _associate(port, (CTImageStorage, ExplicitVRLittleEndian))
        assert association.is_established
        assert role.process is not None
        for number, path in enumerate(files):
            if number == 30:
                threading.Timer(0.01, role.process.kill).start()
            data_set = dcmread(path)
            if not association.is_established:
                break
            answer = association.send_c_store(data_set)
            if answer and answer.Status == 0x0000:
                acknowledged.append(str(data_set.SOPInstanceUID))
        role.process.wait(60)
        association.abort()
    assert 30 <= len(acknowledged) < 60
    (tmp_path / "state" / "spool" / "tmp" / f"{role.process.pid}-deadbeef").write_bytes(b"half a slice")

    again = RoleProcess(["run", "receiver", "--config", str(tmp_path / "osteo.toml")], tmp_path / "again.log").start()
    try:
        again.wait_for("receiver_listening")
        assert not list((tmp_path / "state" / "spool" / "tmp").iterdir())
        stored = {entry.sop_instance_uid: entry for entry in _instances(tmp_path / "state", _study(files[0]))}
        assert set(acknowledged) <= set(stored)
        originals = {str(data_set.SOPInstanceUID): data_set for data_set in map(dcmread, files)}
        for uid in acknowledged:
            assert dcmread(stored[uid].path) == originals[uid]
        assert storescu(port, files).returncode == 0
        assert len(_instances(tmp_path / "state", _study(files[0]))) == 60
    finally:
        assert again.stop() == 0


def test_sigterm_lets_a_busy_association_finish(tmp_path: Path) -> None:
    with receiver_process(tmp_path) as (role, port):
        files = write_ct(tmp_path / "ct", count=40, size=128)
        association = _associate(port, (CTImageStorage, ExplicitVRLittleEndian))
        statuses = []
        for number, path in enumerate(files):
            if number == 5:
                assert role.process is not None
                role.process.terminate()
            statuses.append(int(association.send_c_store(dcmread(path)).Status))
        association.release()
        assert statuses == [0x0000] * 40
        assert role.process is not None
        assert role.process.wait(15) == 0
        assert len(_instances(tmp_path / "state", _study(files[0]))) == 40


def test_sigterm_ends_an_idle_association(tmp_path: Path) -> None:
    with receiver_process(tmp_path) as (role, port):
        association = _associate(port, (CTImageStorage, ExplicitVRLittleEndian))
        assert association.is_established
        assert role.stop(seconds=8) == 0
        until(lambda: association.is_aborted or not association.is_established)


def test_an_open_association_is_known_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=3)
    study = _study(files[0])
    later = datetime.now(UTC) + timedelta(seconds=200)
    with local_receiver(tmp_path) as port:
        store = _store(tmp_path / "state")
        for end in ("release", "abort", "drop"):
            association = _associate(port, (CTImageStorage, ExplicitVRLittleEndian))
            for number, path in enumerate(files):
                data_set = dcmread(path)
                data_set.SOPInstanceUID = f"{data_set.SOPInstanceUID}.{len(end)}"[-64:].lstrip(".")
                data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
                assert association.send_c_store(data_set).Status == 0x0000, number
            assert complete_quiet(store, 100, now=later) == []
            if end == "drop":
                association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
            else:
                getattr(association, end)()
            assert [job.study_instance_uid for job in until(lambda: complete_quiet(store, 100, now=later))] == [study]
        store.close()


def test_the_receiver_starts_without_torch() -> None:
    code = (
        "import sys, osteo_daemon.receiver, osteo_daemon.scheduler\n"
        "heavy = {'torch', 'monai', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "torch" not in done.stdout
    assert "monai" not in done.stdout


def test_no_patient_identity_in_logs_and_names(shared: tuple[Path, int], tmp_path: Path) -> None:
    state, port = shared
    files = write_ct(tmp_path, count=2, PatientName="Zebedee^Quentin", PatientID="PID-QXZVWK")
    assert storescu(port, files).returncode == 0
    log = (state.parent / "receiver.log").read_text()
    names = "\n".join(str(path) for path in state.rglob("*"))
    for secret in ("Zebedee", "Quentin", "QXZVWK"):
        assert secret not in log
        assert secret not in names
        assert secret.encode() not in (state / "jobs.sqlite").read_bytes()
