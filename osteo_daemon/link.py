"""Messages between the screener and its worker: one JSON document a line over a pair of sockets."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

SEND_SECONDS = 10.0
"""A peer that takes nothing for so long counts as gone: it is stopped or hangs, and would hang the sender too."""

_BLOCK_BYTES = 1 << 16


class Link:
    """One end of the pair. Any thread may send; one receives."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._socket.settimeout(SEND_SECONDS)
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message.

        Raises:
            EOFError: the other side is gone or takes nothing.
        """
        line = json.dumps(message, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError as error:
            raise EOFError from error

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None when none came in time. Without a limit it waits for ever.

        Raises:
            EOFError: the other side is gone.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (end := self._buffer.find(b"\n")) < 0:
            remaining = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._socket], [], [], remaining)[0]:
                return None
            try:
                block = self._socket.recv(_BLOCK_BYTES)
            except OSError as error:
                raise EOFError from error
            if not block:
                raise EOFError
            self._buffer += block
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close this end: the other side sees `EOFError`."""
        self._socket.close()
