"""A connection's first PDU, read before an association is made: who is silent, slow or senseless costs one thread.

An association of the library is two threads that poll, and decoding its request costs by the item. So the request
(PS3.8 9.3.2) is read and measured here, and whom the settings do not know is turned away with its AE titles alone.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

from osteo_daemon.dicom.admission import Rejection

_REQUEST: Final = 0x01
_HEADER: Final = struct.Struct(">BxI")
_ITEM: Final = struct.Struct(">BxH")
_TITLES_END: Final = 36
_ITEMS_BEGIN: Final = 68
_CONTEXT: Final = 0x20
_CONTEXT_HEADER_BYTES: Final = 4
_USER_INFORMATION: Final = 0x50

MAXIMUM_BYTES: Final = 1 << 18
"""128 contexts of sixty transfer syntaxes each stay below."""

MAXIMUM_CONTEXTS: Final = 128
"""Their numbers are the odd ones of one byte (PS3.8 9.3.2.2)."""

MAXIMUM_ITEMS: Final = 4096

# A-ABORT by the service provider (PS3.8 table 9-26): unrecognised, unexpected, or with an invalid value
_UNRECOGNISED: Final = 1
_UNEXPECTED: Final = 2
_INVALID: Final = 6


class NotARequest(Exception):
    """Not an association request that anybody means; ``reason`` is for the log."""

    def __init__(self, reason: str, abort_reason: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.abort = struct.pack(">BxIxxBB", 0x07, 4, 2, abort_reason)


@dataclass(frozen=True, slots=True)
class AssociationRequest:
    """An A-ASSOCIATE-RQ as it came; titles without their padding."""

    pdu: bytes
    called_ae_title: str
    calling_ae_title: str


def read_request(connection: socket.socket, seconds: float) -> AssociationRequest | None:
    """Read the first PDU of a connection.

    Args:
        connection: its time-out is changed.
        seconds: until the last byte must be there.

    Returns:
        The request; None when the peer went without one.

    Raises:
        NotARequest: what came is none, or beyond measure.
        TimeoutError: it did not come in time.
        OSError: the connection broke.
    """
    deadline = time.monotonic() + seconds
    header = _receive(connection, _HEADER.size, deadline)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    if kind != _REQUEST:
        known = 0x01 <= kind <= 0x07
        raise NotARequest("first PDU is no association request", _UNEXPECTED if known else _UNRECOGNISED)
    if length > MAXIMUM_BYTES or length < _ITEMS_BEGIN:
        raise NotARequest("association request of an impossible length", _INVALID)
    body = _receive(connection, length, deadline)
    if body is None:
        return None
    _measure(body)
    return AssociationRequest(header + body, _title(body[4:20]), _title(body[20:_TITLES_END]))


def rejection_pdu(rejection: Rejection) -> bytes:
    """An A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return struct.pack(">BxIxBBB", 0x03, 4, *rejection)


def _measure(body: bytes) -> None:
    """Raises NotARequest when there are more items than anybody means, or they do not fit into each other."""
    contexts = items = 0
    position = _ITEMS_BEGIN
    while position < len(body):
        kind, end = _item(body, position, len(body))
        position += _ITEM.size
        items += 1
        contexts += kind == _CONTEXT
        if kind in (_CONTEXT, _USER_INFORMATION):
            if kind == _CONTEXT:
                if position < end and body[position] % 2 == 0:
                    raise NotARequest("presentation context of an even number", _INVALID)
                position += _CONTEXT_HEADER_BYTES
            while position < end:
                _kind, position = _item(body, position, end)
                items += 1
        if contexts > MAXIMUM_CONTEXTS or items > MAXIMUM_ITEMS:
            raise NotARequest("association request with too many items", _INVALID)
        position = end


def _item(body: bytes, position: int, end: int) -> tuple[int, int]:
    """Type of the item that begins here, and where it ends."""
    if position + _ITEM.size > end:
        raise NotARequest("association request ends inside an item", _INVALID)
    kind, length = _ITEM.unpack_from(body, position)
    if position + _ITEM.size + length > end:
        raise NotARequest("association request ends inside an item", _INVALID)
    return kind, position + _ITEM.size + length


def _title(value: bytes) -> str:
    return value.decode("ascii", "replace").strip()


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes | None:
    received = bytearray(count)
    view = memoryview(received)
    done = 0
    while done < count:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
        step = connection.recv_into(view[done:])
        if not step:
            return None
        done += step
    return bytes(received)
