"""Who is silent, slow, greedy or hostile must not stop the others: the listener under each attack."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pynetdicom import AE

from osteo_daemon.dicom.admission import allowed
from tests.fakes import (
    CALLED,
    CALLING,
    LOOPBACK,
    RoleProcess,
    local_receiver,
    receiver_process,
    settings_text,
    storescu,
    until,
    write_ct,
)

VERIFICATION = "1.2.840.10008.1.1"
SHORT = "acse_timeout_seconds = 2\ndimse_timeout_seconds = 2\n"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RoleProcess, int, Path]]:
    folder = tmp_path_factory.mktemp("attacked")
    with receiver_process(folder) as (role, port):
        yield role, port, folder


def connect(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=5)


def associate_request(port: int, calling: bytes = CALLING.encode()) -> bytes:
    """The bytes of an A-ASSOCIATE-RQ for verification (PS3.8 9.3.2)."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(body)) + body

    context = item(0x20, b"\x01\x00\x00\x00" + item(0x30, VERIFICATION.encode()) + item(0x40, b"1.2.840.10008.1.2"))
    user = item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3"))
    body = (
        struct.pack(">HH", 1, 0)
        + CALLED.encode().ljust(16)
        + calling.ljust(16)
        + b"\x00" * 32
        + item(0x10, b"1.2.840.10008.3.1.1.1")
        + context
        + user
    )
    return struct.pack(">BBI", 1, 0, len(body)) + body


def established(port: int) -> socket.socket:
    peer = connect(port)
    peer.sendall(associate_request(port))
    assert peer.recv(1) == b"\x02"  # A-ASSOCIATE-AC
    return peer


def echo_seconds(port: int) -> float:
    begun = time.monotonic()
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(VERIFICATION)
    association = entity.associate(LOOPBACK, port, ae_title=CALLED)
    assert association.is_established
    assert association.send_c_echo().Status == 0x0000
    association.release()
    return time.monotonic() - begun


def assert_others_are_served(port: int) -> None:
    assert statistics.median(echo_seconds(port) for _ in range(3)) < 1.0


def memory_mib(role: RoleProcess) -> float:
    assert role.process is not None
    return float(psutil.Process(role.process.pid).memory_info().rss) / (1 << 20)


def closed_within(peer: socket.socket, seconds: float) -> bool:
    peer.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        while peer.recv(65536):
            pass
    return True


def test_200_silent_connections(target: tuple[RoleProcess, int, Path]) -> None:
    role, port, _ = target
    before = memory_mib(role)
    peers = [connect(port) for _ in range(200)]
    assert_others_are_served(port)
    assert memory_mib(role) - before < 100
    for peer in peers:
        peer.close()


def test_connections_that_come_and_go_leave_no_thread(target: tuple[RoleProcess, int, Path]) -> None:
    role, port, _ = target
    assert role.process is not None
    process = psutil.Process(role.process.pid)
    for _ in range(100):
        connect(port).close()
    until(lambda: process.num_threads() < 20, 5)


def test_4_gib_pdu_before_negotiation(target: tuple[RoleProcess, int, Path]) -> None:
    role, port, _ = target
    before = memory_mib(role)
    peer = connect(port)
    peer.sendall(struct.pack(">BBI", 1, 0, 0xFFFFFFFF))
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        for _ in range(200):
            peer.sendall(b"\x00" * (1 << 20))
    assert closed_within(peer, 5)
    assert memory_mib(role) - before < 50
    assert_others_are_served(port)


def test_4_gib_pdu_after_negotiation(target: tuple[RoleProcess, int, Path]) -> None:
    role, port, _ = target
    peer = established(port)
    before = memory_mib(role)
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        peer.sendall(struct.pack(">BBI", 4, 0, 0xFFFFFFFF))
        for _ in range(200):
            peer.sendall(b"\x00" * (1 << 20))
    assert closed_within(peer, 5)
    assert memory_mib(role) - before < 50
    assert_others_are_served(port)


def test_half_pdus_and_silence_end_in_time(tmp_path: Path) -> None:
    text = settings_text(tmp_path / "state", 0).replace("[receiver]\n", f"[receiver]\n{SHORT}")
    with local_receiver(tmp_path, text) as port:
        silent = connect(port)
        half = connect(port)
        half.sendall(associate_request(port)[:40])
        late = established(port)
        late.sendall(struct.pack(">BBI", 4, 0, 1000) + b"x" * 100)
        dripping = connect(port)
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in associate_request(port):
                dripping.sendall(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - begun > 6:
                    break
        assert time.monotonic() - begun < 6
        for peer in (silent, half, late, dripping):
            assert closed_within(peer, 8)
        assert_others_are_served(port)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 4096, bytes(range(256)) * 64],
)
def test_garbage(target: tuple[RoleProcess, int, Path], garbage: bytes) -> None:
    _role, port, _ = target
    peer = connect(port)
    with contextlib.suppress(ConnectionError):
        peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
    assert closed_within(peer, 5)
    assert_others_are_served(port)


def test_control_characters_of_a_stranger_stay_out_of_the_log(target: tuple[RoleProcess, int, Path]) -> None:
    _role, port, folder = target
    peer = connect(port)
    peer.sendall(associate_request(port, b"EVIL\x1b[2J\r\nfake"))
    assert closed_within(peer, 5)
    log = (folder / "receiver.log").read_bytes()
    assert b"\x1b[2J" not in log
    assert b"\nfake" not in log


def test_messages_without_waiting_are_held_back_in_tcp(target: tuple[RoleProcess, int, Path], tmp_path: Path) -> None:
    """A command set that never ends is cut off; the receiver's memory stays bounded."""
    role, port, _ = target
    before = memory_mib(role)
    peer = established(port)
    # P-DATA-TF with one command fragment that is not the last one (PS3.8 E.2)
    body = b"x" * 100_000
    pdu = struct.pack(">BBI", 4, 0, len(body) + 6) + struct.pack(">IBB", len(body) + 2, 1, 1) + body
    with contextlib.suppress(ConnectionError, BrokenPipeError, TimeoutError):
        for _ in range(1000):
            peer.sendall(pdu)
    assert closed_within(peer, 5)
    assert memory_mib(role) - before < 60
    assert_others_are_served(port)
    assert storescu(port, write_ct(tmp_path, count=2)).returncode == 0


def test_associations_over_the_limit_are_refused_for_now(tmp_path: Path) -> None:
    text = settings_text(tmp_path / "state", 0).replace("[receiver]\n", "[receiver]\nmaximum_associations = 3\n")
    with local_receiver(tmp_path, text) as port:
        peers = [established(port) for _ in range(3)]
        silent = [connect(port) for _ in range(20)]
        fourth = connect(port)
        fourth.sendall(associate_request(port))
        answer = fourth.recv(10)
        assert (answer[0], answer[7]) == (3, 2)  # A-ASSOCIATE-RJ, transient
        peers[0].close()
        assert until(lambda: _served(port), 5)
        for peer in (*silent, fourth):
            peer.close()


def _served(port: int) -> bool:
    with connect(port) as peer:
        peer.sendall(associate_request(port))
        return peer.recv(1) == b"\x02"


def test_addresses() -> None:
    networks = (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32"))
    assert allowed("192.0.2.7", networks)
    assert allowed("::ffff:192.0.2.7", networks)
    assert allowed("2001:db8::1%eth0", networks)
    assert not allowed("192.0.3.7", networks)
    assert not allowed("::1", networks)
    assert not allowed("192.0.2.7", ())
