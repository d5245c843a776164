"""pynetdicom's listener with its four holes closed (docs/decisions): nobody who is silent, slow or greedy stops others.

* One thread takes all connections and does nothing else; before its first byte none has another; see `doorway`.
* A TLS handshake and the first PDU are waited for in the connection's own thread, with a time-out; see `greeting`.
* A PDU is read within a bounded length and a bounded time; the bound does not wait for negotiation.
* Addresses that connect for nothing are hung up on at once; see `patience`.
* Connections that have not become associations are capped apart from associations; the oldest gives way: `visitors`.
* A message, and the queue of messages, has a bound: the peer waits in TCP.
* A peer that does not read what we answer holds a thread for a bounded time only.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pynetdicom.transport import AssociationServer, RequestHandler

from osteo_daemon.certificates import certificate_of
from osteo_daemon.dicom.admission import Caller, Rejection, allowed
from osteo_daemon.dicom.bounded_socket import BoundedSocket, ListenerLimits, hang_up
from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.data_transfer import Begin, MessageReader
from osteo_daemon.dicom.doorway import Doorway, Turns
from osteo_daemon.dicom.greeting import NotARequest, read_request, rejection_pdu
from osteo_daemon.dicom.patience import Patience
from osteo_daemon.dicom.received import printable
from osteo_daemon.dicom.refusals import Refusals
from osteo_daemon.dicom.streaming import stream_stores
from osteo_daemon.dicom.tls import ListenerTls
from osteo_daemon.dicom.visitors import Visitor, Visitors
from osteo_daemon.tls import reason_of

_LAST_WORDS_SECONDS = 1.0
_ANSWER_BYTES = 1 << 16
_COLLECT_SECONDS = 3.0
_SERVICE_SECONDS = 0.25
_KNOWN_ADDRESSES = 4096
_USHERS = 4


class _BoundedRequestHandler(RequestHandler):  # type: ignore[misc]
    server: HardenedServer

    def __init__(self, visitor: Visitor, greeting: bytes, server: HardenedServer) -> None:
        self._visitor = visitor
        self._greeting = greeting
        super().__init__(visitor.socket, visitor.address, server)

    def _create_association(self) -> Any:
        association = super()._create_association()
        # before the association's threads start; a second socket object would announce the connection twice
        bounded = association.dul.socket
        bounded.__class__ = BoundedSocket
        bounded.limits = limits = self.server.limits
        bounded.greeting = self._greeting
        bounded.refuse = lambda reason: self.server.cut_off(association, reason)
        self._visitor.association = association
        if self.server.begin is not None:
            reader = MessageReader(
                association,
                self.server.begin,
                pdu_seconds=limits.pdu_seconds,
                maximum_pdu_bytes=limits.maximum_pdu_bytes,
                maximum_object_bytes=limits.maximum_object_bytes,
                budget=self.server.budget,
                refuse=bounded.refuse,
            )
            stream_stores(association, reader)
        return association


class HardenedServer(AssociationServer):  # type: ignore[misc]
    """An association server for a hospital network; made by `AE.make_server` with ``server_class``."""

    request_queue_size = 4096  # where it is full, a connection waits a second for its next try

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
        self._collected = self.came_round_at = time.monotonic()
        self._refusals = refusals
        self._tls = tls
        self._visitors = Visitors(limits.pending_per_address, limits.pending)
        self._turns = Turns()
        self._known = lru_cache(_KNOWN_ADDRESSES)(lambda host: allowed(host, limits.networks))
        self._ending = threading.Event()
        self._ended = threading.Event()
        super().__init__(*arguments, **keywords)
        self._doorway = Doorway(self.socket, self._visitors, self, limits.associate_seconds)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Take connections until `shutdown`, which is looked for so often, in seconds."""
        works = (*[self._usher] * _USHERS, self._keep)
        others = [threading.Thread(target=work, name="listener", daemon=True) for work in works]
        for thread in others:
            thread.start()
        try:
            while not self._ending.is_set():
                self._doorway.turn(poll_interval)
                self.came_round_at = time.monotonic()
        finally:
            self._doorway.close()
            self._turns.close()
            for thread in others:
                thread.join()
            self._ended.set()

    def shutdown(self) -> None:
        """End `serve_forever` and give the port back; associations go on."""
        self._ending.set()
        self._ended.wait()
        self.shutdown_unstarted()

    def _keep(self) -> None:
        while not self._ending.wait(_SERVICE_SECONDS):
            self.service_actions()

    def service_actions(self) -> None:
        """Now and then, beside the taking of connections: new certificates, the sums of refusals, dead associations."""
        # in place of the library's count of calls
        if (now := time.monotonic()) - self._collected >= _COLLECT_SECONDS:
            self._collected = now
            gc.collect()
        if self._tls is not None:
            self._tls.refresh()
        self._refusals.settle()

    def objection(self, address: str) -> str:
        """Why nobody may come from there now; empty when there is no reason."""
        if not self._known(address):
            return "address not among the sources"
        return "too many connections for nothing" if self._patience.is_over(address) else ""

    def spoke(self, visitor: Visitor) -> None:
        """It gets a thread as soon as it is its turn."""
        self._turns.put(visitor)

    def went(self, visitor: Visitor, reason: str) -> None:
        """It came for nothing."""
        self._patience.waste(visitor.host)
        if reason:
            self.refuse_later(visitor.host, reason)

    def refuse_later(self, address: str, reason: str) -> None:
        """Tell of a connection that is not taken, without waiting for the log."""
        self._refusals.tell_later("connection_refused", address=address, reason=reason)

    def cut_off(self, association: Any, reason: str) -> None:
        """Tell of an association that ends by what its peer sent, or did not."""
        title, address = association.requestor.ae_title, association.requestor.address
        self._refusals.tell(
            "association_cut_off", address=address, reason=reason, ae_title=printable((title or "").strip())
        )

    def _usher(self) -> None:
        # the start of a thread waits for that thread: who takes connections never does, and several wait at once
        while (visitor := self._turns.take()) is not None:
            if self._ending.is_set():
                self._dismiss(visitor)
                continue
            try:
                threading.Thread(target=self._attend, args=(visitor,), name="visitor", daemon=True).start()
            except RuntimeError:
                self._refuse(visitor.host, "no thread is left")
                self._dismiss(visitor)

    def _attend(self, visitor: Visitor) -> None:
        """TLS handshake, first PDU, association: all in the connection's own thread."""
        try:
            self._prepare(visitor.socket)
            if self._tls is not None:
                self._secure(visitor, self._tls)
            if (greeting := self._greeted(visitor)) is not None:
                visitor.socket.settimeout(None)
                self._associate(visitor, greeting)
                return
        except NotARequest as error:
            self._refuse(visitor.host, error.reason)
            self._say(visitor, error.abort)
        except TimeoutError:
            self._refuse(visitor.host, "no association request in time")
            self._dismiss(visitor)
        except OSError as error:
            self._refuse(visitor.host, f"TLS: {reason_of(error)}" if self._tls is not None else "connection lost")
            self._dismiss(visitor)
        self._patience.waste(visitor.host)

    def _prepare(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # the library sends without a time-out: a peer that reads nothing would hold its threads for ever, and the
        # kernel by itself keeps thousands of answers for it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_BYTES)
        seconds, microseconds = divmod(int(self.limits.pdu_seconds * 1e6), 1_000_000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, microseconds))

    def _secure(self, visitor: Visitor, tls: ListenerTls) -> None:
        """Raises OSError when the handshake fails."""
        # made before the handshake: who hangs up on a silent connection needs the socket that is in use
        visitor.socket = tls.context.wrap_socket(visitor.socket, server_side=True, do_handshake_on_connect=False)
        visitor.socket.settimeout(self._remaining(visitor))
        visitor.socket.do_handshake()

    def _greeted(self, visitor: Visitor) -> bytes | None:
        """The association request; None when there is none, or its sender was turned away."""
        request = read_request(visitor.socket, self._remaining(visitor))
        if request is None:
            self._dismiss(visitor)
            return None
        certificate = certificate_of(visitor.socket)
        caller = Caller(request.called_ae_title, request.calling_ae_title, visitor.host, certificate)
        if (rejection := self._judge(caller)) is None:
            return request.pdu
        self._say(visitor, rejection_pdu(rejection))
        return None

    def _remaining(self, visitor: Visitor) -> float:
        """Raises TimeoutError when it took too long already."""
        remaining = visitor.since + self.limits.associate_seconds - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def _associate(self, visitor: Visitor, greeting: bytes) -> None:
        if not self._visitors.is_present(visitor):  # it had to give way meanwhile
            self._dismiss(visitor)
            return
        try:
            _BoundedRequestHandler(visitor, greeting, self)
        except Exception as error:  # noqa: BLE001
            # the edge of this thread: the library raises what it likes
            detail = type(error).__name__
            reason = f"no association came of it ({detail})"
            self._refusals.tell("connection_failed", address=visitor.host, reason=reason)
            self._dismiss(visitor)

    def _say(self, visitor: Visitor, last_words: bytes) -> None:
        """Send a PDU after which it is the peer who closes (PS3.8 9.2.3, Sta13): no thread waits for that.

        A peer that sees the end of the connection together with the PDU may take it for an abort.
        """
        try:
            visitor.socket.settimeout(_LAST_WORDS_SECONDS)
            visitor.socket.sendall(last_words)
        except OSError:
            self._dismiss(visitor)
        else:
            visitor.socket.setblocking(False)
            self._doorway.see_off(visitor)

    def _refuse(self, address: str, reason: str) -> None:
        self._refusals.tell("connection_refused", address=address, reason=reason)

    def _dismiss(self, visitor: Visitor) -> None:
        self._visitors.leave(visitor)
        hang_up(visitor.socket)
        visitor.socket.close()

    def shutdown_unstarted(self) -> None:
        """Give the port back without ever having served."""
        self.server_close()
        self.ae._servers.remove(self)

    def hang_up_all(self) -> None:
        """Close every connection at once; their threads end by themselves. After `shutdown`."""
        self._doorway.close()  # for those who were turned away meanwhile
        for visitor in self._visitors.all():
            hang_up(visitor.socket)
