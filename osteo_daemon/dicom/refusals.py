"""Every refusal is told, and none can flood the log: the first of a kind singly, the minute's rest by number."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import EventType, Outcome
from osteo_daemon.audit.events import Peer
from osteo_daemon.log import get_logger

TOLD_ONE_BY_ONE: Final = 20
"""Lines for one event, address and reason in a minute; further ones are counted."""

_MINUTE_SECONDS: Final = 60.0
_KINDS: Final = 1024
_WAITING_ALERTS: Final = 256
_ELSEWHERE: Final = "others"


@dataclass(slots=True)
class _Kind:
    begun: float
    count: int = 0
    told: int = 0


class Refusals:
    """The log of one listener's refusals.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str, str], _Kind] = {}
        # an audit message is on disk before its writer goes on: never the thread that accepts connections
        self._alerts: queue.SimpleQueue[tuple[str, Peer] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None

    def tell(self, event: str, *, address: str, reason: str, **attributes: str) -> None:
        """A line for one refusal, or one more in the sum that `settle` writes."""
        key = (event, address, reason)
        with self._lock:
            if key not in self._kinds and len(self._kinds) >= _KINDS:
                # from so many addresses at once: they share one sum
                key = (event, _ELSEWHERE, reason)
            kind = self._kinds.setdefault(key, _Kind(self._clock()))
            kind.count += 1
            # what there is no room to tell singly stands in the sum
            told = kind.told < TOLD_ONE_BY_ONE and self._alerts.qsize() < _WAITING_ALERTS
            kind.told += told
        if told:
            get_logger().warning(event, address=address, reason=reason, **attributes)
            self._alert(f"{event}: {reason}", Peer(attributes.get("ae_title", ""), address))

    def settle(self, *, at_once: bool = False) -> None:
        """Write the sums of the minutes that are over; ``at_once``: of all."""
        if not self._kinds:
            return
        now = self._clock()
        with self._lock:
            over = [key for key, kind in self._kinds.items() if at_once or now - kind.begun >= _MINUTE_SECONDS]
            ended = [(key, self._kinds.pop(key)) for key in over]
        for (event, address, reason), kind in ended:
            if (count := kind.count - kind.told) > 0:
                get_logger().warning(
                    "refusals_repeated",
                    kind=event,
                    address=address,
                    reason=reason,
                    count=count,
                    duration_s=_MINUTE_SECONDS,
                )
                self._alert(f"{event}: {reason}; {count} more in a minute", Peer("", address))

    def close(self) -> None:
        """Write all that is left; nothing is told afterwards."""
        self.settle(at_once=True)
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            self._alerts.put(None)
            writer.join()

    def _alert(self, text: str, peer: Peer) -> None:
        if not trail.is_open():
            return
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="refusals", daemon=True)
                self._writer.start()
        self._alerts.put((text, peer))

    def _write(self) -> None:
        kind = EventType.NODE_AUTHENTICATION
        while (alert := self._alerts.get()) is not None:
            text, peer = alert
            trail.record(events.security_alert(kind, text, performing=peer, outcome=Outcome.MINOR_FAILURE))
