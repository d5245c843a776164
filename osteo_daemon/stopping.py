"""How a role is told to end: SIGTERM of its supervisor or of systemd, SIGINT of a person."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from osteo_daemon.log import get_logger


def at_the_end(act: Callable[[], None]) -> None:
    """Call ``act`` at SIGTERM or SIGINT, in the main thread and between two of its instructions: it must be short."""

    def end(signum: int, _frame: FrameType | None) -> None:
        get_logger().info("stopping", signal=signal.Signals(signum).name)
        act()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
