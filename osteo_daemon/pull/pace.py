"""How gently: hours of the day, studies in an hour."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, timedelta


@dataclass(frozen=True, slots=True)
class Hours:
    """A window of the day, by this machine's clock; it may pass midnight. Equal ends are the whole day."""

    start: time = time(0)
    end: time = time(0)

    @classmethod
    def parse(cls, text: str) -> Hours:
        """``20:00-06:00``; empty for the whole day.

        Raises:
            ValueError: something else.
        """
        if not text:
            return cls()
        first, dash, last = text.partition("-")
        if not dash:
            raise ValueError("hours are written as 20:00-06:00")
        return cls(time.fromisoformat(first.strip()), time.fromisoformat(last.strip()))

    def wait_seconds(self, now: datetime) -> float:
        """How long until the window is open; 0 inside it. ``now`` is aware, in local time."""
        clock = now.time()
        if self.start == self.end:
            return 0.0
        inside = self.start <= clock < self.end if self.start < self.end else clock >= self.start or clock < self.end
        if inside:
            return 0.0
        opens = now.replace(hour=self.start.hour, minute=self.start.minute, second=self.start.second, microsecond=0)
        if opens <= now:
            opens += timedelta(days=1)
        return (opens - now).total_seconds()


@dataclass(slots=True)
class Rate:
    """At most so many studies in an hour, evenly; 0 for no limit. Times of the monotonic clock, in seconds."""

    studies_per_hour: int
    _next: float = 0.0

    def wait_seconds(self, now: float) -> float:
        """How long until the next study may begin."""
        return max(self._next - now, 0.0)

    def begun(self, now: float) -> None:
        """A study began to be fetched."""
        if self.studies_per_hour:
            self._next = now + 3600.0 / self.studies_per_hour
