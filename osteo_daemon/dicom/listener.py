"""pynetdicom's listener with its four holes closed (docs/decisions): nobody who is silent, slow or greedy stops others.

* A TLS handshake runs in the connection's own thread, with a time-out, never in the accept loop.
* A PDU is read within a bounded length and a bounded time; the bound does not wait for negotiation.
* Connections that have not become associations are capped apart from associations; the oldest gives way.
* A message, and the queue of messages, has a bound: the peer waits in TCP.
* A peer that does not read what we answer holds a thread for a bounded time only.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from osteo_daemon.dicom.admission import Network, allowed
from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.data_transfer import Begin, MessageReader, stream_stores
from osteo_daemon.dicom.refusals import Refusals
from osteo_daemon.dicom.tls import ListenerTls
from osteo_daemon.tls import reason_of

_LARGEST_CHUNK_BYTES = 1 << 20
_ASSOCIATE_BYTES = 1 << 20  # 128 contexts with every syntax and negotiation item stay far below
_QUEUED_MESSAGES = 2


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


@dataclass(frozen=True, slots=True)
class _Connection:
    since: float
    host: str
    socket: socket.socket
    association: Any  # None until its thread is made

    @property
    def silent(self) -> bool:
        return self.association is None or not self.association.is_established

    @property
    def ended(self) -> bool:
        # ident is None before the start
        association = self.association
        return association is not None and association.ident is not None and not association.is_alive()


class _BoundedSocket(AssociationSocket):  # type: ignore[misc]
    """Reads whole PDUs, within bounds."""

    limits: ListenerLimits

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly ``nr_bytes``, fewer when the peer closes.

        Raises:
            OSError: more than the bound was announced, or it did not come in time.
        """
        connection = self.socket
        if connection is None:
            raise OSError("closed")
        established = self._assoc.is_established
        if nr_bytes > (self._largest_pdu() if established else _ASSOCIATE_BYTES):
            raise OSError("the announced PDU is too long")
        self._check_message()
        deadline = time.monotonic() + (self.limits.pdu_seconds if established else self.limits.associate_seconds)
        received = bytearray(nr_bytes)
        view = memoryview(received)
        count = 0
        before = connection.gettimeout()
        try:
            while count < nr_bytes:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError("the PDU did not come in time")
                connection.settimeout(remaining)
                step = connection.recv_into(view[count : count + _LARGEST_CHUNK_BYTES])
                if not step:
                    break
                count += step
        finally:
            view.release()
            # the thread that aborts the association may have closed it
            if connection.fileno() >= 0:
                connection.settimeout(before)
            if count < nr_bytes and self._assoc.requestor.primitive is None:
                # the thread that waits for the A-ASSOCIATE-RQ ends now, not when the time for it is over
                self._assoc.dul.to_user_queue.put(None)
        del received[count:]
        return received

    @property
    def ready(self) -> bool:
        """True when there are bytes to read and room for the message that they belong to."""
        if self._assoc.dimse.msg_queue.qsize() >= _QUEUED_MESSAGES:
            return False
        return bool(super().ready)

    def _largest_pdu(self) -> int:
        # PS3.8 D.1: the maximum length is that of the variable field; senders err by their own headers
        return self.limits.maximum_pdu_bytes + 4096

    def _check_message(self) -> None:
        message = self._assoc.dimse.message
        if message is None:
            return
        data_set = message.data_set
        if data_set is not None and data_set.tell() > self.limits.maximum_object_bytes:
            raise OSError("the data set is too long")
        if message.encoded_command_set.tell() > _ASSOCIATE_BYTES:
            raise OSError("the command set is too long")


class _BoundedRequestHandler(RequestHandler):  # type: ignore[misc]
    server: HardenedServer

    def _create_association(self) -> Any:
        association = super()._create_association()
        # before the association's threads start; a second socket object would announce the connection twice
        bounded = association.dul.socket
        bounded.__class__ = _BoundedSocket
        bounded.limits = limits = self.server.limits
        if self.server.begin is not None:
            reader = MessageReader(
                association,
                self.server.begin,
                pdu_seconds=limits.pdu_seconds,
                maximum_pdu_bytes=limits.maximum_pdu_bytes,
                maximum_object_bytes=limits.maximum_object_bytes,
                budget=self.server.budget,
            )
            stream_stores(association, reader)
        self.server.watch(association, self.request, self.client_address[0])
        return association


class HardenedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """An association server for a hospital network; made by `AE.make_server` with ``server_class``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *arguments: Any,
        limits: ListenerLimits,
        refusals: Refusals,
        budget: BufferBudget,
        tls: ListenerTls | None = None,
        begin: Begin | None = None,
        **keywords: Any,
    ) -> None:
        self.limits = limits
        self.begin = begin
        self.budget = budget
        self._refusals = refusals
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        keywords["request_handler"] = _BoundedRequestHandler
        super().__init__(*arguments, **keywords)

    def service_actions(self) -> None:
        """Between two looks for connections: new certificates, and the sums of refusals."""
        super().service_actions()
        if self._tls is not None:
            self._tls.refresh()
        self._refusals.settle()

    def get_request(self) -> tuple[socket.socket, Any]:
        """A plain accept: nothing here waits for the peer."""
        connection, address = self.socket.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # the library sends without a time-out: a peer that reads nothing would hold its threads for ever
        seconds, microseconds = divmod(int(self.limits.pdu_seconds * 1e6), 1_000_000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, microseconds))
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only known networks; only so many connections that are no associations yet, of one address and of all."""
        host = client_address[0]
        if not allowed(host, self.limits.networks):
            self.refuse(host, "address not among the sources")
            return False
        with self._lock:
            self._connections = {key: entry for key, entry in self._connections.items() if not entry.ended}
            silent = [(entry.host, entry.since, key) for key, entry in self._connections.items() if entry.silent]
            counts = Counter(owner for owner, _since, _key in silent)
            crowd = host if counts[host] >= self.limits.pending_per_address else ""
            if not crowd and len(silent) >= self.limits.pending:
                # the address that has most: a flood must not push out those who came for their first word
                crowd = counts.most_common(1)[0][0]
            oldest = min((entry for entry in silent if entry[0] == crowd), default=None)
            evicted = [] if oldest is None else [self._connections.pop(oldest[2])]
            self._connections[id(request)] = _Connection(time.monotonic(), host, request, None)
        for entry in evicted:
            self.refuse(entry.host, "too many silent connections")
            _hang_up(entry.socket)
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The TLS handshake, then the association, both in the connection's own thread."""
        if self._tls is not None:
            key = id(request)
            secured = None
            try:
                # made before the handshake: who hangs up on a silent connection needs the socket that is in use
                request.settimeout(self.limits.associate_seconds)
                secured = self._tls.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                with self._lock:
                    if (entry := self._connections.pop(key, None)) is None:
                        raise OSError("had to give way")
                    self._connections[id(secured)] = _Connection(entry.since, entry.host, secured, None)
                secured.do_handshake()
                secured.settimeout(None)
            except OSError as error:
                self.refuse(client_address[0], f"TLS: {reason_of(error)}")
                self._forget(key)
                self._forget(id(secured))
                self.shutdown_request(request if secured is None else secured)
                return
            request = secured
        super().process_request_thread(request, client_address)

    def refuse(self, address: str, reason: str) -> None:
        """Tell of a connection that is not taken."""
        self._refusals.tell("connection_refused", address=address, reason=reason)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that could not become an association; the socket server would print a traceback."""
        self._refusals.tell("connection_failed", address=client_address[0], reason="no association came of it")
        self._forget(id(request))

    def watch(self, association: Any, request: Any, host: str) -> None:
        """Tie a connection to its association, so that it counts as silent only until established."""
        with self._lock:
            if (entry := self._connections.get(id(request))) is not None:
                self._connections[id(request)] = _Connection(entry.since, host, request, association)

    def shutdown_unstarted(self) -> None:
        """Give the port back without ever having served."""
        self.server_close()
        self.ae._servers.remove(self)

    def _forget(self, key: int) -> None:
        with self._lock:
            self._connections.pop(key, None)

    def hang_up_all(self) -> None:
        """Close every connection at once; their threads end by themselves."""
        with self._lock:
            entries = list(self._connections.values())
        for entry in entries:
            _hang_up(entry.socket)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it went first
        # of the plain socket, under TLS too: its own shutdown would take the TLS state from the thread that reads
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
