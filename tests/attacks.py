"""Attacks on a receiver, all at a time, each from an address of its own: ``python -m tests.attacks FILE``.

A process of its own, so that what attacks does not slow what measures. FILE is JSON: ``port``, ``tls_port`` and files
of certificates; the answer on standard output is JSON: the name of each attack and what went wrong with it, empty if
it came to the end that it should.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.peers import (
    CT_STORAGE,
    ECHO_COMMAND,
    IMPLICIT,
    USER_INFORMATION,
    associate_request,
    closed_within,
    connect,
    context,
    element,
    established,
    item,
    p_data,
    pdu,
    read_pdu,
    send_what_is_taken,
    store_command,
    store_status,
)

SECONDS = 6.0
"""How long the patient attacks go on."""

ENDED_SECONDS = 30.0
"""By when the listener must have hung up; its own limits are 2 s, and the machine may be busy."""

CALLING = "ATTACKER"
UID = b"1.2.826.0.1.3680043.8.498.1"


@dataclass(frozen=True)
class Target:
    """Where to, and from which address."""

    port: int
    tls_port: int
    address: str
    certificates: dict[str, str]

    def connect(self) -> socket.socket:
        return connect(self.port, self.address)

    def associate(self, **request: object) -> socket.socket:
        return established(self.port, self.address, **{"calling": CALLING, **request})

    def storing(self, syntax: str = IMPLICIT) -> socket.socket:
        offered = item(0x40, syntax.encode())
        proposed = item(0x20, b"\x01\0\0\0" + item(0x30, CT_STORAGE.encode()) + offered)
        return self.associate(contexts=proposed)

    def security(self, name: str) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=self.certificates["ca"])
        if name:
            made.load_cert_chain(
                f"{self.certificates['folder']}/{name}.pem", f"{self.certificates['folder']}/{name}.key"
            )
        return made


ATTACKS: dict[str, Callable[[Target], None]] = {}


def attack(function: Callable[[Target], None]) -> Callable[[Target], None]:
    ATTACKS[function.__name__] = function
    return function


@contextmanager
def many(count: int, make: Callable[[], socket.socket]) -> Iterator[list[socket.socket]]:
    peers = [make() for _ in range(count)]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def ended(peer: socket.socket) -> None:
    assert closed_within(peer, ENDED_SECONDS), "the listener did not hang up"
    peer.close()


def answered_or_ended(peer: socket.socket) -> None:
    """A refusal, an abort or a closed connection; never an acceptance."""
    peer.settimeout(ENDED_SECONDS)
    with suppress(ConnectionError):
        assert read_pdu(peer)[0] in (0, 3, 7)
    peer.close()


# connections that are no associations


@attack
def silent_connections(target: Target) -> None:
    with many(200, target.connect):
        time.sleep(SECONDS)


@attack
def silent_tls_connections(target: Target) -> None:
    with many(60, lambda: connect(target.tls_port, target.address)) as peers:
        for peer in peers[::2]:
            send_what_is_taken(peer, b"\x16\x03\x01\x02\x00\x01")
        time.sleep(SECONDS)


@attack
def tls_byte_by_byte(target: Target) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        target.security("attacker").wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
    _drip(connect(target.tls_port, target.address), outgoing.read())


@attack
def byte_by_byte(target: Target) -> None:
    _drip(target.connect(), associate_request(CALLING))


def _drip(peer: socket.socket, data: bytes) -> None:
    begun = time.monotonic()
    with suppress(OSError):
        for byte in data:
            peer.sendall(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - begun < ENDED_SECONDS, "dripping was never cut off"
    ended(peer)


@attack
def thousands_of_quick_connections(target: Target) -> None:
    for number in range(2000):
        with suppress(OSError):
            peer = connect(target.port if number % 4 else target.tls_port, target.address)
            if number % 2:
                # reset instead of an orderly end
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()


@attack
def quick_connections_from_everywhere(target: Target) -> None:
    """Each address stays below what is worth a look."""
    for number in range(1000):
        with suppress(OSError):
            connect(target.port if number % 4 else target.tls_port, f"127.0.2.{100 + number % 100}").close()


@attack
def an_address_that_nobody_listed(target: Target) -> None:
    for _ in range(300):
        peer = connect(target.port, "127.0.99.99")
        with suppress(ConnectionError):
            peer.settimeout(ENDED_SECONDS)
            assert not peer.recv(1)
        peer.close()


# PDUs that are none


@attack
def garbage(target: Target) -> None:
    rng = random.Random(3)
    samples = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 4096, bytes(range(256)) * 64]
    samples += [rng.randbytes(rng.randint(1, 3000)) for _ in range(60)]
    for number, sample in enumerate(samples):
        peer = connect(target.port if number % 3 else target.tls_port, target.address)
        send_what_is_taken(peer, sample)
        with suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
        ended(peer)


@attack
def garbage_in_an_association(target: Target) -> None:
    rng = random.Random(4)
    for _ in range(25):
        peer = target.associate()
        send_what_is_taken(peer, rng.randbytes(rng.randint(6, 3000)))
        with suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
        ended(peer)


@attack
def announced_4_gib(target: Target) -> None:
    for peer, kind in ((target.connect(), 1), (target.associate(), 4), (target.associate(), 5)):
        send_what_is_taken(peer, struct.pack(">BBI", kind, 0, 0xFFFFFFFF))
        send_what_is_taken(peer, b"\0" * (1 << 20), 64)
        ended(peer)


@attack
def half_a_pdu(target: Target) -> None:
    first, second = target.connect(), target.associate()
    first.sendall(associate_request(CALLING)[:40])
    second.sendall(p_data(ECHO_COMMAND, 3)[:30])
    ended(first)
    ended(second)


@attack
def pdus_out_of_turn(target: Target) -> None:
    for kind, body in (
        (2, b"\0" * 68),
        (3, b"\0\1\1\7"),
        (4, p_data(ECHO_COMMAND, 3)[6:]),
        (5, b"\0" * 4),
        (6, b"\0" * 4),
    ):
        peer = target.connect()
        peer.sendall(pdu(kind, body))
        answered_or_ended(peer)
    for data in (associate_request(CALLING), pdu(2, b"\0" * 68), pdu(6, b"\0" * 4), pdu(0x77, b"x" * 100)):
        peer = target.associate()
        peer.sendall(data)
        ended(peer)


@attack
def quick_associations_that_abort(target: Target) -> None:
    for _ in range(60):
        peer = target.associate()
        peer.sendall(pdu(7, b"\0\0\0\0"))
        peer.close()


# association requests that go too far


def requests(calling: str) -> dict[str, bytes]:
    """Association requests beyond measure, by name."""
    role = item(0x54, struct.pack(">H", 17) + b"1.2.840.10008.1.1" + b"\1\1")
    extended = item(0x56, struct.pack(">H", 17) + b"1.2.840.10008.1.1" + b"\xff" * 60000)
    identity = item(0x58, b"\x02\x01" + struct.pack(">H", 60000) + b"x" * 60000 + struct.pack(">H", 0))
    nested = b"1.2.3"
    for _ in range(3000):
        nested = item(0x50, nested[-60000:])
    contexts = b"".join(context(number | 1) for number in range(0, 256, 2))
    longest = "1." + "2" * 60000
    return {
        "128 contexts with 200 syntaxes each": associate_request(
            calling, contexts=b"".join(context(number | 1, syntaxes=200) for number in range(0, 256, 2))
        ),
        "the same contexts over and over": associate_request(calling, contexts=contexts * 60),
        "contexts of even numbers": associate_request(calling, contexts=b"".join(map(context, range(0, 256, 2)))),
        "contexts of one name of 60,000 characters": associate_request(calling, contexts=context(1, longest) * 15),
        "no context": associate_request(calling, contexts=b""),
        "user information nested in itself": associate_request(calling, user=nested),
        "a thousand roles": associate_request(calling, user=USER_INFORMATION + role * 1500),
        "fifteen extended negotiations": associate_request(calling, user=(USER_INFORMATION + extended)[:65000]),
        "an identity of 60,000 bytes": associate_request(calling, user=USER_INFORMATION + identity),
        "an application context of 60,000": associate_request(calling, application=b"1" * 60000),
        "items that are longer than the PDU": pdu(
            1, associate_request(calling)[6:80] + item(0x50, USER_INFORMATION, 65535)
        ),
        "items that are shorter than they say": associate_request(
            calling, user=item(0x51, b"\0\0", 4) + item(0x52, b"", 9)
        ),
        "a maximum length of nothing": associate_request(calling, user=item(0x51, b"") + item(0x52, b"1.2.3")),
        "a request of one byte": pdu(1, b"\0"),
        "a request of nothing": pdu(1, b""),
        "no titles": pdu(1, b"\0\1" + b"\0" * 66),
        "2 MiB of contexts": associate_request(calling, contexts=contexts * 500),
    }


@attack
def association_requests_beyond_measure(target: Target) -> None:
    for name, request in requests(CALLING).items():
        begun = time.monotonic()
        peer = target.connect()
        send_what_is_taken(peer, request)
        peer.settimeout(ENDED_SECONDS)
        with suppress(ConnectionError):
            kind, _body = read_pdu(peer)
            assert kind in (0, 2, 3, 7), name
        peer.close()
        assert time.monotonic() - begun < ENDED_SECONDS, name


@attack
def strangers(target: Target) -> None:
    for _ in range(15):
        for calling, called in (
            (CALLING, "OTHER"),
            ("NOBODY", "OSTEO"),
            ("MODALITY", "OSTEO"),
            ("", ""),
            ("\x1b[2J", "\r\nx"),
        ):
            peer = target.connect()
            peer.sendall(associate_request(calling, called))
            answered_or_ended(peer)


@attack
def strangers_who_stay(target: Target) -> None:
    """After a rejection it is they who should close; their time for that is bounded, and no thread waits for it."""
    with many(0, target.connect) as peers:
        for _ in range(40):
            peers.append(peer := target.connect())
            peer.settimeout(ENDED_SECONDS)
            peer.sendall(associate_request("NOBODY"))
            kind, body = read_pdu(peer)
            assert (kind, body[1:]) == (3, b"\x01\x01\x03")
        for peer in peers:
            ended(peer)


@attack
def certificates_of_others(target: Target) -> None:
    for name in ("", "stranger", "expired", "other") * 6:
        with (
            connect(target.tls_port, target.address) as plain,
            suppress(ssl.SSLError, ConnectionError),
            target.security(name).wrap_socket(plain, server_hostname="127.0.0.1") as peer,
        ):
            peer.settimeout(ENDED_SECONDS)
            peer.sendall(associate_request(CALLING))
            kind, _body = read_pdu(peer)
            assert kind != 2, f"let in with the certificate {name or 'of nobody'}"


@attack
def one_sender_with_all_associations(target: Target) -> None:
    answers = []
    with many(0, target.connect) as peers:
        for _ in range(20):
            peers.append(peer := target.connect())
            peer.settimeout(ENDED_SECONDS)
            peer.sendall(associate_request("HOG"))
            answers.append(read_pdu(peer))
    refused = [body[1:] for kind, body in answers if kind == 3]
    assert set(refused) == {b"\x02\x03\x02"}, "not a transient refusal by a local limit"
    # on a busy machine the first are gone for their silence before the last has come
    assert len(refused) >= 4, f"{len(refused)} were refused"


# messages


@attack
def fragments_that_lie(target: Target) -> None:
    header = struct.pack(">IBB", 2, 1, 3)
    bodies = [
        struct.pack(">IBB", 0xFFFFFFFF, 1, 3) + b"x" * 100,
        struct.pack(">IBB", 101, 1, 3) + b"x" * 50,
        struct.pack(">IBB", 1, 1, 3) + b"x" * 50,
        struct.pack(">IBB", 0, 1, 3),
        b"\0\0\0",
        header + b"\0",
        struct.pack(">IBB", 52, 1, 0) + b"x" * 50,
        struct.pack(">IBB", 52, 99, 3) + b"x" * 50,
        p_data(store_command(UID), 3)[6:] + p_data(ECHO_COMMAND, 3)[6:],
    ]
    for body in bodies:
        peer = target.storing()
        peer.sendall(pdu(4, body))
        with suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
        ended(peer)


@attack
def commands_that_lie(target: Target) -> None:
    for data in (
        element(0, struct.pack("<I", 4), 0xFFFFFFFF),
        element(0x100, b"\1\0", 0x7FFFFFFF) + b"x" * 200,
        store_command(b"1.2")[:-30],
        store_command(b"\xff\xfe" * 40),
        element(0x9999, b"x" * 1000) * 50,
        struct.pack("<HHI", 8, 8, 0) * 1000,
        b"",
    ):
        peer = target.storing()
        peer.sendall(p_data(data, 3))
        with suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
        ended(peer)


@attack
def a_command_without_end(target: Target) -> None:
    peer = target.associate()
    send_what_is_taken(peer, p_data(b"x" * 100_000, 1), 200)
    ended(peer)


@attack
def empty_pdus_without_end(target: Target) -> None:
    peer = target.associate()
    deadline = time.monotonic() + 3
    with suppress(OSError):
        while time.monotonic() < deadline:
            peer.sendall(pdu(4, b"") * 500)
    peer.close()


@attack
def echoes_whose_answers_nobody_reads(target: Target) -> None:
    with socket.socket() as peer:
        # small before it connects: the answers fill what there is soon
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.bind((target.address, 0))
        peer.settimeout(ENDED_SECONDS)
        peer.connect(("127.0.0.1", target.port))
        peer.sendall(associate_request(CALLING))
        assert read_pdu(peer)[0] == 2
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - begun < ENDED_SECONDS:
                peer.sendall(p_data(ECHO_COMMAND, 3))
        assert time.monotonic() - begun < ENDED_SECONDS, "held by a peer that reads nothing"


@attack
def a_data_set_without_end(target: Target) -> None:
    """Far beyond ``maximum_object_bytes``."""
    peer = target.storing()
    peer.sendall(p_data(store_command(UID), 3))
    send_what_is_taken(peer, p_data(b"\x08\0\x08\0\xf8\xff\xff\xff" + b"x" * 65528, 0), 1600)
    ended(peer)


@attack
def a_data_set_byte_by_byte(target: Target) -> None:
    peer = target.storing()
    peer.sendall(p_data(store_command(UID), 3))
    _drip(peer, p_data(b"x" * 600, 0))


@attack
def data_sets_cut_off(target: Target) -> None:
    for number in range(10):
        peer = target.storing()
        peer.sendall(p_data(store_command(UID), 3) + p_data(b"x" * 60000, 0) * (number + 1))
        if number % 2:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()


def ui(group: int, number: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", group, number, len(value)) + value


def data_set(study: bytes, instance: bytes = UID, sop_class: bytes = CT_STORAGE.encode()) -> bytes:
    return ui(8, 0x16, sop_class) + ui(8, 0x18, instance) + ui(0x20, 0xD, study) + ui(0x20, 0xE, b"1.2.3")


@attack
def uids_that_are_paths(target: Target) -> None:
    for uid in (
        b"../../../../tmp/evil",
        b"/etc/passwd",
        b"1.2.3/../4",
        b"..",
        b".",
        b"",
        b"1" * 65,
        b"1." * 5000,
        b"1.2\0.3",
        b"a b",
    ):
        for instance, made in ((UID, data_set(uid)), (uid, data_set(b"1.2.3", uid)), (UID, data_set(b"1.2.3", uid))):
            peer = target.storing()
            with suppress(ConnectionError):  # a command that the library can't read ends in an abort
                assert store_status(peer, instance, made), f"{uid[:20]!r} was stored"
            peer.close()


@attack
def data_sets_that_lie(target: Target) -> None:
    nested = struct.pack("<HHI", 9, 1, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    good = data_set(b"1.2.3.4")
    samples = [
        b"",
        b"x",
        good[:-3],
        struct.pack("<HHI", 8, 8, 0xFFFFFFF0) + b"x" * 100,
        nested * 30000 + good,
        struct.pack("<HHI", 8, 8, 0) * 400_000 + good[:-3],
        struct.pack("<HHI", 8, 8, 0xFFFFFFFF) + b"\xfe\xff\x0d\xe0\0\0\0\0" * 1000,
        b"\x02\0\0\0\x04\0\0\0\0\0\0\0" + good,
    ]
    peer = target.storing()
    for number, sample in enumerate(samples):
        assert store_status(peer, UID, sample) not in (0x0000, -1), f"sample {number}"
    peer.close()


@attack
def a_deflated_bomb(target: Target) -> None:
    engine = zlib.compressobj(1, wbits=-15)
    bomb = b"".join(engine.compress(b"\0" * (1 << 20)) for _ in range(200)) + engine.flush()
    peer = target.storing("1.2.840.10008.1.2.1.99")
    assert store_status(peer, UID, bomb) not in (0x0000, -1)
    peer.close()


def main(file: Path) -> None:
    """Run all attacks and print what became of them."""
    given = json.loads(file.read_text())
    failures: dict[str, str] = {}

    def run(number: int, name: str) -> None:
        target = Target(given["port"], given["tls_port"], f"127.0.2.{number + 1}", given["certificates"])
        try:
            ATTACKS[name](target)
            failures[name] = ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must hear of it
            failures[name] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(ATTACKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
