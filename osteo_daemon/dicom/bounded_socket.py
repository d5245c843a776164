"""The socket of one association: whole PDUs within bounds, and answers that nobody waits for end it.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from pynetdicom.transport import AssociationSocket

from osteo_daemon.dicom.admission import Network

_LARGEST_CHUNK_BYTES = 1 << 20
_COMMAND_BYTES = 1 << 20
_QUEUED_MESSAGES = 2

TOO_SLOW = "a PDU did not come in time"


class BeyondLimit(OSError):
    """A peer sends more, or more slowly, than the listener takes: its connection ends."""


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """Bounds of one listener.

    Attributes:
        networks: who may connect at all; nobody when empty.
        pending_per_address: connections of one address that are not yet associations.
        pending: the same of all addresses; the address that has most gives way.
        associate_seconds: from connection to A-ASSOCIATE-RQ, TLS handshake included.
        pdu_seconds: for one PDU, once its first byte is there.
        maximum_pdu_bytes: as offered in negotiation.
        maximum_object_bytes: of one message's data set.
    """

    networks: tuple[Network, ...]
    associate_seconds: float
    pdu_seconds: float
    maximum_pdu_bytes: int
    maximum_object_bytes: int
    pending_per_address: int = 64
    pending: int = 256


class BoundedSocket(AssociationSocket):  # type: ignore[misc]
    """Reads whole PDUs, within bounds.

    Attributes:
        greeting: the first PDU, read before: given to who reads first.
        refuse: told why the connection ends, where it is the listener who ends it.
    """

    limits: ListenerLimits
    greeting: bytes
    refuse: Callable[[str], None]

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly ``nr_bytes``, fewer when the peer closes.

        Raises:
            BeyondLimit: more than the bound was announced, or it did not come in time.
            OSError: the connection broke.
        """
        try:
            return self._recv(nr_bytes)
        except BeyondLimit as error:
            self.refuse(str(error))
            raise

    def _recv(self, nr_bytes: int) -> bytearray:
        connection = self.socket
        if connection is None:
            raise OSError("closed")
        if self.greeting:
            given, self.greeting = self.greeting[:nr_bytes], self.greeting[nr_bytes:]
            return bytearray(given)
        # PS3.8 D.1: the maximum length is that of the variable field; senders err by their own headers
        if nr_bytes > self.limits.maximum_pdu_bytes + 4096:
            raise BeyondLimit("the announced PDU is too long")
        self._check_message()
        deadline = time.monotonic() + self.limits.pdu_seconds
        received = bytearray(nr_bytes)
        view = memoryview(received)
        count = 0
        before = connection.gettimeout()
        try:
            while count < nr_bytes:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise BeyondLimit(TOO_SLOW)
                connection.settimeout(remaining)
                try:
                    step = connection.recv_into(view[count : count + _LARGEST_CHUNK_BYTES])
                except TimeoutError:
                    raise BeyondLimit(TOO_SLOW) from None
                if not step:
                    break
                count += step
        finally:
            view.release()
            # the thread that aborts the association may have closed it
            if connection.fileno() >= 0:
                connection.settimeout(before)
        del received[count:]
        return received

    @property
    def ready(self) -> bool:
        """True when there are bytes to read and room for the message that they belong to."""
        if self.greeting:
            return True
        if self._assoc.dimse.msg_queue.qsize() >= _QUEUED_MESSAGES:
            return False
        return bool(super().ready)

    def send(self, bytestream: bytes) -> None:
        """Send all of it, or end the connection: after a failure the library would leave it open."""
        connection = self.socket
        try:
            if connection is None:
                raise OSError("closed")
            connection.sendall(bytestream)
        except OSError as error:
            if isinstance(error, (TimeoutError, BlockingIOError)):  # of Python, or of the kernel
                self.refuse("answers that nobody reads")
            if connection is not None:
                hang_up(connection)
            self.event_queue.put("Evt17")

    def _shutdown_socket(self) -> None:
        # the library leaves a connection open that was shut down before; the kernel would hold its peer's bytes
        if self.socket is not None:
            hang_up(self.socket)
            self.socket.close()

    def _check_message(self) -> None:
        message = self._assoc.dimse.message
        if message is None:
            return
        data_set = message.data_set
        if data_set is not None and data_set.tell() > self.limits.maximum_object_bytes:
            raise BeyondLimit("the data set is too long")
        if message.encoded_command_set.tell() > _COMMAND_BYTES:
            raise BeyondLimit("the command set is too long")


def hang_up(connection: socket.socket) -> None:
    """End a connection that another thread may be using; that thread closes it."""
    with contextlib.suppress(OSError):  # it went first
        # of the plain socket, under TLS too: its own shutdown would take the TLS state from the thread that reads
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
