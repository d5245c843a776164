"""The circuit breaker of one destination: when it is asked, when it is left alone, what is known meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


class BreakerState(StrEnum):
    """Whether deliveries go out."""

    CLOSED = "CLOSED"  # they do
    OPEN = "OPEN"  # the peer does not answer: nothing is claimed for it until a probe is answered
    HALF_OPEN = "HALF_OPEN"  # a probe was answered: the next delivery, one alone, decides


@dataclass(frozen=True, slots=True)
class Breaker:
    """A value; each of its methods gives the next one.

    Attributes:
        since: when it came into this state.
        failures: how often in a row the peer was not reached, probes included.
        next_probe_at: when an open breaker may ask again.
        error: what went wrong last: the error's class and its words.
    """

    state: BreakerState
    since: datetime
    failures: int = 0
    next_probe_at: datetime | None = None
    error: str | None = None

    def failed(self, error: str, now: datetime, *, limit: int, pause_seconds: float) -> Breaker:
        """The peer was not reached.

        Args:
            limit: failures in a row that open a closed breaker; any failure opens a half-open one.
            pause_seconds: until the next probe.
        """
        failures = self.failures + 1
        if self.state is BreakerState.CLOSED and failures < limit:
            return Breaker(self.state, self.since, failures, None, error)
        since = self.since if self.state is BreakerState.OPEN else now
        return Breaker(BreakerState.OPEN, since, failures, now + timedelta(seconds=pause_seconds), error)

    def probed(self, now: datetime) -> Breaker:
        """An open breaker's probe was answered."""
        if self.state is not BreakerState.OPEN:
            return self
        return Breaker(BreakerState.HALF_OPEN, now, self.failures, None, self.error)

    def answered(self, now: datetime) -> Breaker:
        """The peer dealt with a delivery, whatever it said to it."""
        if self.state is BreakerState.CLOSED:
            return Breaker(self.state, self.since)
        return Breaker(BreakerState.CLOSED, now)

    def wait_seconds(self, now: datetime, longest_seconds: float) -> float:
        """How long until a probe is due; 0 when it is, or when the breaker is not open.

        Args:
            longest_seconds: no probe is ever further away: what is, was set by a clock that has been put right since.
        """
        if self.state is not BreakerState.OPEN or self.next_probe_at is None:
            return 0.0
        remaining = (self.next_probe_at - now).total_seconds()
        return remaining if 0.0 < remaining <= longest_seconds else 0.0
