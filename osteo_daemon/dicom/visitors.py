"""Connections of one listener, and how many of them may be no associations yet: of one address, and of all."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from osteo_daemon.dicom.prompt_calls import Address


@dataclass(slots=True, eq=False)
class Visitor:
    """One connection.

    Attributes:
        address: where it comes from.
        since: monotonic seconds of its beginning.
        socket: in use now; under TLS another than at the beginning.
        parting_since: monotonic seconds since which its end is all that is waited for; 0: it has a future.
        association: pynetdicom's, once there is one.
    """

    address: Address
    since: float
    socket: socket.socket
    parting_since: float = 0.0
    association: Any = None

    @property
    def host(self) -> str:
        """Its address without the port."""
        return self.address[0]

    @property
    def silent(self) -> bool:
        """True until it is an association."""
        return self.association is None or not self.association.is_established

    @property
    def ended(self) -> bool:
        """True when its association is over."""
        # ident is None before the start
        association = self.association
        return association is not None and association.ident is not None and not association.is_alive()


class Visitors:
    """All connections of a listener.

    Args:
        per_address: silent ones of one address.
        altogether: silent ones of all addresses; the address that has most gives way, so that a flood does not push
            out those who came for their first word.
    """

    def __init__(self, per_address: int, altogether: int) -> None:
        self._per_address = per_address
        self._altogether = altogether
        self._lock = threading.Lock()
        self._present: set[Visitor] = set()

    def admit(self, arrived: Sequence[Visitor]) -> list[Visitor]:
        """Take in newcomers, in their order; those who have to go for them, newcomers among them, are given back."""
        evicted = []
        with self._lock:
            self._present = {visitor for visitor in self._present if not visitor.ended}
            lanes: dict[str, deque[Visitor]] = {}
            silent = sorted((visitor for visitor in self._present if visitor.silent), key=lambda one: one.since)
            for visitor in silent:
                lanes.setdefault(visitor.host, deque()).append(visitor)
            count = len(silent)
            for visitor in arrived:
                lane = lanes.setdefault(visitor.host, deque())
                crowd = lane if len(lane) >= self._per_address else None
                if crowd is None and count >= self._altogether:
                    crowd = max(lanes.values(), key=len)
                if crowd:
                    oldest = crowd.popleft()
                    self._present.discard(oldest)
                    evicted.append(oldest)
                    count -= 1
                lane.append(visitor)
                self._present.add(visitor)
                count += 1
        return evicted

    def leave(self, visitor: Visitor) -> None:
        """It is gone."""
        with self._lock:
            self._present.discard(visitor)

    def is_present(self, visitor: Visitor) -> bool:
        """False when it had to give way, or is gone."""
        with self._lock:
            return visitor in self._present

    def all(self) -> list[Visitor]:
        """Everybody who is there."""
        with self._lock:
            return list(self._present)
