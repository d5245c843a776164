"""Memory for data sets under way: many large ones at a time must not use up the machine's."""

from __future__ import annotations

import threading

from osteo_daemon.dicom.bounded_socket import BeyondLimit


class BufferBudget:
    """Bytes that the buffers of one receiver process may hold together.

    Args:
        maximum_bytes: for all; one data set alone may go beyond it, up to its own limit.
    """

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum = maximum_bytes
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()

    def hold(self, owner: int, size: int) -> None:
        """Let ``owner``'s buffer have ``size`` bytes in place of those it has; 0 gives all back.

        Raises:
            BeyondLimit: others hold the rest; what it has stays counted.
        """
        with self._lock:
            others = sum(self._held.values()) - self._held.get(owner, 0)
            if size > self._held.get(owner, 0) and others and others + size > self._maximum:
                raise BeyondLimit("too many bytes under way at a time")
            if size:
                self._held[owner] = size
            else:
                self._held.pop(owner, None)
