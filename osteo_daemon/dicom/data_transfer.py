"""C-STORE as one thread reads it: from the socket into one buffer, to the spool meanwhile, and answered at once.

pynetdicom hands a data set from PDU to PDU through five objects, two queues and two threads that poll every
millisecond. Here the thread that reads the socket receives each fragment where it stays, passes it on for writing and
answers. All else (negotiation, C-ECHO and other commands, release, abort) stays the library's.

Message and PDU layouts: PS3.7 6.3.1 and annex E.1, PS3.8 9.3.5 and annex E. Overrides private names of pynetdicom 3.0:
the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider

from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.log import get_logger

_P_DATA = 0x04
_PDU_HEADER = struct.Struct(">BxI")
_PDV_HEADER = struct.Struct(">IBB")
_ELEMENT = struct.Struct("<HHI")
_KNOWN_PDUS = range(0x01, 0x08)

# message control header (PS3.8 E.2)
_COMMAND = 0x01
_LAST = 0x02

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
_COMMAND_BYTES = 1 << 20
_FIRST_BUFFER_BYTES = 1 << 20
_KEPT_BUFFER_BYTES = 8 << 20
_WRITTEN_AT_ONCE_BYTES = 96 << 10  # less than a fragment of the usual 128 KiB
_RECEIVED_AT_ONCE_BYTES = 1 << 20
_WAIT_SECONDS = 0.05
_LENT_SECONDS = 2.0

_ABORTED = "Evt19"  # unrecognised or invalid PDU: A-P-ABORT
_CLOSED = "Evt17"  # transport connection closed
_DATA = "Evt10"  # P-DATA-TF received


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


class Arrival(Protocol):
    """One data set on its way; `finish` or `abandon` ends it. None of them raises."""

    def write(self, fragment: memoryview) -> None:
        """The next bytes, valid during the call."""

    def finish(self, data_set: memoryview) -> tuple[int, str]:
        """All bytes are there: status and error comment of the answer. The view is valid during the call."""

    def abandon(self) -> None:
        """The rest will not come."""


Begin = Callable[[Any, StoreRequest], Arrival | None]
"""Given association and request: where its data set goes; None when the library is to answer."""


class _ProtocolError(Exception):
    """A PDU that PS3.8 does not allow here."""


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
    step = len(command) if maximum_pdu_bytes == 0 else max(maximum_pdu_bytes - _PDV_HEADER.size, 1)
    return b"".join(
        _p_data(request.context_id, _COMMAND | (_LAST if begin + step >= len(command) else 0), command[begin:][:step])
        for begin in range(0, len(command), step)
    )


class MessageReader:
    """Reads the PDUs of one association and assembles its C-STORE requests.

    Args:
        association: pynetdicom's.
        begin: tells where a data set goes.
        pdu_seconds: in which a PDU must come, once its first bytes are there.
        maximum_pdu_bytes: as offered in negotiation.
        maximum_object_bytes: of one data set.
        budget: of the buffers of all associations.
    """

    def __init__(
        self,
        association: Any,
        begin: Begin,
        *,
        pdu_seconds: float,
        maximum_pdu_bytes: int,
        maximum_object_bytes: int,
        budget: BufferBudget,
    ) -> None:
        self._association = association
        self._begin = begin
        self._pdu_seconds = pdu_seconds
        # PS3.8 D.1: the maximum length is that of the variable field; senders err by their own headers
        self._maximum_pdu_bytes = maximum_pdu_bytes + 4096
        self._maximum_object_bytes = maximum_object_bytes
        self._budget = budget
        self._headers = memoryview(bytearray(_PDU_HEADER.size + _PDV_HEADER.size))
        self._item_header = self._headers[_PDU_HEADER.size :]
        self._prepared: Any = None
        self._poller: Any = None
        self._command = bytearray()
        self._buffer = bytearray()
        self._received = 0
        self._written = 0
        self._request: StoreRequest | None = None
        self._arrival: Arrival | None = None
        self._deadline = 0.0
        self._lent_until = 0.0
        self.library_works = threading.Event()

    @property
    def busy(self) -> bool:
        """True while a message has begun and is not answered."""
        return self._arrival is not None or len(self._command) > 0

    @property
    def lent(self) -> bool:
        """True for some time after the library was given something that it has to answer."""
        if not self.library_works.is_set():
            return False
        if time.monotonic() > self._lent_until:
            self.library_works.clear()
        return True

    def wait(self, seconds: float) -> bool:
        """True when there is something to read; waits for it so long."""
        try:
            connection = self._connection()
            if isinstance(connection, ssl.SSLSocket) and connection.pending():
                return True
            return bool(self._poller.poll(seconds * 1000))
        except (OSError, ValueError):
            return True  # reading will tell

    def read_pdu(self) -> str | None:
        """Read one PDU and do what it asks; returns the event that it means to the library's state machine, if any.

        With `_DATA` and those of other PDU types, the PDU is in the library's queue.
        """
        try:
            return self._read_pdu()
        except (OSError, ValueError) as error:  # ValueError: the file descriptor is -1, closed by another thread
            get_logger().info("connection_lost", detail=type(error).__name__)
            self.abandon()
            return _CLOSED
        except _ProtocolError:
            self.abandon()
            return _ABORTED

    def abandon(self) -> None:
        """Give up what has not come to its end."""
        arrival, self._arrival = self._arrival, None
        self._command.clear()
        if arrival is not None:
            arrival.abandon()

    def release(self) -> None:
        """Give the buffer's memory back."""
        self._buffer = bytearray()
        self._budget.hold(id(self), 0)

    def _read_pdu(self) -> str | None:
        self._deadline = time.monotonic() + self._pdu_seconds
        # the header of a P-DATA-TF and that of its first item in one go; other PDUs may be shorter than both
        count = self._receive(self._headers, _PDU_HEADER.size)
        kind, length = _PDU_HEADER.unpack_from(self._headers)
        if kind not in _KNOWN_PDUS:
            raise _ProtocolError
        if length > self._maximum_pdu_bytes:
            raise OSError("the announced PDU is too long")
        if kind != _P_DATA:
            self.abandon()
            begun = bytes(self._headers[:count])[: _PDU_HEADER.size + length]
            return self._lend(begun + self._take(_PDU_HEADER.size + length - len(begun)))
        if length < _PDV_HEADER.size:
            raise _ProtocolError
        self._receive(self._headers[count:])
        while length:
            item_length, context_id, control = _PDV_HEADER.unpack(self._item_header)
            length -= item_length + 4
            if item_length < 2 or length < 0:
                raise _ProtocolError
            if control & _COMMAND:
                if (event := self._command_fragment(item_length - 2, context_id, control, length)) is not None:
                    return event
            else:
                self._data_fragment(item_length - 2, context_id, last=bool(control & _LAST))
            if 0 < length < _PDV_HEADER.size:
                raise _ProtocolError
            if length:
                self._receive(self._item_header)
        return None

    def _command_fragment(self, size: int, context_id: int, control: int, rest: int) -> str | None:
        if self._arrival is not None:
            raise _ProtocolError  # the data set of the last command has not ended
        self._command += self._take(size)
        if len(self._command) > _COMMAND_BYTES:
            raise OSError("the command set is too long")
        if not control & _LAST:
            return None
        command = bytes(self._command)
        self._command.clear()
        request = read_store_request(command, context_id)
        arrival = None if request is None else self._begin(self._association, request)
        if arrival is None:
            pdvs = _p_data(context_id, control, command)[_PDU_HEADER.size :] + self._take(rest)
            return self._lend(_PDU_HEADER.pack(_P_DATA, len(pdvs)) + pdvs)
        self._request, self._arrival = request, arrival
        self._received = self._written = 0
        return None

    def _data_fragment(self, size: int, context_id: int, *, last: bool) -> None:
        arrival, request = self._arrival, self._request
        if arrival is None or request is None or context_id != request.context_id:
            raise _ProtocolError
        end = self._received + size
        if end > self._maximum_object_bytes:
            raise OSError("the data set is too long")
        if end > len(self._buffer):
            length = max(end, 2 * len(self._buffer), _FIRST_BUFFER_BYTES)
            self._budget.hold(id(self), length)
            grown = bytearray(length)
            grown[: self._received] = memoryview(self._buffer)[: self._received]
            self._buffer = grown
        view = memoryview(self._buffer)
        self._receive(view[self._received : end])
        self._received = end
        if last or end - self._written >= _WRITTEN_AT_ONCE_BYTES:
            arrival.write(view[self._written : end])
            self._written = end
        if not last:
            return
        status, comment = arrival.finish(view[:end])
        self._arrival = None
        if len(self._buffer) > _KEPT_BUFFER_BYTES:
            self.release()
        maximum = int(self._association.requestor.maximum_length or 0)
        self._association.dul.socket.send(store_response(request, status, comment, maximum))

    def _lend(self, pdu: bytes) -> str:
        """Let the library decode a PDU; returns the event."""
        self._lent_until = time.monotonic() + _LENT_SECONDS
        self.library_works.set()
        dul = self._association.dul
        try:
            decoded, event = dul._decode_pdu(bytearray(pdu))
        except Exception as error:  # noqa: BLE001
            # the library's decoders raise what they like; its own reader catches the same
            get_logger().info("pdu_unreadable", detail=type(error).__name__)
            return _ABORTED
        dul._recv_pdu.put(decoded)
        return str(event)

    def _take(self, size: int) -> bytes:
        taken = bytearray(size)
        self._receive(memoryview(taken))
        return bytes(taken)

    def _receive(self, view: memoryview, at_least: int | None = None) -> int:
        """Fill a view, or only so much of it when no more is there; returns how much it holds.

        Raises:
            OSError: the peer closed, or it did not come in time. A wait ends at most twice the time after its begin.
        """
        connection = self._connection()
        needed = len(view) if at_least is None else at_least
        count = 0
        while count < needed:
            step = connection.recv_into(view[count : count + _RECEIVED_AT_ONCE_BYTES])
            if not step:
                raise ConnectionError("closed inside a PDU")
            count += step
            if count < needed and time.monotonic() > self._deadline:
                raise TimeoutError("the PDU did not come in time")
        return count

    def _connection(self) -> Any:
        wrapper = self._association.dul.socket
        connection = None if wrapper is None else wrapper.socket
        if connection is None:
            raise ConnectionError("closed")
        if connection is not self._prepared:
            self._prepare(connection)
        return connection

    def _prepare(self, connection: Any) -> None:
        if isinstance(connection, ssl.SSLSocket):
            connection.settimeout(self._pdu_seconds)
        else:
            # the kernel's time-out costs nothing; Python's is a poll before every read
            connection.settimeout(None)
            seconds, rest = divmod(self._pdu_seconds, 1)
            timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._prepared = connection


