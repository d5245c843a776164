"""Every refusal is told, in the log and to the audit trail: the first of a kind singly, the minute's rest by number.

For connections, associations and requests the trail has a Security Alert; for an object of a known study, a DICOM
Instances Transferred that failed (PS3.15 A.5.3).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import EventType, Outcome
from osteo_daemon.audit.events import AuditPatient, AuditStudy, Peer
from osteo_daemon.audit.message import AuditMessage
from osteo_daemon.dicom.received import STORED_CLASSES
from osteo_daemon.log import get_logger

TOLD_ONE_BY_ONE: Final = 20
"""Lines for one event, address and reason in a minute; further ones are counted."""

LINES_A_MINUTE: Final = 1200
"""Of all kinds together: one who has many addresses must not fill the disk either."""

OBJECT_REFUSED: Final = "object_refused"
REQUEST_DECLINED: Final = "request_declined"
"""Events that are no Node Authentication."""

_MINUTE_SECONDS: Final = 60.0
_KINDS: Final = 1024
_WAITING_ALERTS: Final = 256
_ELSEWHERE: Final = "others"


@dataclass(slots=True)
class _Kind:
    begun: float
    count: int = 0
    told: int = 0


@dataclass(frozen=True, slots=True)
class RefusedObject:
    """What an object is that was not taken, as far as it is known; empty where it is not.

    Attributes:
        status: what its sender heard.
    """

    status: int
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    study_instance_uid: str = ""


@dataclass(frozen=True, slots=True)
class _Alert:
    """What the audit trail is to hear."""

    event: str
    text: str
    peer: Peer
    refused: RefusedObject | None = None


class _Left:
    """To tell what was left for later."""


_Work = _Alert | _Left | None
"""None: no more will come."""


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
        self._alerts: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._left: Counter[tuple[str, str, str]] = Counter()
        self._minute_begun = clock()
        self._minute_lines = 0

    def tell_later(self, event: str, *, address: str, reason: str) -> None:
        """As `tell`, by another thread: this one waits neither for the log's reader nor for the interpreter."""
        key = (event, address, reason)
        with self._lock:
            if key not in self._left and len(self._left) >= _KINDS:
                key = (event, _ELSEWHERE, reason)
            is_first = not self._left
            self._left[key] += 1
        if is_first:
            self._give(_Left())

    def tell(self, event: str, *, address: str, reason: str, **attributes: str) -> None:
        """A line for one refusal, or one more in the sum that `settle` writes."""
        if self._count((event, address, reason), 1):
            self._line(event, address, reason, attributes)

    def tell_object(self, refused: RefusedObject, *, address: str, ae_title: str, reason: str) -> None:
        """As `tell`, of an object; none of its UIDs may hold what cannot be printed."""
        if self._count((OBJECT_REFUSED, address, reason), 1):
            uids = {
                "sop_class_uid": refused.sop_class_uid,
                "sop_instance_uid": refused.sop_instance_uid,
                "study_instance_uid": refused.study_instance_uid,
            }
            known = {name: uid for name, uid in uids.items() if uid}
            attributes = {"ae_title": ae_title, "status": f"0x{refused.status:04X}", **known}
            self._line(OBJECT_REFUSED, address, reason, attributes, refused)

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
                self._alert(_Alert(event, f"{event}: {reason}; {count} more in a minute", Peer("", address)))

    def close(self) -> None:
        """Write all that is left; nothing is told afterwards."""
        self._end_writer()  # it may be telling what was left; the sums come after that
        self._tell_left()
        self.settle(at_once=True)
        self._end_writer()

    def _end_writer(self) -> None:
        with self._lock:
            if self._writer is None and not self._alerts.empty():
                self._start_writer()
            writer = self._writer
        if writer is None:
            return
        self._alerts.put(None)
        writer.join()
        # not before: a second writer would take the word that is meant for the first
        with self._lock:
            self._writer = None

    def _count(self, key: tuple[str, str, str], count: int) -> int:
        """How many of so many new ones get a line of their own."""
        with self._lock:
            if key not in self._kinds and len(self._kinds) >= _KINDS:
                # from so many addresses at once: they share one sum
                key = (key[0], _ELSEWHERE, key[2])
            now = self._clock()
            kind = self._kinds.setdefault(key, _Kind(now))
            kind.count += count
            if now - self._minute_begun >= _MINUTE_SECONDS:
                self._minute_begun, self._minute_lines = now, 0
            # what there is no room to tell singly stands in the sum
            room = min(TOLD_ONE_BY_ONE - kind.told, LINES_A_MINUTE - self._minute_lines)
            told = min(count, room) if self._alerts.qsize() < _WAITING_ALERTS else 0
            kind.told += told
            self._minute_lines += told
        return told

    def _line(
        self, event: str, address: str, reason: str, attributes: dict[str, str], refused: RefusedObject | None = None
    ) -> None:
        get_logger().warning(event, address=address, reason=reason, **attributes)
        peer = Peer(attributes.get("ae_title", ""), address)
        self._alert(_Alert(event, f"{event}: {reason}", peer, refused))

    def _alert(self, alert: _Alert) -> None:
        if trail.is_open():
            self._give(alert)

    def _give(self, work: _Work) -> None:
        with self._lock:
            if self._writer is None:
                self._start_writer()
        self._alerts.put(work)

    def _start_writer(self) -> None:
        self._writer = threading.Thread(target=self._write, name="refusals", daemon=True)
        self._writer.start()

    def _tell_left(self) -> None:
        with self._lock:
            left, self._left = self._left, Counter()
        for key, count in left.items():
            for _ in range(self._count(key, count)):
                self._line(*key, {})

    def _write(self) -> None:
        while (work := self._alerts.get()) is not None:
            if isinstance(work, _Left):
                self._tell_left()
            else:
                trail.record(_audit_message(work))


def _audit_message(alert: _Alert) -> AuditMessage:
    refused = alert.refused
    if refused is None or not refused.study_instance_uid:  # the other message needs a study
        of_association = alert.event not in (OBJECT_REFUSED, REQUEST_DECLINED)
        kind = EventType.NODE_AUTHENTICATION if of_association else EventType.USE_OF_RESTRICTED_FUNCTION
        return events.security_alert(kind, alert.text, performing=alert.peer, outcome=Outcome.MINOR_FAILURE)
    classes = {refused.sop_class_uid: 1} if refused.sop_class_uid in STORED_CLASSES else {}
    return events.instances_transferred(
        [AuditStudy(refused.study_instance_uid, classes)],
        AuditPatient(),  # whose it is stands in what was not taken
        alert.peer,
        trail.node(),
        received=True,
        outcome=Outcome.MINOR_FAILURE,
        reason=alert.text,
    )
