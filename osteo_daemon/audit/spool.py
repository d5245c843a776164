"""Audit messages on their way: a folder of files, one each, durable before the event goes on, taken in order.

The files hold patient identity: the folder is readable by the node's user alone, and its size is bounded. What does
not fit is not recorded, loudly; the oldest stay, since a flood of new messages must not wash away what it covers up.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from osteo_daemon.errors import ConfigurationError

_SUFFIX = ".syslog"
_PARTIAL = ".partial"
_RECOUNTED_EVERY = 128
"""Other processes write here too: what lies here is counted anew after so many messages of our own."""

_ABANDONED_SECONDS = 3600.0
_FULL_SECONDS = 1.0
"""How often a full folder is counted."""


class AuditSpool:
    """The folder, for every process of the node; the threads of one may use it at once.

    Args:
        folder: made when missing.
        maximum_bytes: that its files may take together.

    Raises:
        ConfigurationError: the folder cannot be made.
    """

    def __init__(self, folder: Path, maximum_bytes: int) -> None:
        self.folder = folder
        self._maximum_bytes = maximum_bytes
        self._lock = threading.Lock()
        self._written = 0
        try:
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(f"the audit folder {folder} cannot be used ({error.strerror})") from error
        # of processes that were killed while they wrote: nobody was told that these are kept
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()
        self._bytes = self.size_bytes()
        self._counted_at = time.monotonic()
        newest = max((path.name for path in self.folder.glob(f"*{_SUFFIX}")), default="0-")
        self._last = int(newest.partition("-")[0])

    def put(self, message: bytes) -> bool:
        """Keep a message durably; False when there is no room for it.

        Raises:
            OSError: the disk failed.
        """
        with self._lock:
            full = self._bytes + len(message) > self._maximum_bytes
            # a full folder is large, and its reader may be away for days: it is not counted for every message
            if self._written % _RECOUNTED_EVERY == 0 or (full and time.monotonic() > self._counted_at + _FULL_SECONDS):
                self._bytes = self.size_bytes()
                self._counted_at = time.monotonic()
            if self._bytes + len(message) > self._maximum_bytes:
                return False
            # in order of time, and of writing where the clock was set back
            self._last = max(time.time_ns(), self._last + 1)
            name = f"{self._last:020d}-{os.getpid()}"
            partial = self.folder / f"{name}{_PARTIAL}"
            try:
                with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(message)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(self.folder / f"{name}{_SUFFIX}")
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._bytes += len(message)
            self._written += 1
        return True

    def waiting(self, most: int) -> list[Path]:
        """The oldest messages, in order."""
        return sorted(self.folder.glob(f"*{_SUFFIX}"))[:most]

    def remove(self, paths: list[Path]) -> None:
        """Forget messages that were sent."""
        for path in paths:
            path.unlink(missing_ok=True)
        with self._lock:
            self._counted_at = -math.inf

    def size_bytes(self) -> int:
        """What the messages take together."""
        return sum(size for _path, size in self._sizes())

    def count(self) -> int:
        """How many messages wait."""
        return sum(1 for _entry in self._sizes())

    def _sizes(self) -> Iterator[tuple[str, int]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    try:
                        yield entry.name, entry.stat().st_size
                    except FileNotFoundError:  # sent meanwhile
                        continue