class _StreamingDul(DULServiceProvider):  # type: ignore[misc]
    reader: MessageReader

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001
            # the edge of this thread: the library's decoders raise what they like
            get_logger().info("message_unreadable", detail=type(error).__name__)
        finally:
            connection = None if self.socket is None else self.socket.socket
            if connection is not None:
                # the library leaves it open when its reactor fails; shut down alone, it would hold the peer's bytes
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                connection.close()
            self.reader.abandon()
            self.reader.release()
            self.reader.library_works.set()

    def _is_transport_event(self) -> bool:
        association, reader = self.assoc, self.reader
        if self.state_machine.current_state != "Sta6" or not association.is_established:
            moved = bool(super()._is_transport_event())
            over = not {_ABORTED, _CLOSED}.isdisjoint(self.event_queue.queue)
            if over and self.state_machine.current_state == "Sta2":
                # no request will come of it: the thread that waits for one ends now, not when the time for it is over
                self.to_user_queue.put(None)
            return moved
        if association.dimse.message is not None:  # the data set of a message that the library assembles
            return bool(super()._is_transport_event())
        moved = False
        while not (self._kill_thread or self.to_provider_queue.queue):
            lent = reader.lent
            if lent and not self.socket.ready:
                break
            if not lent and not reader.wait(_WAIT_SECONDS):
                break
            moved = True
            self._idle_timer.restart()
            if (event := reader.read_pdu()) is not None:
                self.event_queue.put(event)
                break
            self._idle_timer.restart()
        return moved


class _PatientDimse(DIMSEServiceProvider):  # type: ignore[misc]
    def get_msg(self, block: bool = False) -> Any:
        # the association's thread asks every millisecond; the library has work only when it was given something
        if not block:
            self.assoc.dul.reader.library_works.wait(_WAIT_SECONDS)
        return super().get_msg(block)


def stream_stores(association: Any, reader: MessageReader) -> None:
    """Let ``reader`` read an association's messages; before its threads start."""
    association.dul.reader = reader
    association.dul.__class__ = _StreamingDul
    association.dimse.__class__ = _PatientDimse


def is_busy(association: Any) -> bool:
    """True while a message of the association has begun and is not answered."""
    reader: MessageReader | None = getattr(association.dul, "reader", None)
    queued = association.dimse.message is not None or association.dimse.msg_queue.qsize() > 0
    return queued or (reader is not None and reader.busy)


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


def _p_data(context_id: int, control: int, value: bytes) -> bytes:
    item = _PDV_HEADER.pack(len(value) + 2, context_id, control) + value
    return _PDU_HEADER.pack(_P_DATA, len(item)) + item
