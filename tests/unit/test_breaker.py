"""The circuit breaker as a value: every sequence of failures and answers keeps its promises."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from osteo_daemon.domain.breaker import Breaker, BreakerState

NOW = datetime(2026, 11, 22, tzinfo=UTC)
CLOSED = Breaker(BreakerState.CLOSED, NOW)


def failed(breaker: Breaker, now: datetime = NOW) -> Breaker:
    """One more failure; the third in a row opens, a probe is due ten seconds later."""
    return breaker.failed("PeerUnavailable: away", now, limit=3, pause_seconds=10)


def test_it_opens_at_the_limit_and_tells_since_when_and_why() -> None:
    second = failed(failed(CLOSED))
    assert (second.state, second.failures, second.error) == (BreakerState.CLOSED, 2, "PeerUnavailable: away")
    later = NOW + timedelta(minutes=1)
    third = failed(second, later)
    assert (third.state, third.since, third.next_probe_at) == (
        BreakerState.OPEN,
        later,
        later + timedelta(seconds=10),
    )
    fourth = failed(third, later + timedelta(seconds=10))
    assert (fourth.since, fourth.failures) == (later, 4)


def test_an_answer_between_failures_starts_the_count_anew() -> None:
    assert failed(failed(failed(failed(CLOSED)).answered(NOW))).state is BreakerState.CLOSED


def test_half_open_lets_one_decide() -> None:
    half = failed(failed(failed(CLOSED))).probed(NOW)
    assert half.state is BreakerState.HALF_OPEN
    assert failed(half).state is BreakerState.OPEN
    assert half.answered(NOW) == CLOSED


def test_a_probe_is_due_after_the_pause_and_never_hangs_on_a_clock_put_right() -> None:
    opened = failed(failed(failed(CLOSED)))
    assert opened.wait_seconds(NOW + timedelta(seconds=4), 60) == 6
    assert opened.wait_seconds(NOW + timedelta(seconds=10), 60) == 0
    assert opened.wait_seconds(NOW - timedelta(days=1), 60) == 0
    assert CLOSED.wait_seconds(NOW, 60) == 0


@given(st.lists(st.sampled_from(["fail", "answer", "probe"])))
def test_any_sequence(steps: list[str]) -> None:
    breaker, failures = CLOSED, 0
    for number, step in enumerate(steps):
        now = NOW + timedelta(seconds=number)
        before = breaker
        if step == "fail":
            breaker, failures = failed(breaker, now), failures + 1
            assert breaker.state is not BreakerState.HALF_OPEN
            assert (breaker.state is BreakerState.OPEN) == (failures >= 3)
        elif step == "answer":
            breaker, failures = breaker.answered(now), 0
            assert breaker.state is BreakerState.CLOSED
            assert breaker.error is None
        else:
            breaker = breaker.probed(now)
            assert breaker.state is (BreakerState.HALF_OPEN if before.state is BreakerState.OPEN else before.state)
        assert breaker.failures == failures
        assert (breaker.next_probe_at is not None) == (breaker.state is BreakerState.OPEN)
        assert breaker.since <= now
