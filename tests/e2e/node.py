"""`osteo serve` as a process, its children by role, and its job store as an operator sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings
from tests.conftest import ROOT
from tests.fakes import CALLED, CALLING, LOOPBACK, RoleProcess, a_free_port, until


@dataclass
class Node:
    """A running node."""

    serve: RoleProcess
    config: Path
    port: int

    def child(self, role: str) -> psutil.Process | None:
        """The process of a role, None while it is being restarted."""
        assert self.serve.process is not None
        for process in psutil.Process(self.serve.process.pid).children():
            try:
                if role in process.cmdline():
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def kill(self, role: str) -> None:
        """SIGKILL a role."""
        process = until(lambda: self.child(role))
        process.kill()
        process.wait(60)

    def studies(self) -> list[dict[str, Any]]:
        """`osteo studies list --json`."""
        rows: list[dict[str, Any]] = json.loads(self.osteo("studies", "list", "--json"))
        return rows

    def study(self, uid: str) -> dict[str, Any]:
        """`osteo studies show UID --json`."""
        shown: dict[str, Any] = json.loads(self.osteo("studies", "show", uid, "--json"))
        return shown

    def osteo(self, *arguments: str) -> str:
        """Output of an osteo command with the node's settings."""
        done = subprocess.run(
            [sys.executable, "-m", "osteo_daemon.cli", *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for_state(self, state: JobState, seconds: float) -> None:
        """Wait until the only study has reached ``state``.

        The store is asked, not the command: a new process every half second took the processor from the node.
        """
        with closing(JobStore(load_settings(self.config).database_url)) as store:
            until(lambda: [job.state for job in store.recent()] == [state], seconds, every=0.1)

    @property
    def log(self) -> str:
        """Everything the node has logged."""
        return self.serve.log.read_text(errors="replace")


@contextmanager
def running_node(folder: Path, destinations: str, *, screener: str = "") -> Iterator[Node]:
    """Start `osteo serve` with a short quiet time and short leases; end it with SIGTERM.

    ``destinations`` stands at the end of its settings, ``screener`` in that section.
    """
    port = a_free_port()
    config = folder / "osteo.toml"
    config.write_text(
        f"""
state_dir = "{folder / "state"}"
[receiver]
ae_title = "{CALLED}"
port = {port}
minimum_free_bytes = 0
[[sources]]
ae_title = "{CALLING}"
addresses = ["{LOOPBACK}"]
[completeness]
quiet_seconds = 2
sweep_seconds = 0.5
[screener]
lease_seconds = 6
poll_seconds = 0.2
retry_base_seconds = 1
{screener}
[deliverer]
lease_seconds = 6
poll_seconds = 0.2
retry_base_seconds = 0.5
{destinations}
"""
    )
    serve = RoleProcess(["serve", "--config", str(config)], folder / "serve.log").start()
    node = Node(serve, config, port)
    try:
        serve.wait_for("receiver_listening", 60)
        yield node
    finally:
        status = serve.stop()
        assert status == 0, node.log


def destination(name: str, ae_title: str, port: int) -> str:
    """A [[destinations]] entry."""
    return f'[[destinations]]\nname = "{name}"\nae_title = "{ae_title}"\nhost = "{LOOPBACK}"\nport = {port}\n'
