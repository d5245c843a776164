"""A lease that is kept alive while its holder works, and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from osteo_daemon.errors import LeaseLost, Transient

HEARTBEATS_PER_LEASE = 3
"""Two heartbeats may fail before a lease runs out."""


class Heartbeat:
    """Renews a lease from a thread of its own for the length of a ``with`` block.

    Args:
        renew: renews the lease; `LeaseLost` ends the heartbeat (the fencing token refuses whatever the holder still
            writes), `Transient` is tried again at the next beat.
        lease_seconds: how long the lease lasts without renewal.
    """

    def __init__(self, renew: Callable[[], None], lease_seconds: float) -> None:
        self._renew = renew
        self._every_seconds = lease_seconds / HEARTBEATS_PER_LEASE
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(self._every_seconds):
            try:
                self._renew()
            except LeaseLost:
                return
            except Transient:
                continue


class LeaseWatch:
    """For a holder that watches over the work of another process: when to beat, and when the work has had its time.

    Args:
        lease_seconds: how long the lease lasts without renewal.
        wall_clock_seconds: how long the work may take.
        grace_seconds: how long it may go on once ``stopping`` is set.
        stopping: the node stops.
    """

    def __init__(
        self, lease_seconds: float, wall_clock_seconds: float, grace_seconds: float, stopping: threading.Event
    ) -> None:
        now = time.monotonic()
        self._every_seconds = lease_seconds / HEARTBEATS_PER_LEASE
        self._next_beat = now + self._every_seconds
        self._end = now + wall_clock_seconds
        self._grace_seconds = grace_seconds
        self._stopping = stopping
        self._stop_noticed: float | None = None

    def beat_due(self) -> bool:
        """True once for each beat; beats that were missed are not made up for."""
        now = time.monotonic()
        if now < self._next_beat:
            return False
        self._next_beat = now + self._every_seconds
        return True

    def over(self) -> bool:
        """The work has had its time."""
        return time.monotonic() >= self._end

    def grace_over(self) -> bool:
        """The node stops and will not wait any longer."""
        if not self._stopping.is_set():
            return False
        now = time.monotonic()
        self._stop_noticed = self._stop_noticed or now
        return now >= self._stop_noticed + self._grace_seconds
