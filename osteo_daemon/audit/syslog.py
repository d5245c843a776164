"""Syslog: how a message is written (RFC 5424), framed for TLS (RFC 5425) and sent, over TLS or UDP (RFC 5426).

Syslog has no acknowledgement. Over TLS each batch ends with a closure alert, which the receiver answers once it has
read all before it (RFC 5425 4.4), or closes: a receiver that closes with bytes unread resets the connection. Either
answer is taken as proof that the batch arrived; without one it is sent again.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from osteo_daemon.domain.study import PeerTls
from osteo_daemon.errors import PeerUnavailable
from osteo_daemon.tls import client_context, reason_of

MESSAGE_ID: Final = "DICOM+RFC3881"
"""MSGID of audit messages of this schema (PS3.15 A.6.2)."""

_SECURITY: Final = 10  # facility: security and authorization messages
_SEVERITIES: Final = {"0": 5, "4": 4, "8": 3, "12": 2}  # by EventOutcomeIndicator: notice, warning, error, critical
_NOT_PRINTABLE: Final = re.compile(r"[^\x21-\x7e]")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class Transport(Protocol):
    """A way to an audit repository."""

    def send(self, messages: Sequence[bytes]) -> None:
        """Send messages in order.

        Raises:
            PeerUnavailable: not known to have arrived.
        """


def syslog_message(xml: bytes, outcome: str, application: str, at: datetime) -> bytes:
    """An audit message as the text of a syslog message."""
    priority = _SECURITY * 8 + _SEVERITIES[outcome]
    header = " ".join(
        (
            f"<{priority}>1",
            at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            _field(socket.gethostname(), 255),
            _field(application, 48),
            str(os.getpid()),
            MESSAGE_ID,
            "-",
        )
    )
    return header.encode("ascii") + b" " + _BYTE_ORDER_MARK + xml


def framed(message: bytes) -> bytes:
    """Octet counting (RFC 5425 4.3)."""
    return b"%d %s" % (len(message), message)


class TlsTransport:
    """A connection for each batch.

    Args:
        host, port: of the repository.
        tls: how it is known, and how we show ourselves.
        timeout_seconds: for connecting and for each step.
    """

    def __init__(self, host: str, port: int, tls: PeerTls, timeout_seconds: float) -> None:
        self._address = (host, port)
        self._tls = tls
        self._timeout_seconds = timeout_seconds

    def send(self, messages: Sequence[bytes]) -> None:
        """Send a batch and wait for the answer to its end.

        Raises:
            PeerUnavailable: no connection, no handshake, or no answer to the end.
            ConfigurationError: our own files cannot be used.
        """
        context = client_context(self._tls)
        try:
            with (
                socket.create_connection(self._address, self._timeout_seconds) as plain,
                context.wrap_socket(plain, server_hostname=self._tls.server_name or self._address[0]) as secured,
            ):
                for message in messages:
                    secured.sendall(framed(message))
                _await_end(secured)
        except OSError as error:
            raise PeerUnavailable(f"the audit repository: {reason_of(error, over_tls=True)}") from error


class UdpTransport:
    """Datagrams: nobody learns of one that was lost."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)

    def send(self, messages: Sequence[bytes]) -> None:
        """Send each message as a datagram.

        Raises:
            PeerUnavailable: the host is not known, or this machine says that nobody listens there.
        """
        try:
            family, kind, protocol, _name, address = socket.getaddrinfo(*self._address, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as sender:
                sender.connect(address)
                for message in messages:
                    sender.send(message)
        except OSError as error:
            raise PeerUnavailable(f"the audit repository: {error.strerror}") from error


def _await_end(secured: ssl.SSLSocket) -> None:
    try:
        secured.unwrap()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return  # closed without an alert, and not reset: everything was read
    except ssl.SSLError as error:
        if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
            raise


def _field(text: str, most: int) -> str:
    return _NOT_PRINTABLE.sub("_", text)[:most] or "-"
