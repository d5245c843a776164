"""The screener's end of its worker: start, talk, kill, and say how it ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from typing import Any

from osteo_daemon.child import start_child
from osteo_daemon.errors import ConfigurationError, WorkerDied
from osteo_daemon.link import Link
from osteo_daemon.settings import Settings

_WORKER = "osteo_daemon.screening_worker"  # told so that lists of processes show what this one is
_START = f"""
import sys
from osteo_daemon.quick_imports import quick_imports
with quick_imports():
    from {_WORKER} import main
sys.exit(main(int(sys.argv[2])))
"""
_END_SECONDS = 10.0
_REAP_SECONDS = 2.0  # the socket closes a moment before the process can be waited for


class WorkerProcess:
    """A running `osteo_daemon.screening_worker`.

    Args:
        settings: of the node, handed on.
    """

    def __init__(self, settings: Settings) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START, _WORKER, str(theirs.fileno())]
            self._process: subprocess.Popen[bytes] = start_child(command, signal.SIGKILL, pass_fds=[theirs.fileno()])
        self._link = Link(ours)
        self.started_at = time.monotonic()
        self._link.send({"type": "settings", "settings": settings.document()})

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            WorkerDied: it is gone or takes nothing.
        """
        try:
            self._link.send(message)
        except EOFError as error:
            raise self._died() from error

    def receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message, or None when none came in time.

        Raises:
            WorkerDied: it is gone.
            ConfigurationError: it cannot load its models.
        """
        try:
            message = self._link.receive(timeout_seconds)
        except EOFError as error:
            raise self._died() from error
        if message is not None and message["type"] == "refused":
            self.kill()
            raise ConfigurationError(message["detail"])
        if message is not None and message["type"] == "failed":
            self.kill()
            raise WorkerDied(f"{message['error']}: {message['detail']}")
        return message

    def kill(self) -> bool:
        """SIGKILL; True when it is gone within ten seconds (a driver may keep a process that waits for it)."""
        self._process.kill()
        self._link.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _died(self) -> WorkerDied:
        try:
            self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return WorkerDied("it took no messages")
        self._link.close()
        code = self._process.returncode
        if code >= 0:
            return WorkerDied(f"it ended with status {code}")
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return WorkerDied(f"it was ended by {name}")
