"""What a person wants of the screeners, and what each of them says of itself: small files in the state folder."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from osteo_daemon.errors import ConfigurationError


class Mode(StrEnum):
    """What the screeners may do."""

    RUN = "run"
    PAUSE = "pause"  # finish the study in hand, claim no other, keep the models loaded
    DRAIN = "drain"  # as pause, and unload the models: the GPU is free


@dataclass(frozen=True, slots=True)
class Wish:
    """The last word of a person to the screeners of a node; it outlives restarts."""

    mode: Mode = Mode.RUN
    who: str = ""
    reason: str = ""
    at: str = ""


def read_wish(state_dir: Path) -> Wish:
    """The last word; RUN when nobody has spoken.

    An unreadable file counts as RUN: a broken disk must not stop the screening in silence.
    """
    try:
        document = json.loads(_control_file(state_dir).read_bytes())
        return Wish(Mode(document["mode"]), document["who"], document["reason"], document["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return Wish()


def write_wish(state_dir: Path, mode: Mode, who: str, reason: str) -> None:
    """Say it to every screener of the node, those that start later too.

    Raises:
        ConfigurationError: the state folder cannot be written.
    """
    wish = Wish(mode, who, reason, datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        _replace(_control_file(state_dir), asdict(wish))
    except OSError as error:
        raise ConfigurationError(f"{state_dir} cannot be written ({error.strerror})") from error


class StatusFile:
    """What one screener says of itself; gone with it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = _folder(state_dir) / f"{socket.gethostname()}-{os.getpid()}.json"
        self._values: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}

    def write(self, **values: Any) -> None:
        """Change some values; a disk that cannot take them is no reason to stop."""
        if values.items() <= self._values.items():
            return
        self._values |= values
        document = {**self._values, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            _replace(self._path, document)
        except OSError:
            return

    def remove(self) -> None:
        """The screener ends."""
        self._path.unlink(missing_ok=True)


def screener_statuses(state_dir: Path) -> list[dict[str, Any]]:
    """What the screeners say of themselves: host, pid, state, device, models, refused bundle.

    Files that a killed process of this host left behind are passed over.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(_folder(state_dir).glob("*-*.json")):
        try:
            document = json.loads(path.read_bytes())
            if document["host"] != socket.gethostname() or Path(f"/proc/{int(document['pid'])}").exists():
                found.append(document)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _folder(state_dir: Path) -> Path:
    return state_dir / "screeners"


def _control_file(state_dir: Path) -> Path:
    return _folder(state_dir) / "control.json"


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as part:
        json.dump(document, part)
        part.flush()
        os.fsync(part.fileno())
    Path(part.name).replace(path)
