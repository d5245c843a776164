"""pynetdicom's listener with its four holes closed (docs/decisions): nobody who is silent, slow or greedy stops others.

* A TLS handshake and the first PDU are waited for in the connection's own thread, with a time-out; see `greeting`.
* A PDU is read within a bounded length and a bounded time; the bound does not wait for negotiation.
* Addresses that connect for nothing are hung up on at once; see `patience`.
* Connections that have not become associations are capped apart from associations; the oldest gives way.
* A message, and the queue of messages, has a bound: the peer waits in TCP.
* A peer that does not read what we answer holds a thread for a bounded time only.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from osteo_daemon.certificates import certificate_of
from osteo_daemon.dicom.admission import Caller, Rejection, allowed
from osteo_daemon.dicom.bounded_socket import BoundedSocket, ListenerLimits, hang_up
from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.data_transfer import Begin, MessageReader, stream_stores
from osteo_daemon.dicom.greeting import NotARequest, read_request, rejection_pdu
from osteo_daemon.dicom.patience import Patience
from osteo_daemon.dicom.refusals import Refusals
from osteo_daemon.dicom.tls import ListenerTls
from osteo_daemon.tls import reason_of

_LAST_WORDS_SECONDS = 1.0
_ANSWER_BYTES = 1 << 16
_COLLECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class _Connection:
    since: float
    host: str
    socket: socket.socket
    association: Any = None  # until its thread is made
    greeting: bytes = b""  # the request, once it is there

    @property
    def silent(self) -> bool:
        return self.association is None or not self.association.is_established

    @property
    def ended(self) -> bool:
        # ident is None before the start
        association = self.association
        return association is not None and association.ident is not None and not association.is_alive()


class _BoundedRequestHandler(RequestHandler):  # type: ignore[misc]
    server: HardenedServer

    def _create_association(self) -> Any:
        association = super()._create_association()
        # before the association's threads start; a second socket object would announce the connection twice
        bounded = association.dul.socket
        bounded.__class__ = BoundedSocket
        bounded.limits = limits = self.server.limits
        bounded.greeting = self.server.watch(association, self.request)
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
        return association


class HardenedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """An association server for a hospital network; made by `AE.make_server` with ``server_class``."""

    daemon_threads = True
    request_queue_size = 1024  # where it is full, a connection waits a second for its next try

    def __init__(
        self,
        *arguments: Any,
        limits: ListenerLimits,
        refusals: Refusals,
        budget: BufferBudget,
        judge: Callable[[Caller], Rejection | None],
        tls: ListenerTls | None = None,
        begin: Begin | None = None,
        **keywords: Any,
    ) -> None:
        self.limits = limits
        self.begin = begin
        self.budget = budget
        self._judge = judge
        self._patience = Patience()
        self._collected = time.monotonic()
        self._refusals = refusals
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        keywords["request_handler"] = _BoundedRequestHandler
        super().__init__(*arguments, **keywords)

    def service_actions(self) -> None:
        """Between two looks for connections: new certificates, the sums of refusals, and what associations left."""
        # the library collects once in sixty calls: under a flood of connections that is most of what this thread does
        if (now := time.monotonic()) - self._collected >= _COLLECT_SECONDS:
            self._collected = now
            gc.collect()
        if self._tls is not None:
            self._tls.refresh()
        self._refusals.settle()

    def get_request(self) -> tuple[socket.socket, Any]:
        """A plain accept: nothing here waits for the peer."""
        connection, address = self.socket.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # the library sends without a time-out: a peer that reads nothing would hold its threads for ever, and the
        # kernel by itself keeps thousands of answers for it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_BYTES)
        seconds, microseconds = divmod(int(self.limits.pdu_seconds * 1e6), 1_000_000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, microseconds))
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only known networks; only so many connections that are no associations yet, of one address and of all."""
        host = client_address[0]
        if not allowed(host, self.limits.networks):
            self.refuse(host, "address not among the sources")
            return False
        if self._patience.is_over(host):
            self.refuse(host, "too many connections for nothing")
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
            self._connections[id(request)] = _Connection(time.monotonic(), host, request)
        for entry in evicted:
            self.refuse(entry.host, "too many silent connections")
            hang_up(entry.socket)
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """TLS handshake, first PDU, association: all in the connection's own thread."""
        connection, host = request, client_address[0]
        try:
            if self._tls is not None:
                connection = self._secure(request, self._tls)
            if (greeting := self._greeted(connection, host)) is not None:
                self._change(connection, connection, greeting=greeting)
                connection.settimeout(None)
                super().process_request_thread(connection, client_address)
                return
        except NotARequest as error:
            self.refuse(host, error.reason)
            _say(connection, error.abort)
        except TimeoutError:
            self.refuse(host, "no association request in time")
        except OSError as error:
            self.refuse(host, f"TLS: {reason_of(error)}" if self._tls is not None else "connection lost")
        self._patience.waste(host)
        self._forget(id(connection))
        self.shutdown_request(connection)

    def _secure(self, request: socket.socket, tls: ListenerTls) -> socket.socket:
        """Raises OSError when the handshake fails."""
        request.settimeout(self.limits.associate_seconds)
        # made before the handshake: who hangs up on a silent connection needs the socket that is in use
        secured = tls.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        self._change(request, secured)
        try:
            secured.do_handshake()
        except OSError:
            self._forget(id(secured))
            self.shutdown_request(secured)
            raise
        return secured

    def _greeted(self, connection: socket.socket, host: str) -> bytes | None:
        """The association request; None when there is none, or its sender was turned away."""
        request = read_request(connection, self.limits.associate_seconds)
        if request is None:
            return None
        caller = Caller(request.called_ae_title, request.calling_ae_title, host, certificate_of(connection))
        if (rejection := self._judge(caller)) is None:
            return request.pdu
        _say(connection, rejection_pdu(rejection))
        return None

    def _change(self, old: socket.socket, new: socket.socket, **changes: Any) -> None:
        with self._lock:
            if (entry := self._connections.pop(id(old), None)) is not None:
                self._connections[id(new)] = replace(entry, socket=new, **changes)

    def refuse(self, address: str, reason: str) -> None:
        """Tell of a connection that is not taken."""
        self._refusals.tell("connection_refused", address=address, reason=reason)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that could not become an association; the socket server would print a traceback."""
        self._refusals.tell("connection_failed", address=client_address[0], reason="no association came of it")
        self._forget(id(request))

    def watch(self, association: Any, connection: socket.socket) -> bytes:
        """Tie a connection to its association, so that it is silent only until established; gives its request."""
        with self._lock:
            entry = self._connections.get(id(connection))
            if entry is None:  # it had to give way meanwhile
                return b""
            self._connections[id(connection)] = replace(entry, association=association, greeting=b"")
        return entry.greeting

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
            hang_up(entry.socket)


def _say(connection: socket.socket, last_words: bytes) -> None:
    """Send a PDU after which it is the peer who closes (PS3.8 9.2.3, Sta13), and give it a little time for that.

    A peer that sees the end of the connection together with the PDU may take it for an abort.
    """
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    with contextlib.suppress(OSError):
        connection.settimeout(_LAST_WORDS_SECONDS)
        connection.sendall(last_words)
        while (remaining := deadline - time.monotonic()) > 0:
            connection.settimeout(remaining)
            if not connection.recv(4096):
                return
