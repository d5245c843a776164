"""A lease that is kept alive while its holder works."""

from __future__ import annotations

import threading
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
