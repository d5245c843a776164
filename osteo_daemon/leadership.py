"""Which of several schedulers on one job store leads: a lease, renewed by a thread of its own.

A step that takes long, or a clock that was set back, must not cost the lease: neither is asked for the heartbeat.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from osteo_daemon.errors import Transient
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import HEARTBEATS_PER_LEASE
from osteo_daemon.log import get_logger, where

LEASE_SECONDS = 15.0
_ROLE = "scheduler"


class Leadership:
    """One scheduler's claim to be the one that acts.

    Args:
        jobs: the job store that is shared.
        taken: called when this process begins to lead.
    """

    def __init__(self, jobs: JobStore, taken: Callable[[], None]) -> None:
        self._jobs = jobs
        self._taken = taken
        self._name = f"{_ROLE}-{socket.gethostname()}-{os.getpid()}"
        self._until = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leadership", daemon=True)

    @property
    def leads(self) -> bool:
        """True when this process runs the steps."""
        return time.monotonic() < self._until

    def start(self) -> None:
        """Ask now, and go on asking."""
        self.ask()
        self._thread.start()

    def ask(self) -> None:
        """Take or keep the lease."""
        led, asked_at = self.leads, time.monotonic()
        try:
            leads = self._jobs.lead(_ROLE, self._name, LEASE_SECONDS, is_gone=_is_gone)
            # while the question is open the lease in hand holds: steps that are due at the same moment must not be lost
            self._until = asked_at + LEASE_SECONDS if leads else 0.0
        except Transient as error:
            get_logger().warning("lease_not_renewed", error=type(error).__name__, detail=error.detail)
        if self.leads != led:
            get_logger().info("leads" if self.leads else "follows", worker=self._name)
            if self.leads:
                self._taken()

    def resign(self) -> None:
        """Give the lease back, so that another need not wait for its end."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.leads:
            return
        try:
            self._jobs.resign(_ROLE, self._name)
        except Transient as error:
            get_logger().warning("lease_not_given_back", error=type(error).__name__, detail=error.detail)

    def _keep(self) -> None:
        while not self._over.wait(LEASE_SECONDS / HEARTBEATS_PER_LEASE):
            try:
                self.ask()
            except Exception as error:  # noqa: BLE001 - the thread's loop edge: who stops asking never leads again
                get_logger().error("lease_not_renewed", error=type(error).__name__, detail=where(error.__traceback__))


def _is_gone(holder: str) -> bool:
    """True for a scheduler of this machine whose process has ended."""
    place, _, pid = holder.rpartition("-")
    if place != f"{_ROLE}-{socket.gethostname()}" or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
