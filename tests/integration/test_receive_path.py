"""The receiver's path under awkward senders: mixed commands, data sets that break off, one study from everywhere."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.acse import ACSE
from pynetdicom.dsutils import encode
from structlog.testing import capture_logs

from osteo_daemon.dicom.received import ReceivedObject
from osteo_daemon.dicom.storage_scp import StorageScp
from osteo_daemon.domain.completeness import OPEN_ASSOCIATION_FACTOR
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import (
    ConflictingInstance,
    DataSetMismatch,
    NotDicom,
    QuotaExceeded,
    SpoolFull,
    StoreUnavailable,
    UnsupportedSopClass,
)
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import ReceiverSettings, SourceSettings
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver, receiver_process, storescu, until, write_ct
from tests.stores import complete_quiet

VERIFICATION = "1.2.840.10008.1.1"
SENDERS = 4
CONTEXTS = {1: (CTImageStorage, ExplicitVRLittleEndian), 3: (VERIFICATION, "1.2.840.10008.1.2")}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    with local_receiver(tmp_path) as port:
        yield tmp_path / "state", port


class Peer:
    """A sender that writes its PDUs by hand (PS3.8 9.3, PS3.7 9.3)."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((LOOPBACK, port), timeout=60)
        items = b"".join(
            _item(0x20, bytes([number, 0, 0, 0]) + _item(0x30, abstract.encode()) + _item(0x40, syntax.encode()))
            for number, (abstract, syntax) in CONTEXTS.items()
        )
        user = _item(0x50, _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.3"))
        titles = CALLED.encode().ljust(16) + CALLING.encode().ljust(16) + bytes(32)
        body = struct.pack(">HH", 1, 0) + titles + _item(0x10, b"1.2.840.10008.3.1.1.1") + items + user
        self.socket.sendall(struct.pack(">BBI", 1, 0, len(body)) + body)
        assert self.pdu()[0] == 2

    def pdu(self) -> bytes:
        """The next PDU; empty when the connection has ended."""
        header = self._exactly(6)
        return header and header + self._exactly(struct.unpack(">I", header[2:])[0])

    def status(self) -> int:
        """Status (0000,0900) of the next response."""
        answer = self.pdu()
        (status,) = struct.unpack_from("<H", answer, answer.index(struct.pack("<HHI", 0, 0x0900, 2)) + 8)
        return int(status)

    def send(self, *items: bytes) -> None:
        """One P-DATA-TF of these items."""
        body = b"".join(items)
        self.socket.sendall(struct.pack(">BxI", 4, len(body)) + body)

    def ended(self) -> bool:
        self.socket.settimeout(60)
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(4096):
                pass
        return True

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            step = self.socket.recv(size - len(data))
            if not step:
                return b""
            data += step
        return data


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def value(control: int, data: bytes, context: int = 1) -> bytes:
    return struct.pack(">IBB", len(data) + 2, context, control) + data


def command(field: int, sop_class: str, instance: str = "", data: bool = True) -> bytes:
    elements = [(0x0002, _even(sop_class)), (0x0100, struct.pack("<H", field)), (0x0110, struct.pack("<H", 7))]
    elements += [(0x0700, struct.pack("<H", 0))] if data else []
    elements += [(0x0800, struct.pack("<H", 0 if data else 0x0101))]
    elements += [(0x1000, _even(instance))] if instance else []
    body = b"".join(struct.pack("<HHI", 0, element, len(part)) + part for element, part in elements)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _even(uid: str) -> bytes:
    return uid.encode() + b"\x00" * (len(uid) % 2)


def encoded(path: Path) -> tuple[str, bytes]:
    """A file's SOP Instance UID and its data set as sent."""
    data_set = dcmread(path)
    sent = encode(data_set, False, True)
    assert sent is not None
    return str(data_set.SOPInstanceUID), bytes(sent)


def instances(state: Path, study: str) -> int:
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    try:
        job = store.job(study)
        return 0 if job is None else len(store.instances(job))
    finally:
        store.close()


def test_echoes_between_stores_on_one_association(node: tuple[Path, int], tmp_path: Path) -> None:
    state, port = node
    files = write_ct(tmp_path / "ct", count=6)
    peer = Peer(port)
    for number, path in enumerate(files):
        instance, data = encoded(path)
        store, echo = command(1, CTImageStorage, instance), command(0x30, VERIFICATION, data=False)
        if number % 3 == 0:
            peer.send(value(3, store), value(2, data))  # command and data set in one PDU
        elif number % 3 == 1:
            peer.send(value(1, store[:50]))
            peer.send(value(3, store[50:]), value(0, data[:100]))
            peer.send(value(0, data[100:101]), value(0, b""), value(2, data[101:]))
        else:
            peer.send(value(3, store))
            peer.send(value(2, data))
        assert peer.status() == 0
        begun = time.monotonic()
        peer.send(value(3, echo, context=3))
        assert peer.status() == 0
        assert time.monotonic() - begun < 2
    peer.socket.sendall(struct.pack(">BxII", 5, 4, 0))
    assert peer.pdu()[0] == 6
    assert instances(state, str(dcmread(files[0]).StudyInstanceUID)) == 6


def test_requests_sent_ahead_are_answered_one_after_another(node: tuple[Path, int], tmp_path: Path) -> None:
    state, port = node
    files = write_ct(tmp_path / "ct", count=20)
    peer = Peer(port)
    for path in files:
        instance, data = encoded(path)
        peer.send(value(3, command(1, CTImageStorage, instance)))
        peer.send(value(2, data))
    assert [peer.status() for _ in files] == [0] * 20
    assert instances(state, str(dcmread(files[0]).StudyInstanceUID)) == 20


@pytest.mark.parametrize("end", ["closed", "abort", "release", "command", "other context", "garbage"])
def test_a_data_set_that_breaks_off_leaves_nothing(node: tuple[Path, int], tmp_path: Path, end: str) -> None:
    state, port = node
    (path,) = write_ct(tmp_path / "ct", count=1, size=256)
    instance, data = encoded(path)
    peer = Peer(port)
    peer.send(value(3, command(1, CTImageStorage, instance)))
    for begin in range(0, 120_000, 12_000):
        peer.send(value(0, data[begin : begin + 12_000]))
    until(lambda: list((state / "spool" / "tmp").iterdir()))
    if end == "closed":
        peer.socket.sendall(struct.pack(">BxI", 4, 1000) + b"half")
        peer.socket.shutdown(socket.SHUT_RDWR)
    elif end in ("abort", "release"):
        peer.socket.sendall(struct.pack(">BxII", 7 if end == "abort" else 5, 4, 0))
    elif end == "garbage":
        peer.socket.sendall(b"\xff" * 100)
    else:
        fragment = value(3, command(1, CTImageStorage, instance)) if end == "command" else value(0, b"x", context=3)
        peer.send(fragment)
    if end in ("garbage", "command", "other context"):
        assert peer.pdu()[0] == 7  # A-ABORT: the peer has to close then
        peer.socket.close()
    else:
        assert peer.ended()
    until(lambda: not list((state / "spool" / "tmp").iterdir()))
    assert not list((state / "spool" / "received").rglob("*.dcm"))
    assert storescu(port, [path]).returncode == 0
    assert instances(state, str(dcmread(path).StudyInstanceUID)) == 1


def test_one_image_per_association_200_times(node: tuple[Path, int], tmp_path: Path) -> None:
    state, port = node
    files = write_ct(tmp_path / "ct", count=200)
    statuses: list[int] = []

    def send(part: list[Path]) -> None:
        for path in part:
            instance, data = encoded(path)
            peer = Peer(port)
            peer.send(value(3, command(1, CTImageStorage, instance)), value(2, data))
            statuses.append(peer.status())
            peer.socket.sendall(struct.pack(">BxII", 5, 4, 0))
            assert peer.pdu()[0] == 6
            peer.socket.close()

    run_all([lambda part=files[place::SENDERS]: send(part) for place in range(SENDERS)])
    assert statuses == [0] * 200
    study = str(dcmread(files[0]).StudyInstanceUID)
    assert instances(state, study) == 200
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    job = store.job(study)
    assert job is not None
    assert (job.state, job.revision) == (JobState.RECEIVING, 1)
    (kept,) = [entry for entry in store.inventory() if entry.study_instance_uid == study]
    assert (kept.counted_instances, len(kept.files)) == (200, 200)
    store.close()


def test_the_same_instances_from_four_senders_at_once(node: tuple[Path, int], tmp_path: Path) -> None:
    state, port = node
    files = write_ct(tmp_path / "ct", count=12)
    codes: list[int] = []
    run_all([lambda: codes.append(storescu(port, files).returncode)] * SENDERS)
    assert codes == [0] * SENDERS
    study = str(dcmread(files[0]).StudyInstanceUID)
    assert instances(state, study) == 12
    assert len(list((state / "spool" / "received").rglob("*.dcm"))) == 12
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    assert [event.event for event in store.events(study)] == ["instance_received"]
    store.close()


def test_an_idle_association_costs_next_to_nothing(tmp_path: Path) -> None:
    """Of a receiver in a process of its own, all of whose time is counted: nothing else runs there."""
    with receiver_process(tmp_path) as (role, port):
        assert role.process is not None
        process = psutil.Process(role.process.pid)
        peers = [Peer(port) for _ in range(10)]
        time.sleep(0.5)

        def seconds() -> float:
            times = process.cpu_times()
            return float(times.user + times.system)

        begun = seconds()
        time.sleep(2)
        # the library's own threads, two for each association, would wake 40,000 times
        assert seconds() - begun < 0.6
        for peer in peers:
            peer.socket.close()


def run_all(works: list[Callable[[], object]]) -> None:
    """Each in a thread of its own; what fails in one fails here."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(120)


def test_one_association_all_day(node: tuple[Path, int], tmp_path: Path) -> None:
    """Study after study over one association: each is complete though it stays open, and a late image is a revision."""
    state, port = node
    series = [write_ct(tmp_path / str(number), count=3, seed=number) for number in range(3)]
    studies = [str(dcmread(files[0]).StudyInstanceUID) for files in series]
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    peer = Peer(port)

    def send(path: Path) -> None:
        instance, data = encoded(path)
        peer.send(value(3, command(1, CTImageStorage, instance)), value(2, data))
        assert peer.status() == 0

    def complete(seconds: float) -> set[str]:
        """Which are, when nothing has come for so long."""
        done = complete_quiet(store, 100, now=datetime.now(UTC) + timedelta(seconds=seconds))
        return {job.study_instance_uid for job in done}

    for files in series[:2]:
        for path in files[:2]:
            send(path)
    # it speaks for the study that it stored last, and for a bounded time
    assert complete(150) == {studies[0]}
    bound = 100 * OPEN_ASSOCIATION_FACTOR
    assert complete(bound - 50) == set()
    assert complete(bound + 50) == {studies[1]}
    for path in series[2]:
        send(path)
    assert complete(bound + 50) == {studies[2]}
    send(series[0][2])
    job = store.job(studies[0])
    assert job is not None
    assert (job.state, job.revision, len(store.instances(job))) == (JobState.RECEIVING, 2, 3)
    peer.socket.sendall(struct.pack(">BxII", 5, 4, 0))
    assert peer.pdu()[0] == 6
    store.close()


@contextlib.contextmanager
def listener(folder: Path, store: Callable[[ReceivedObject], object], **settings: object) -> Iterator[int]:
    """The listener alone, with another end behind it; gives its port."""
    configured = ReceiverSettings.model_validate({"ae_title": CALLED, "port": 0, **settings})
    sources = (SourceSettings(ae_title=CALLING, addresses=(LOOPBACK,)),)
    scp = StorageScp(configured, sources, store, begin_file=Spool(folder / "spool").begin)
    scp.start()
    try:
        yield scp.port
    finally:
        scp.stop(0.0)


def test_an_object_that_comes_before_the_association_knows_itself_established(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that accepts may be held up between its answer and what follows from it: the sender does not wait."""
    accept = ACSE.send_accept

    def accept_and_dawdle(acse: ACSE) -> None:
        accept(acse)
        time.sleep(0.5)

    monkeypatch.setattr(ACSE, "send_accept", accept_and_dawdle)
    received = []
    with listener(tmp_path, received.append) as port:
        sent = storescu(port, write_ct(tmp_path / "ct", count=2))
        assert sent.returncode == 0, sent
        gone = Peer(port)
        gone.socket.close()  # and one that leaves again at once
        assert storescu(port, write_ct(tmp_path / "ct2", count=1)).returncode == 0
        until(lambda: not [thread for thread in threading.enumerate() if "Association" in type(thread).__name__])
    assert len(received) == 3


def test_a_sender_who_waits_for_our_answer_is_not_silent(tmp_path: Path) -> None:
    """The association outlives objects that take longer to store than a silence may last; true silence ends it."""
    (path,) = write_ct(tmp_path / "ct", count=1)
    instance, data = encoded(path)
    with listener(tmp_path, lambda _received: time.sleep(2.5), network_timeout_seconds=1.5) as port:
        peer = Peer(port)
        for _ in range(2):  # ahead of the answers, so that this end is never the one that is late
            peer.send(value(3, command(1, CTImageStorage, instance)), value(2, data))
        assert [peer.status(), peer.status()] == [0, 0]
        assert peer.pdu()[0] == 7
        peer.socket.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SpoolFull("x"), 0xA700),
        (StoreUnavailable("x"), 0xA700),
        (QuotaExceeded("x"), 0xA700),
        (OSError(errno.EIO, "broken"), 0xA700),
        (UnsupportedSopClass("x"), 0x0122),
        (DataSetMismatch("x"), 0xA900),
        (NotDicom("x"), 0xC000),
        (ConflictingInstance("x"), 0xC010),
        (ZeroDivisionError("patient"), 0x0110),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_has_its_status_and_the_association_goes_on(tmp_path: Path, error: Exception, status: int) -> None:
    """Never 0xC211, the library's own, after which senders give up the whole batch."""
    (path,) = write_ct(tmp_path / "ct", count=1)
    instance, data = encoded(path)
    errors = [error]

    def store(_received: ReceivedObject) -> None:
        if errors:
            raise errors.pop()

    with listener(tmp_path, store) as port, capture_logs() as lines:
        peer = Peer(port)
        for expected in (status, 0):
            peer.send(value(3, command(1, CTImageStorage, instance)), value(2, data))
            assert peer.status() == expected
        peer.socket.close()
        assert "patient" not in str(lines)
    (told,) = [line for line in lines if line["event"] == "object_refused"]
    assert told["status"] == f"0x{status:04X}"
