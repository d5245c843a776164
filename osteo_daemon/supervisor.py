"""`osteo serve`: every role as a child process of one supervisor, on one machine.

A role that dies is started again after a back-off; SIGTERM ends the children gracefully within a deadline; children
never outlive the supervisor.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from osteo_daemon.child import start_child
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.roles import roles_of, screeners_of
from osteo_daemon.settings import Settings

STOP_SECONDS = 30.0
"""How long the children may take to end before they are killed."""

CONFIGURATION_EXIT = 2
"""Exit status of a role that refuses to start (see `osteo_daemon.cli`)."""

_POLL_SECONDS = 0.1
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_SECONDS = 60.0


@dataclass
class _Child:
    role: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    has_run: bool = False  # it has ended otherwise than by refusing to start


@dataclass
class Supervisor:
    """Keeps one process per role alive.

    Attributes:
        commands: role name to argument list.
        environments: role name to variables of its own.
        stop_seconds: as `STOP_SECONDS`.
        backoff_seconds: wait before the first, second, ... restart in a row; the last one repeats.
    """

    commands: Mapping[str, Sequence[str]]
    stop_seconds: float = STOP_SECONDS
    backoff_seconds: Sequence[float] = _BACKOFF_SECONDS
    clock: Callable[[], float] = time.monotonic
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    _children: list[_Child] = field(default_factory=list)
    _ended_by: int = 0

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT.

        Returns:
            0 after a stop; `CONFIGURATION_EXIT` when a role refuses its very first start: the others are ended too.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._reload)
        self._children = [
            _Child(role, command, self.environments.get(role, {})) for role, command in self.commands.items()
        ]
        exit_code = 0
        while not self._ended_by and not exit_code:
            for child in self._children:
                exit_code = exit_code or self._tend(child)
            time.sleep(_POLL_SECONDS)
        if self._ended_by:
            get_logger().info("stopping", signal=signal.Signals(self._ended_by).name)
        self._stop()
        get_logger().info("stopped", exit_code=exit_code)
        return exit_code

    def _end(self, signum: int, _frame: FrameType | None) -> None:
        self._ended_by = signum

    def _reload(self, signum: int, _frame: FrameType | None) -> None:
        # it loads its certificates anew; no other role has anything to load
        for child in self._children:
            if child.role == "receiver" and child.process is not None:
                child.process.send_signal(signum)

    def _tend(self, child: _Child) -> int:
        """Start, watch, restart; a non-zero return ends the supervisor."""
        now = self.clock()
        if child.process is None:
            if now >= child.start_at:
                # the kernel sends SIGTERM when the supervisor goes, however it goes
                child.process = start_child(child.command, signal.SIGTERM, environment=child.environment)
                child.started_at = now
                get_logger().info("role_started", role=child.role, pid=child.process.pid)
            return 0
        code = child.process.poll()
        if code is None:
            return 0
        child.process = None
        stable = now - child.started_at >= _STABLE_SECONDS
        if code == CONFIGURATION_EXIT and not (child.has_run or stable):
            get_logger().error("role_refused_to_start", role=child.role, exit_code=code)
            return code
        child.has_run = True
        child.failures = 1 if stable else child.failures + 1
        wait = self.backoff_seconds[min(child.failures, len(self.backoff_seconds)) - 1]
        if code == CONFIGURATION_EXIT:
            # it ran with these settings before: something changed under the node, and the others go on receiving
            wait = self.backoff_seconds[-1]
            get_logger().error("role_refused_to_start", role=child.role, exit_code=code, wait_s=wait)
        child.start_at = now + wait
        get_logger().warning("role_ended", role=child.role, exit_code=code, wait_s=wait, count=child.failures)
        return 0

    def _stop(self) -> None:
        """SIGTERM to all, then SIGKILL to those that are left when the time is over."""
        running = [child for child in self._children if child.process is not None]
        for child in running:
            if child.process is not None:
                child.process.terminate()
        deadline = self.clock() + self.stop_seconds
        for child in running:
            if child.process is None:
                continue
            try:
                child.process.wait(max(deadline - self.clock(), 0.0))
            except subprocess.TimeoutExpired:
                get_logger().warning("role_killed", role=child.role, wait_s=self.stop_seconds)
                child.process.kill()
                child.process.wait()
            child.process = None


def serve(settings: Settings, config_path: Path | None) -> int:
    """Run every role on this machine until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, "supervisor")
    arguments = [] if config_path is None else ["--config", str(config_path.resolve())]
    screeners = screeners_of(settings)
    commands = {
        name: [sys.executable, "-m", "osteo_daemon.cli", "run", role, *arguments]
        for role in roles_of(settings)
        for name in (screeners if role == "screener" else [role])
    }
    return Supervisor(commands, environments=screeners).run()
