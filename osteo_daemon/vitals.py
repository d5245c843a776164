"""What a role says of itself: to the service manager, and in a small file for `osteo run monitor`.

Both hear the same: the role is ready when it says so, and alive as long as the loop that does its work comes round.
The file also holds what the role has counted (`osteo_daemon.tally`), and the next process goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from osteo_daemon.log import listen
from osteo_daemon.notify import ServiceManager
from osteo_daemon.tally import TALLY

WRITE_SECONDS: Final = 5.0
"""How often the file is written at most."""

_SLOTS: Final = 64


class Vitals:
    """One role's word, from its start to its end.

    Args:
        state_dir: of the node.
        role: name.
        patience_seconds: a role that does not come round for so long is not well.
        manager: who started this process.
        clock: monotonic seconds of the whole machine.
    """

    def __init__(
        self,
        state_dir: Path,
        role: str,
        patience_seconds: float = 60.0,
        *,
        manager: ServiceManager | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager or ServiceManager()
        self._clock = clock
        self._role = role
        self._patience_seconds = patience_seconds
        self._state = "starting"
        self._written_at = -float("inf")
        self._folder = folder_of(state_dir)
        self._lock = -1
        self._path = self._take_slot()
        with suppress(OSError, ValueError, AttributeError):
            TALLY.take_up(json.loads(self._path.read_bytes()).get("sums"))
        listen(TALLY.hear)
        self._write()

    def __enter__(self) -> Vitals:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The role has ended."""
        self._state = "ended"
        self._write()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def ready(self) -> None:
        """The role takes work from now on."""
        self._state = "ready"
        self._manager.ready()
        self._write()

    def alive(self) -> None:
        """The role's loop came round; call it as often as you like."""
        self._manager.alive()
        if self._clock() - self._written_at >= WRITE_SECONDS:
            self._write()

    def reloading(self) -> None:
        """The role loads something anew; `ready` ends it."""
        self._manager.reloading()

    def stopping(self) -> None:
        """The role has begun to end."""
        self._state = "stopping"
        self._manager.stopping()
        self._write()

    def _take_slot(self) -> Path:
        """The first file of this role that no other process has: a killed one's is free at once, its sums go on."""
        with suppress(OSError):
            self._folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            for number in range(1, _SLOTS):
                path = self._folder / f"{self._role}-{number}.json"
                lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                self._lock = lock
                return path
        # nothing can be written there, or so many run: this one works on without a file of its own
        return self._folder / f"{self._role}-{os.getpid()}.json"

    def _write(self) -> None:
        self._written_at = self._clock()
        if self._lock < 0:
            return
        document = {
            "role": self._role,
            "pid": os.getpid(),
            "state": self._state,
            "alive_at": self._written_at,
            "patience_s": self._patience_seconds,
            "sums": TALLY.to_json(),
        }
        part = self._path.with_suffix(".part")
        # a disk that takes nothing is no reason to stop; what is not written is told with the next
        with suppress(OSError):
            part.write_text(json.dumps(document), encoding="utf-8")
            part.replace(self._path)


@dataclass(frozen=True, slots=True)
class Sign:
    """What one process last said.

    Attributes:
        role: name.
        slot: of several processes of one role.
        state: "starting", "ready", "stopping" or "ended".
        silent_seconds: since then.
        patience_seconds: after so long a silence it is not well.
        sums: what it has counted, see `osteo_daemon.tally.read_sums`.
    """

    role: str
    slot: int
    state: str
    silent_seconds: float
    patience_seconds: float
    sums: Any

    @property
    def is_well(self) -> bool:
        """It runs, and its loop comes round."""
        return self.state in ("starting", "ready") and self.silent_seconds <= self.patience_seconds


def read_signs(state_dir: Path, now: float | None = None) -> list[Sign]:
    """What every process of this node last said, by role and slot; unreadable files are passed over.

    Args:
        state_dir: of the node.
        now: monotonic seconds of the machine.
    """
    present = time.monotonic() if now is None else now
    found: list[Sign] = []
    for path in sorted(folder_of(state_dir).glob("*-*.json")):
        role, _, slot = path.stem.rpartition("-")
        try:
            document = json.loads(path.read_bytes())
            silent = present - float(document["alive_at"])
            if silent < 0:
                silent = float("inf")  # said before the machine was started anew
            patience = float(document["patience_s"])
            found.append(Sign(role, int(slot), str(document["state"]), silent, patience, document.get("sums")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def running_roles(state_dir: Path) -> list[str]:
    """The roles of this node that have a process on this machine, by its lock: a killed one's is free at once."""
    found = []
    for path in sorted(folder_of(state_dir).glob("*-*.lock")):
        with suppress(OSError), path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.stem.rpartition("-")[0])
    return sorted(set(found))


def folder_of(state_dir: Path) -> Path:
    """Where the files are."""
    return state_dir / "vitals"
