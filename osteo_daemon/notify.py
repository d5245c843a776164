"""Telling systemd that a role is ready, alive or ending (sd_notify(3)); without systemd it says nothing.

A role reports itself alive from the loop that does its work, never from a thread of its own: a watchdog that keeps
ringing while the work hangs would be worse than none.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceManager:
    """The service manager that started this process, if one did.

    Takes its variables out of the environment: children must not speak in this process's name.

    Args:
        environment: where systemd put its variables; `os.environ` unless told.
        clock: monotonic seconds.
    """

    def __init__(
        self, environment: MutableMapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        variables = os.environ if environment is None else environment
        address, interval, pid = (variables.pop(name, "") for name in _VARIABLES)
        # a leading @ stands for the null byte of Linux's abstract names
        self._address = "\0" + address[1:] if address.startswith("@") else address
        meant = not pid.isdigit() or int(pid) == os.getpid()
        self._alive_seconds = int(interval) / 2e6 if interval.isdigit() and meant else 0.0
        self._clock = clock
        self._alive_at = -float("inf")

    @property
    def alive_seconds(self) -> float:
        """How often `alive` should be called at least, in seconds; 0 where no watchdog waits for it."""
        return self._alive_seconds

    def ready(self) -> None:
        """The role takes work from now on."""
        self._say("READY=1")

    def alive(self) -> None:
        """The role's loop came round; call it as often as you like, few messages are sent."""
        if self._alive_seconds and self._clock() - self._alive_at >= self._alive_seconds / 2:
            self._alive_at = self._clock()
            self._say("WATCHDOG=1")

    def reloading(self) -> None:
        """The role loads something anew; `ready` ends it."""
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The role has begun to end."""
        self._say("STOPPING=1")

    def _say(self, state: str) -> None:
        if not self._address:
            return
        # a service manager that doesn't listen is no reason to stop serving
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), self._address)
