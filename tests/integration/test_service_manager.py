"""Roles as systemd runs them: told over its own kind of socket, ended when they hang, started again."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from osteo_daemon.receiver import _SILENCE_SECONDS, Receiver, _wait
from osteo_daemon.settings import load_settings
from osteo_daemon.vitals import read_signs
from tests.conftest import ROOT
from tests.fakes import LOOPBACK, a_free_port, settings_text, until

WATCHDOG_SECONDS = 3.0


class SmallManager:
    """What systemd does for a unit of ``Type=notify`` with ``WatchdogSec=`` and ``Restart=always``."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._address = folder / "notify"
        self._arguments = arguments
        self._log = folder / "role.log"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._address))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the role with systemd's variables."""
        told = {"NOTIFY_SOCKET": str(self._address), "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6))}
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "osteo_daemon.cli", "run", *self._arguments],
                env={**os.environ, **told},
                cwd=ROOT,
                stdout=sink,
                stderr=sink,
            )
        return self.process

    def hear(self, seconds: float) -> str:
        """The next word, or nothing when the role is silent for so long."""
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(1000).decode()
        except TimeoutError:
            return ""

    def wait_for(self, word: str) -> None:
        """Wait for a word; the role may say others before."""
        while not (heard := self.hear(120)).startswith(word):
            assert heard, self._log.read_text(errors="replace")

    def close(self) -> None:
        """End what is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        self._socket.close()


@contextmanager
def managed(folder: Path, role: str) -> Iterator[tuple[SmallManager, int]]:
    port = a_free_port()
    config = folder / "osteo.toml"
    config.write_text(settings_text(folder / "state", port))
    manager = SmallManager(folder, [role, "--config", str(config)])
    try:
        yield manager, port
    finally:
        manager.close()


def test_a_receiver_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    with managed(tmp_path, "receiver") as (manager, port):
        first = manager.start()
        manager.wait_for("READY=1")
        socket.create_connection((LOOPBACK, port), 10).close()  # ready means that the port takes connections
        manager.wait_for("WATCHDOG=1")
        first.send_signal(signal.SIGHUP)
        manager.wait_for("RELOADING=1\nMONOTONIC_USEC=")
        manager.wait_for("READY=1")
        first.send_signal(signal.SIGSTOP)  # it hangs, as far as anybody can see
        while manager.hear(WATCHDOG_SECONDS):
            pass
        first.kill()
        assert first.wait(60) == -signal.SIGKILL
        second = manager.start()
        manager.wait_for("READY=1")
        socket.create_connection((LOOPBACK, port), 10).close()
        manager.wait_for("WATCHDOG=1")
        (sign,) = read_signs(tmp_path / "state")  # the place of the one that was killed, not a second one
        assert (sign.role, sign.slot, sign.state) == ("receiver", 1, "ready")
        second.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert second.wait(60) == 0
        (sign,) = read_signs(tmp_path / "state")
        assert sign.state == "ended"


def test_a_scheduler_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    with managed(tmp_path, "scheduler") as (manager, _port):
        process = manager.start()
        manager.wait_for("READY=1")
        manager.wait_for("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert process.wait(60) == 0


@pytest.mark.parametrize(("silent_seconds", "says_so"), [(0.1, True), (_SILENCE_SECONDS + 1, False)])
def test_a_receiver_is_alive_only_while_connections_are_taken(silent_seconds: float, says_so: bool) -> None:
    """Its main thread wakes either way: what counts is the thread that takes connections."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    said: list[str] = []

    class Listening:
        looks = 0

        @property
        def silent_seconds(self) -> float:
            self.looks += 1
            if self.looks == 2:
                ended.put(signal.SIGTERM)
            return silent_seconds

    class Listener:
        def alive(self) -> None:
            said.append("alive")

    assert _wait(ended, Listening(), Listener()) == signal.SIGTERM  # type: ignore[arg-type]
    assert bool(said) is says_so


def test_the_thread_that_takes_connections_tells_when_it_came_round(tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 0))
    receiver = Receiver(load_settings(config))
    receiver.start()
    began = time.monotonic()
    try:
        until(lambda: time.monotonic() - began > 1.5 and receiver.silent_seconds < 1.0, 60)
    finally:
        receiver.stop(grace_seconds=0.0)
    before = receiver.silent_seconds
    time.sleep(0.1)
    assert receiver.silent_seconds >= before + 0.1  # nobody comes round any more
