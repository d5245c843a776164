"""Where connections come in: one thread takes them all, and none of them costs another thread before its first byte.

Who is not wanted is hung up on at once. Who is silent is waited for here; so is the end of those who were turned away:
after a rejection or an abort it is the peer who closes (PS3.8 9.2.3, Sta13, with ARTIM). Nothing here gives up the
interpreter's lock for a connection: see `prompt_calls`.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from typing import Final, Protocol

from osteo_daemon.dicom import prompt_calls
from osteo_daemon.dicom.bounded_socket import hang_up
from osteo_daemon.dicom.visitors import Visitor, Visitors

_AT_ONCE: Final = 256
"""Connections that are taken before those are looked at that have spoken meanwhile."""

_LOOK_SECONDS: Final = 0.1
"""How often times that are over are looked for."""

_PAUSE_SECONDS: Final = 0.1
"""Before the next try where the machine has no descriptor left."""

_LAST_BYTES: Final = 1 << 16
"""What a peer that was turned away may still have under way."""


class Host(Protocol):
    """Who listens at a doorway; none of these may wait."""

    def objection(self, address: str) -> str:
        """Why nobody may come from there now; empty when there is no reason."""

    def spoke(self, visitor: Visitor) -> None:
        """Its first byte is there; it is no longer waited for here."""

    def went(self, visitor: Visitor, reason: str) -> None:
        """It is gone without having become anything; why, empty when it closed by itself."""

    def refuse_later(self, address: str, reason: str) -> None:
        """Tell of a connection that is not taken."""


class Doorway:
    """One listening socket.

    Args:
        listening: bound, and listening.
        visitors: where all connections are counted.
        seconds: from a connection to its first byte, and from a rejection to its end.
    """

    def __init__(self, listening: socket.socket, visitors: Visitors, host: Host, seconds: float) -> None:
        listening.setblocking(False)
        self._listening = listening.fileno()
        self._family = listening.family
        self._visitors = visitors
        self._host = host
        self._seconds = seconds
        self._poller = select.poll()
        self._poller.register(self._listening, select.POLLIN)
        self._waiting: dict[int, Visitor] = {}
        self._returned: queue.SimpleQueue[Visitor] = queue.SimpleQueue()
        self._looked = 0.0
        self._paused_until = 0.0
        self._closed = False

    def turn(self, seconds: float) -> None:
        """Wait so long for something to happen, and do what is to be done then."""
        newcomers = False
        for descriptor, _events in self._poller.poll(seconds * 1000):
            if descriptor == self._listening:
                newcomers = True
            elif (visitor := self._waiting.get(descriptor)) is not None:
                self._look_at(descriptor, visitor)
        while not self._returned.empty():
            self._wait_for(self._returned.get())
        if newcomers:
            self._take()
        if (now := time.monotonic()) - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look_at_clock(now)

    def see_off(self, visitor: Visitor) -> None:
        """Wait for the end of a connection to which nothing more is said; from the thread that had it."""
        visitor.parting_since = time.monotonic()
        if self._closed:
            self._visitors.leave(visitor)
            visitor.socket.close()
        else:
            self._returned.put(visitor)

    def close(self) -> None:
        """Hang up on all who wait here; from the thread that took turns, or once that has ended."""
        self._closed = True
        while not self._returned.empty():
            self._wait_for(self._returned.get())
        for descriptor, visitor in list(self._waiting.items()):
            self._end(descriptor, visitor)

    def _take(self) -> None:
        arrived = []
        now = time.monotonic()
        for _ in range(_AT_ONCE):
            try:
                found = prompt_calls.accept(self._listening)
            except OSError:
                self._host.refuse_later("", "out of file descriptors or memory")
                self._poller.unregister(self._listening)  # or it would be ready again at once
                self._paused_until = now + _PAUSE_SECONDS
                break
            if found is None:
                break
            descriptor, address = found
            if reason := self._host.objection(address[0]):
                prompt_calls.close_descriptor(descriptor)
                self._host.refuse_later(address[0], reason)
                continue
            # the type says that it does not block: Python asks the kernel nothing then
            connection = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, descriptor)
            arrived.append(Visitor(address, now, connection))
        evicted = self._visitors.admit(arrived)
        for visitor in arrived:
            self._wait_for(visitor)
        for visitor in evicted:
            if not visitor.parting_since:
                self._host.refuse_later(visitor.host, "too many silent connections")
            descriptor = visitor.socket.fileno()
            if self._waiting.get(descriptor) is visitor:
                self._end(descriptor, visitor)
            else:
                hang_up(visitor.socket)  # a thread has it, and closes it

    def _wait_for(self, visitor: Visitor) -> None:
        descriptor = visitor.socket.fileno()
        if descriptor >= 0:
            self._waiting[descriptor] = visitor
            self._poller.register(descriptor, select.POLLIN)

    def _look_at(self, descriptor: int, visitor: Visitor) -> None:
        """Something came from one who waits here."""
        try:
            if visitor.parting_since:
                if not prompt_calls.discard(descriptor, _LAST_BYTES):
                    self._end(descriptor, visitor)
                return
            spoken = prompt_calls.has_spoken(descriptor)
        except OSError:
            self._end(descriptor, visitor)
            if not visitor.parting_since:
                self._host.went(visitor, "connection lost")
            return
        if spoken:
            self._poller.unregister(descriptor)
            del self._waiting[descriptor]
            self._host.spoke(visitor)
        elif spoken is False:
            self._end(descriptor, visitor)
            self._host.went(visitor, "")

    def _look_at_clock(self, now: float) -> None:
        if self._paused_until and now >= self._paused_until:
            self._paused_until = 0.0
            self._poller.register(self._listening, select.POLLIN)
        for descriptor, visitor in list(self._waiting.items()):
            if now - (visitor.parting_since or visitor.since) >= self._seconds:
                self._end(descriptor, visitor)
                if not visitor.parting_since:
                    self._host.went(visitor, "no association request in time")

    def _end(self, descriptor: int, visitor: Visitor) -> None:
        self._poller.unregister(descriptor)
        del self._waiting[descriptor]
        self._visitors.leave(visitor)
        prompt_calls.close(visitor.socket)


class Turns:
    """Who has spoken and waits for a thread: address after address, so that one with many holds up nobody else."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._lanes: OrderedDict[str, deque[Visitor]] = OrderedDict()
        self._closed = False

    def put(self, visitor: Visitor) -> None:
        """One more."""
        with self._condition:
            self._lanes.setdefault(visitor.host, deque()).append(visitor)
            self._condition.notify()

    def take(self) -> Visitor | None:
        """Whose turn it is; waits for one. None when no more will come."""
        with self._condition:
            while not self._lanes:
                if self._closed:
                    return None
                self._condition.wait()
            host, lane = self._lanes.popitem(last=False)
            visitor = lane.popleft()
            if lane:
                self._lanes[host] = lane
            return visitor

    def close(self) -> None:
        """No more will come."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
