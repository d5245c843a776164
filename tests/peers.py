"""Peers that speak the upper layer byte by byte: what no library would send."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from typing import Any

from tests.fakes import CALLED, CALLING, LOOPBACK

VERIFICATION = "1.2.840.10008.1.1"
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT = "1.2.840.10008.1.2"
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"


def connect(port: int, source: str = LOOPBACK) -> socket.socket:
    """A connection that has said nothing."""
    return socket.create_connection((LOOPBACK, port), timeout=5, source_address=(source, 0))


def item(kind: int, body: bytes, length: int | None = None) -> bytes:
    """An item of an association PDU; ``length`` is what it says of itself (PS3.8 9.3.2)."""
    return struct.pack(">BBH", kind, 0, len(body) if length is None else length) + body


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    """A PDU; ``length`` is what it says of itself."""
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def context(number: int, abstract_syntax: str = VERIFICATION, syntaxes: int = 1) -> bytes:
    """A proposed presentation context."""
    offered = item(0x40, IMPLICIT.encode()) * syntaxes
    return item(0x20, bytes([number, 0, 0, 0]) + item(0x30, abstract_syntax.encode()) + offered)


USER_INFORMATION = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3")


def associate_request(
    calling: str | bytes = CALLING,
    called: str | bytes = CALLED,
    *,
    contexts: bytes | None = None,
    user: bytes = USER_INFORMATION,
    application: bytes = APPLICATION_CONTEXT.encode(),
) -> bytes:
    """The bytes of an A-ASSOCIATE-RQ, for verification unless told otherwise (PS3.8 9.3.2)."""
    titles = b"".join((title.encode() if isinstance(title, str) else title).ljust(16) for title in (called, calling))
    body = struct.pack(">HH", 1, 0) + titles + b"\x00" * 32
    body += item(0x10, application) + (context(1) if contexts is None else contexts) + item(0x50, user)
    return pdu(1, body)


def established(port: int, source: str = LOOPBACK, **request: Any) -> socket.socket:
    """A connection that has become an association."""
    peer = connect(port, source)
    peer.sendall(associate_request(**request))
    kind, _body = read_pdu(peer)
    assert kind == 2, f"PDU type {kind} instead of an A-ASSOCIATE-AC"
    return peer


def rejection(
    port: int, calling: str = CALLING, called: str = CALLED, abstract_syntax: str = VERIFICATION
) -> tuple[int, ...]:
    """Result, source and reason of the A-ASSOCIATE-RJ that answers a request (PS3.8 9.3.4); the peer stays until then.

    pynetdicom's requestor would not do: where its reactor has the rejection, and has closed, before its caller looks
    whether there is a connection, it calls that an abort.
    """
    with connect(port) as peer:
        peer.settimeout(30)
        peer.sendall(associate_request(calling, called, contexts=context(1, abstract_syntax)))
        kind, body = read_pdu(peer)
        assert kind == 3, f"PDU type {kind} instead of an A-ASSOCIATE-RJ"
        return tuple(body[1:])


def read_pdu(peer: socket.socket) -> tuple[int, bytes]:
    """The next PDU: its type and what follows its length; (0, b"") when the other end has closed."""
    header = _exactly(peer, 6)
    if len(header) < 6:
        return 0, b""
    kind, length = struct.unpack(">BxI", header)
    return kind, _exactly(peer, length)


def _exactly(peer: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        part = peer.recv(count - len(received))
        if not part:
            break
        received += part
    return received


def element(number: int, value: bytes, length: int | None = None) -> bytes:
    """A command element (PS3.7 6.3.1); ``length`` is what it says of itself."""
    return struct.pack("<HHI", 0, number, len(value) if length is None else length) + value


def command(*elements: bytes) -> bytes:
    """A command set with its group length."""
    body = b"".join(elements)
    return element(0, struct.pack("<I", len(body))) + body


def us(value: int) -> bytes:
    return struct.pack("<H", value)


ECHO_COMMAND = command(
    element(2, b"1.2.840.10008.1.1\0"), element(0x100, us(0x30)), element(0x110, us(1)), element(0x800, us(0x101))
)


def store_command(sop_instance: bytes, sop_class: bytes = CT_STORAGE.encode(), message_id: int = 1) -> bytes:
    """A C-STORE-RQ."""
    return command(
        element(2, sop_class + b"\0" * (len(sop_class) % 2)),
        element(0x100, us(1)),
        element(0x110, us(message_id)),
        element(0x700, us(0)),
        element(0x800, us(0)),
        element(0x1000, sop_instance + b"\0" * (len(sop_instance) % 2)),
    )


def p_data(value: bytes, control: int, number: int = 1, length: int | None = None) -> bytes:
    """A P-DATA-TF with one fragment; ``control``: 1 command, 2 last (PS3.8 E.2); ``length`` is what the item says."""
    body = struct.pack(">IBB", len(value) + 2 if length is None else length, number, control) + value
    return pdu(4, body)


def echo_seconds(port: int, security: ssl.SSLContext | None = None, calling: str = CALLING) -> float:
    """A whole legitimate association with one C-ECHO; how long it took."""
    begun = time.monotonic()
    with connect(port) as plain, _secured(plain, security) as peer:
        peer.settimeout(30)
        peer.sendall(associate_request(calling))
        assert read_pdu(peer)[0] == 2
        peer.sendall(p_data(ECHO_COMMAND, 3))
        kind, answer = read_pdu(peer)
        assert kind == 4
        assert element(0x900, us(0)) in answer
        peer.sendall(pdu(5, b"\0" * 4))
        assert read_pdu(peer)[0] == 6
    return time.monotonic() - begun


def store_status(
    peer: socket.socket, sop_instance: bytes, data_set: bytes, sop_class: bytes = CT_STORAGE.encode()
) -> int:
    """Send one object under context 1 of an association; the status of the answer, -1 when there is none."""
    peer.sendall(p_data(store_command(sop_instance, sop_class), 3))
    for begin in range(0, max(len(data_set), 1), 65536):
        part = data_set[begin : begin + 65536]
        peer.sendall(p_data(part, 2 if begin + 65536 >= len(data_set) else 0))
    kind, answer = read_pdu(peer)
    at = answer.find(struct.pack("<HHI", 0, 0x900, 2))
    return struct.unpack_from("<H", answer, at + 8)[0] if kind == 4 and at > 0 else -1


def _secured(plain: socket.socket, security: ssl.SSLContext | None) -> socket.socket:
    return plain if security is None else security.wrap_socket(plain, server_hostname=LOOPBACK)


def closed_within(peer: socket.socket, seconds: float) -> bool:
    """True when the other end hangs up in time."""
    peer.settimeout(seconds)
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def send_what_is_taken(peer: socket.socket, data: bytes, times: int = 1) -> None:
    """Send until the other end hangs up or takes no more."""
    with contextlib.suppress(OSError):
        for _ in range(times):
            peer.sendall(data)
