"""Back-off, and what the delivery role may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.settings import DelivererSettings


@pytest.mark.parametrize(("attempts", "expected"), [(0, 5), (1, 5), (2, 10), (5, 80), (11, 5120)])
def test_back_off_doubles_with_jitter(attempts: int, expected: float) -> None:
    delays = [back_off_seconds(5, attempts) for _ in range(200)]
    assert expected * 0.8 <= min(delays) < expected < max(delays) <= expected * 1.2


def test_back_off_stays_a_number_for_ever() -> None:
    assert back_off_seconds(5, 10**9) < float("inf")


def test_a_peer_that_is_away_for_days_is_asked_now_and_then_and_not_by_all_at_once() -> None:
    """With the settings as they come: what was reported on the first day of a week's outage still arrives."""
    deliverer = DelivererSettings()

    def moments() -> list[float]:
        waited = [0.0]
        while waited[-1] < deliverer.give_up_after_seconds:
            delay = back_off_seconds(deliverer.retry_base_seconds, len(waited), deliverer.retry_maximum_seconds)
            assert delay <= 1.2 * deliverer.retry_maximum_seconds
            waited.append(waited[-1] + delay)
        return waited

    lanes = [moments() for _ in range(20)]
    for asked in lanes:
        assert asked[-1] >= 7 * 24 * 3600
        assert 120 <= len(asked) <= 240  # about once an hour, more often in the first
        assert sum(moment < 3600 for moment in asked) >= 8
    # after a day those that failed at one moment come spread over the hour, and not in one minute
    third_day = sorted(min(moment for moment in asked if moment > 2 * 24 * 3600) - 2 * 24 * 3600 for asked in lanes)
    assert third_day[-1] - third_day[0] > 900


def test_the_role_never_imports_torch() -> None:
    script = "import sys, osteo_daemon.deliverer; print(sorted({'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
