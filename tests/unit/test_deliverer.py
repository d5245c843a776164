"""Back-off, and what the delivery role may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from osteo_daemon.delivery.back_off import back_off_seconds


@pytest.mark.parametrize(("attempts", "expected"), [(0, 5), (1, 5), (2, 10), (5, 80), (11, 5120)])
def test_back_off_doubles_with_jitter(attempts: int, expected: float) -> None:
    delays = [back_off_seconds(5, attempts) for _ in range(200)]
    assert expected * 0.8 <= min(delays) < expected < max(delays) <= expected * 1.2


def test_back_off_stays_a_number_for_ever() -> None:
    assert back_off_seconds(5, 10**9) < float("inf")


def test_the_role_never_imports_torch() -> None:
    script = "import sys, osteo_daemon.deliverer; print(sorted({'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
