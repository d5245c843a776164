"""The messages of one C-STORE as bytes: its request read, its response and PDUs written.

Message and PDU layouts: PS3.7 6.3.1 and annex E.1, PS3.8 9.3.5 and annex E.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

P_DATA = 0x04
PDU_HEADER = struct.Struct(">BxI")
PDV_HEADER = struct.Struct(">IBB")
_ELEMENT = struct.Struct("<HHI")

# message control header (PS3.8 E.2)
COMMAND = 0x01
LAST = 0x02

# command elements (PS3.7 E.1)
_AFFECTED_SOP_CLASS = 0x0002
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_RESPONDED = 0x0120
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_ERROR_COMMENT = 0x0902
_AFFECTED_SOP_INSTANCE = 0x1000
_MOVE_ORIGINATOR = 0x1030
_C_STORE_RQ = 0x0001
_C_STORE_RSP = 0x8001
_NO_DATA_SET = 0x0101

_UID_LENGTH = 64  # PS3.5 9.1


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """What a C-STORE-RQ announces, before its data set.

    Attributes:
        move_originator: AE title of whoever had it sent by C-MOVE; empty when nobody had.
    """

    message_id: int
    context_id: int
    sop_class_uid: str
    sop_instance_uid: str
    move_originator: str = ""


def read_store_request(command: bytes, context_id: int) -> StoreRequest | None:
    """A command set as a C-STORE-RQ with data set; None when it is anything else, or not readable."""
    found: dict[int, bytes] = {}
    position = 0
    while position + _ELEMENT.size <= len(command):
        group, element, length = _ELEMENT.unpack_from(command, position)
        position += _ELEMENT.size + length
        if group or position > len(command):
            return None
        found[element] = command[position - length : position]
    try:
        (field,), (data_set,) = _us(found[_COMMAND_FIELD]), _us(found[_DATA_SET_TYPE])
        if position != len(command) or field != _C_STORE_RQ or data_set == _NO_DATA_SET:
            return None
        return StoreRequest(
            message_id=_us(found[_MESSAGE_ID])[0],
            context_id=context_id,
            sop_class_uid=_uid(found[_AFFECTED_SOP_CLASS]),
            sop_instance_uid=_uid(found[_AFFECTED_SOP_INSTANCE]),
            move_originator=found.get(_MOVE_ORIGINATOR, b"").decode("ascii", "replace").strip(" \x00"),
        )
    except (KeyError, struct.error, ValueError):  # what is no ASCII too
        return None


def store_response(request: StoreRequest, status: int, comment: str, maximum_pdu_bytes: int) -> bytes:
    """The P-DATA-TF PDUs of a C-STORE-RSP.

    Args:
        request: what is answered.
        status: PS3.4 B.2.3.
        comment: left out when empty; ASCII, at most 64 characters.
        maximum_pdu_bytes: what the peer takes; 0: no limit (PS3.8 D.1).
    """
    elements = [
        _element(_AFFECTED_SOP_CLASS, _even(request.sop_class_uid, b"\x00")),
        _element(_COMMAND_FIELD, struct.pack("<H", _C_STORE_RSP)),
        _element(_MESSAGE_ID_RESPONDED, struct.pack("<H", request.message_id)),
        _element(_DATA_SET_TYPE, struct.pack("<H", _NO_DATA_SET)),
        _element(_STATUS, struct.pack("<H", status)),
    ]
    if comment:
        elements.append(_element(_ERROR_COMMENT, _even(comment[:64], b" ")))
    elements.append(_element(_AFFECTED_SOP_INSTANCE, _even(request.sop_instance_uid, b"\x00")))
    body = b"".join(elements)
    command = _element(0x0000, struct.pack("<I", len(body))) + body
    step = len(command) if maximum_pdu_bytes == 0 else max(maximum_pdu_bytes - PDV_HEADER.size, 1)
    return b"".join(
        p_data(request.context_id, COMMAND | (LAST if begin + step >= len(command) else 0), command[begin:][:step])
        for begin in range(0, len(command), step)
    )


def _us(value: bytes) -> tuple[int]:
    (number,) = struct.unpack("<H", value)
    return (number,)


def _uid(value: bytes) -> str:
    uid = value.rstrip(b"\x00 ").decode("ascii")
    if len(uid) > _UID_LENGTH:
        raise ValueError("too long")
    return uid


def _even(text: str, padding: bytes) -> bytes:
    value = text.encode("ascii", "replace")
    return value + padding * (len(value) % 2)


def _element(element: int, value: bytes) -> bytes:
    return _ELEMENT.pack(0x0000, element, len(value)) + value


def p_data(context_id: int, control: int, value: bytes) -> bytes:
    item = PDV_HEADER.pack(len(value) + 2, context_id, control) + value
    return PDU_HEADER.pack(P_DATA, len(item)) + item
