"""An audit repository for tests: syslog over TLS (RFC 5425) with client certificates, and ways to fail."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from tests.audit_schema import check
from tests.fakes import LOOPBACK


@dataclass
class Repository:
    """Takes messages; every one of them is held to the standard.

    Attributes:
        security: its side of TLS.
        reset_after: for each of the first connections, how many messages are read before it is cut, the rest unread.
        port: where it listens; 0: a free port.
        answers_end: False: it closes the connection instead of answering the closure alert.
        received: the text of every message, in order.
    """

    security: ssl.SSLContext
    reset_after: list[int] = field(default_factory=list)
    port: int = 0
    answers_end: bool = True
    received: list[bytes] = field(default_factory=list)
    _listener: socket.socket | None = None
    _thread: threading.Thread | None = None

    def __enter__(self) -> Repository:
        self._listener = socket.create_server((LOOPBACK, self.port))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_reason: object) -> None:
        assert self._listener is not None
        assert self._thread is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _serve(self) -> None:
        assert self._listener is not None
        while True:
            try:
                plain, _address = self._listener.accept()
            except OSError:
                return
            try:
                self._take(plain)
            except (OSError, ValueError):
                plain.close()

    def _take(self, plain: socket.socket) -> None:
        plain.settimeout(60)
        most = self.reset_after.pop(0) if self.reset_after else None
        with self.security.wrap_socket(plain, server_side=True, suppress_ragged_eofs=False) as secured:
            count = 0
            while (message := self._frame(secured)) is not None:
                self.received.append(message)
                count += 1
                if count == most:
                    # SO_LINGER 0: a reset, as of a server that is killed
                    secured.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
            if self.answers_end:
                secured.unwrap()

    @staticmethod
    def _frame(secured: ssl.SSLSocket) -> bytes | None:
        length = b""
        while (digit := secured.recv(1)) != b" ":
            if not digit:
                return None
            length += digit
        message = b""
        while len(message) < int(length):
            message += secured.recv(int(length) - len(message))
        return message

    @property
    def messages(self) -> list[Element]:
        """The XML of every message."""
        return [xml_of(message) for message in self.received]

    def kinds(self) -> list[str]:
        """Event names in order."""
        return [kind_of(message) for message in self.messages]


def xml_of(message: bytes) -> Element:
    """The audit message in a syslog message, which must be one."""
    return check(message.partition(b"\xef\xbb\xbf")[2])


def kind_of(message: Element) -> str:
    """Name of its event."""
    identifier = message.find("EventIdentification/EventID")
    assert identifier is not None
    return identifier.attrib["originalText"]
