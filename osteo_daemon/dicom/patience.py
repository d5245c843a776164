"""Addresses that connect for nothing, again and again: after a while they are hung up on before anything is done.

A connection that becomes an association costs nothing here, however many there are: a sender with one association for
each image is never taken for a flood.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

BURST: Final = 100
"""Connections for nothing that an address may make at once."""

PER_SECOND: Final = 10.0
"""How many of them are forgotten in a second: what checks whether the port is open stays far below."""

_ADDRESSES: Final = 1024


class Patience:
    """A leaking bucket for each address.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._wasted: dict[str, tuple[float, float]] = {}

    def waste(self, address: str) -> None:
        """A connection of this address came to nothing."""
        now = self._clock()
        with self._lock:
            if len(self._wasted) >= _ADDRESSES:
                self._wasted = {key: kept for key, kept in self._wasted.items() if _level(kept, now)}
            self._wasted[address] = (_level(self._wasted.get(address), now) + 1, now)

    def is_over(self, address: str) -> bool:
        """True when the next connection of this address is not worth a look."""
        return _level(self._wasted.get(address), self._clock()) >= BURST


def _level(kept: tuple[float, float] | None, now: float) -> float:
    return 0.0 if kept is None else max(kept[0] - (now - kept[1]) * PER_SECOND, 0.0)
