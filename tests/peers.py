"""Peers that speak the upper layer byte by byte: what no library would send."""

from __future__ import annotations

import contextlib
import socket
import struct

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


def established(port: int, **request: bytes) -> socket.socket:
    """A connection that has become an association."""
    peer = connect(port)
    peer.sendall(associate_request(**request))  # type: ignore[arg-type]
    assert peer.recv(1) == b"\x02"  # A-ASSOCIATE-AC
    return peer


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
