"""C-STORE as one thread reads it: from the socket into one buffer, to the spool meanwhile, and answered at once.

pynetdicom hands a data set from PDU to PDU through five objects, two queues and two threads that poll every
millisecond. Here the thread that reads the socket receives each fragment where it stays, passes it on for writing and
answers. All else (negotiation, C-ECHO and other commands, release, abort) stays the library's.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from osteo_daemon.dicom.bounded_socket import TOO_SLOW, BeyondLimit
from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.store_messages import (
    COMMAND,
    LAST,
    P_DATA,
    PDU_HEADER,
    PDV_HEADER,
    StoreRequest,
    p_data,
    read_store_request,
    store_response,
)
from osteo_daemon.log import get_logger

_KNOWN_PDUS = range(0x01, 0x08)
_COMMAND_BYTES = 1 << 20
_FIRST_BUFFER_BYTES = 1 << 20
_KEPT_BUFFER_BYTES = 8 << 20
_WRITTEN_AT_ONCE_BYTES = 96 << 10  # less than a fragment of the usual 128 KiB
_RECEIVED_AT_ONCE_BYTES = 1 << 20
WAIT_SECONDS = 0.05
_LENT_SECONDS = 2.0
_NO_FIT = "items that do not fit into their PDU"

ABORTED = "Evt19"  # unrecognised or invalid PDU: A-P-ABORT
CLOSED = "Evt17"  # transport connection closed
_DATA = "Evt10"  # P-DATA-TF received


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


class MessageReader:
    """Reads the PDUs of one association and assembles its C-STORE requests.

    Args:
        association: pynetdicom's.
        begin: tells where a data set goes.
        pdu_seconds: in which a PDU must come, once its first bytes are there.
        maximum_pdu_bytes: as offered in negotiation.
        maximum_object_bytes: of one data set.
        budget: of the buffers of all associations.
        refuse: told why the association ends, where it is this end that ends it.
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
        refuse: Callable[[str], None],
    ) -> None:
        self._association = association
        self._begin = begin
        self._pdu_seconds = pdu_seconds
        # PS3.8 D.1: the maximum length is that of the variable field; senders err by their own headers
        self._maximum_pdu_bytes = maximum_pdu_bytes + 4096
        self._maximum_object_bytes = maximum_object_bytes
        self._budget = budget
        self.refuse = refuse
        self._headers = memoryview(bytearray(PDU_HEADER.size + PDV_HEADER.size))
        self._item_header = self._headers[PDU_HEADER.size :]
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
        self.answering = False  # all of an object has come: its sender waits for us
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
            self.abandon()
            if isinstance(error, BeyondLimit):
                self.refuse(str(error))
            elif isinstance(error, (TimeoutError, BlockingIOError)):  # of Python, or of the kernel
                self.refuse(TOO_SLOW)
            else:
                get_logger().info("connection_lost", detail=type(error).__name__)
            return CLOSED
        except _ProtocolError as error:
            self.abandon()
            self.refuse(str(error))
            return ABORTED

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
        count = self._receive(self._headers, PDU_HEADER.size)
        kind, length = PDU_HEADER.unpack_from(self._headers)
        if kind not in _KNOWN_PDUS:
            raise _ProtocolError("a PDU of no known type")
        if length > self._maximum_pdu_bytes:
            raise BeyondLimit("the announced PDU is too long")
        if kind != P_DATA:
            self.abandon()
            begun = bytes(self._headers[:count])[: PDU_HEADER.size + length]
            return self._lend(begun + self._take(PDU_HEADER.size + length - len(begun)))
        if length < PDV_HEADER.size:
            raise _ProtocolError(_NO_FIT)
        self._receive(self._headers[count:])
        while length:
            item_length, context_id, control = PDV_HEADER.unpack(self._item_header)
            length -= item_length + 4
            if item_length < 2 or length < 0:
                raise _ProtocolError(_NO_FIT)
            if control & COMMAND:
                if (event := self._command_fragment(item_length - 2, context_id, control, length)) is not None:
                    return event
            else:
                self._data_fragment(item_length - 2, context_id, last=bool(control & LAST))
            if 0 < length < PDV_HEADER.size:
                raise _ProtocolError(_NO_FIT)
            if length:
                self._receive(self._item_header)
        return None

    def _command_fragment(self, size: int, context_id: int, control: int, rest: int) -> str | None:
        if self._arrival is not None:
            raise _ProtocolError("a command in the middle of a data set")
        self._command += self._take(size)
        if len(self._command) > _COMMAND_BYTES:
            raise BeyondLimit("the command set is too long")
        if not control & LAST:
            return None
        command = bytes(self._command)
        self._command.clear()
        request = read_store_request(command, context_id)
        arrival = None if request is None else self._begin(self._association, request)
        if arrival is None:
            pdvs = p_data(context_id, control, command)[PDU_HEADER.size :] + self._take(rest)
            return self._lend(PDU_HEADER.pack(P_DATA, len(pdvs)) + pdvs)
        self._request, self._arrival = request, arrival
        self._received = self._written = 0
        return None

    def _data_fragment(self, size: int, context_id: int, *, last: bool) -> None:
        arrival, request = self._arrival, self._request
        if arrival is None or request is None or context_id != request.context_id:
            raise _ProtocolError("a data set without its command")
        end = self._received + size
        if end > self._maximum_object_bytes:
            raise BeyondLimit("the data set is too long")
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
        self.answering = True
        status, comment = arrival.finish(view[:end])
        self._association.dul._idle_timer.restart()
        self.answering = False
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
            self.refuse(f"a PDU that cannot be read ({type(error).__name__})")
            return ABORTED
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
                raise TimeoutError
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
