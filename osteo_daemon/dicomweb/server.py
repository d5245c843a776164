"""The HTTP server below the service: uvicorn with bounds that it has not by itself, and TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from osteo_daemon.certificates import certificate_from_der
from osteo_daemon.errors import ConfigurationError

_HEADER_BYTES: Final = 16384
_KEEP_ALIVE_SECONDS: Final = 5
_BACKLOG: Final = 64
_GRACE_SECONDS: Final = 10
_CONNECTIONS_PER_REQUEST: Final = 8


def _nothing() -> None:
    """Nobody wants to know."""


class HttpServer:
    """Serves one application on one port.

    Args:
        application: ASGI.
        address: to listen on.
        port: 0 takes a free one, see `port`.
        idle_seconds: from connection to the end of the request's header; for the TLS handshake as well.
        maximum_requests: at once; connections are bounded by a multiple.
        context: for TLS.
        certificates: clients must show one of these; empty: any that the context accepts.
        refused: told the address and the reason when a connection is closed before its first request.
        section: of the settings, for its error.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        application: Callable[..., Any],
        address: str,
        port: int,
        *,
        idle_seconds: float,
        maximum_requests: int,
        context: ssl.SSLContext | None = None,
        certificates: frozenset[str] = frozenset(),
        refused: Callable[[str, str], None],
        section: str = "dicomweb",
    ) -> None:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._socket = socket.create_server((address, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigurationError(
                f"{section}: cannot listen on {address} port {port}: {error.strerror}; {section}.port sets another"
            ) from error

        class Bounded(_BoundedProtocol):
            header_seconds = idle_seconds
            known = certificates

            def tell(self, reason: str) -> None:
                refused(self.client[0] if self.client else "", reason)

        configuration = uvicorn.Config(
            application,
            http=Bounded,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=maximum_requests * _CONNECTIONS_PER_REQUEST,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
        configuration.load()
        configuration.ssl = context
        self._server = _Server(configuration)

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._socket.getsockname()[1])

    def run(self, ready: Callable[[], None] = _nothing, alive: Callable[[], None] = _nothing) -> None:
        """Serve until `stop`.

        Args:
            ready: called when requests are answered.
            alive: called by the loop that answers them, several times a second.
        """
        self._server.ready, self._server.alive = ready, alive
        asyncio.run(self._server.serve([self._socket]))

    def stop(self) -> None:
        """Finish what is under way, within seconds, and end; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    ready: Callable[[], None]
    alive: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        self.alive()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the role's: the library would raise them again after a clean end."""
        yield


class _BoundedProtocol(H11Protocol):
    """A connection that sends no request in time, or shows a certificate of somebody else, is closed."""

    header_seconds: float
    known: frozenset[str]

    def tell(self, reason: str) -> None:
        """Why this connection is closed."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.known and not self._is_known(transport):
            self.tell("a certificate that is not listed")
            transport.abort()
            return
        # the library waits for ever for the first byte and for the end of a header
        self.loop.call_later(self.header_seconds, self._close_silent)

    def _is_known(self, transport: asyncio.Transport) -> bool:
        connection = transport.get_extra_info("ssl_object")
        encoded = None if connection is None else connection.getpeercert(binary_form=True)
        return encoded is not None and certificate_from_der(encoded).is_one_of(self.known)

    def _close_silent(self) -> None:
        request: object = self.cycle
        if request is None and not self.transport.is_closing():
            self.tell("no request in time")
            self.transport.abort()
