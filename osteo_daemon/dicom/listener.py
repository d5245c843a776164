"""pynetdicom's listener with its four holes closed (docs/decisions): nobody who is silent, slow or greedy stops others.

* A TLS handshake runs in the connection's own thread, with a time-out, never in the accept loop.
* A PDU is read within a bounded length and a bounded time; the bound does not wait for negotiation.
* Connections that have not become associations are capped apart from associations; the oldest gives way.
* A message, and the queue of messages, has a bound: the peer waits in TCP.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from osteo_daemon.log import get_logger

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LARGEST_CHUNK_BYTES = 1 << 20
_ASSOCIATE_BYTES = 1 << 20  # 128 contexts with every syntax and negotiation item stay far below
_QUEUED_MESSAGES = 2


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """Bounds of one listener.

    Attributes:
        networks: who may connect at all; nobody when empty.
        pending_per_address: connections of one address that are not yet associations.
        associate_seconds: from connection to A-ASSOCIATE-RQ, TLS handshake included.
        pdu_seconds: for one PDU, once its first byte is there.
        maximum_pdu_bytes: as offered in negotiation.
        maximum_object_bytes: of one message's data set.
    """

    networks: tuple[Network, ...]
    associate_seconds: float
    pdu_seconds: float
    maximum_pdu_bytes: int
    maximum_object_bytes: int = 2 << 30
    pending_per_address: int = 64


@dataclass(frozen=True, slots=True)
class _Connection:
    since: float
    host: str
    socket: socket.socket
    association: Any  # None until its thread is made

    @property
    def established(self) -> bool:
        return self.association is not None and bool(self.association.is_established)

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
        bounded.limits = self.server.limits
        self.server.watch(association, self.request, self.client_address[0])
        return association


class HardenedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """An association server for a hospital network; made by `AE.make_server` with ``server_class``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any, limits: ListenerLimits, **keywords: Any) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        keywords["request_handler"] = _BoundedRequestHandler
        super().__init__(*arguments, **keywords)

    def get_request(self) -> tuple[socket.socket, Any]:
        """A plain accept: nothing here waits for the peer."""
        connection, address = self.socket.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only known networks; of one address only so many connections that are no associations yet."""
        host = client_address[0]
        if not allowed(host, self.limits.networks):
            get_logger().warning("connection_refused", address=host, reason="address not among the sources")
            return False
        with self._lock:
            self._connections = {key: entry for key, entry in self._connections.items() if not entry.ended}
            silent = sorted(
                (entry.since, key)
                for key, entry in self._connections.items()
                if entry.host == host and not entry.established
            )
            excess = max(len(silent) + 1 - self.limits.pending_per_address, 0)
            evicted = [self._connections.pop(key) for _since, key in silent[:excess]]
            self._connections[id(request)] = _Connection(time.monotonic(), host, request, None)
        for entry in evicted:
            get_logger().warning("connection_refused", address=host, reason="too many silent connections")
            _hang_up(entry.socket)
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The TLS handshake, then the association, both in the connection's own thread."""
        if self.ssl_context is not None:
            request.settimeout(self.limits.associate_seconds)
            key = id(request)
            try:
                secured = self.ssl_context.wrap_socket(request, server_side=True)
            except (OSError, ssl.SSLError) as error:
                get_logger().warning("connection_refused", address=client_address[0], reason=type(error).__name__)
                self._forget(key)
                self.shutdown_request(request)
                return
            with self._lock:
                if (entry := self._connections.pop(key, None)) is not None:
                    self._connections[id(secured)] = _Connection(entry.since, entry.host, secured, None)
            secured.settimeout(None)
            request = secured
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that could not become an association; the socket server would print a traceback."""
        get_logger().warning("connection_failed", address=client_address[0])
        self._forget(id(request))

    def watch(self, association: Any, request: Any, host: str) -> None:
        """Tie a connection to its association, so that it counts as silent only until established."""
        with self._lock:
            if (entry := self._connections.get(id(request))) is not None:
                self._connections[id(request)] = _Connection(entry.since, host, request, association)

    def _forget(self, key: int) -> None:
        with self._lock:
            self._connections.pop(key, None)

    def hang_up_all(self) -> None:
        """Close every connection at once; their threads end by themselves."""
        with self._lock:
            entries = list(self._connections.values())
        for entry in entries:
            _hang_up(entry.socket)

    @property
    def established(self) -> int:
        """Associations that are open."""
        with self._lock:
            return sum(entry.established for entry in self._connections.values())


def allowed(host: str, networks: tuple[Network, ...]) -> bool:
    """True when ``host`` lies in one of ``networks``; an IPv4 address mapped into IPv6 counts as itself."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def networks_of(host: str) -> tuple[Network, ...]:
    """The addresses that a host name has now; none, and a log line, when it has none."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        get_logger().warning("host_unknown", host=host)
        return ()
    return tuple(ipaddress.ip_network(address) for address in sorted(found))


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it went first
        connection.shutdown(socket.SHUT_RDWR)
