"""systemd hears of a role over a real socket of its own kind."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osteo_daemon.notify import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager_socket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@osteo-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + name[1:] if name.startswith("@") else name)
        channel.settimeout(5)
        yield channel, name


def test_a_role_says_ready_alive_and_stopping(manager_socket: tuple[socket.socket, str]) -> None:
    channel, name = manager_socket
    now = [100.0]
    variables = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    manager = ServiceManager(variables, lambda: now[0])
    assert variables == {"HOME": "/"}  # a child would speak in our name
    assert manager.alive_seconds == 10.0
    manager.ready()
    for _ in range(100):  # 20 s of a busy loop
        manager.alive()
        now[0] += 0.2
    manager.reloading()
    manager.ready()
    manager.stopping()
    channel.setblocking(False)
    heard = []
    while select.select([channel], [], [], 0)[0]:
        heard.append(channel.recv(100))
    begun = heard.pop(5)
    assert begun.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert int(begun.rpartition(b"=")[2]) <= time.monotonic_ns() // 1000
    assert heard == [b"READY=1", *[b"WATCHDOG=1"] * 4, b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "1000000"},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)},
        {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "soon"},
    ],
)
def test_without_a_manager_that_listens_nothing_happens(variables: dict[str, str]) -> None:
    manager = ServiceManager(variables)
    manager.ready()
    manager.alive()
    manager.stopping()


def test_another_process_is_watched_by_its_own_word() -> None:
    assert ServiceManager({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)}).alive_seconds == 0.0
    assert ServiceManager({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}).alive_seconds == 0.5
