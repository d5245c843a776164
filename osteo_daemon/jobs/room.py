"""Room on the spool's disk: who is let in while it gets scarce, and what is set aside for the end.

Three steps, each before the next hurts. Below the low watermark no new study is begun, and sources of backfill wait;
those in progress may finish. Below the minimum nothing is received. A file holds an eighth of that minimum in reserve:
it is given up when a report of an acknowledged study finds no room. Nothing is deleted to make room.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

RESERVE_SHARE = 8
"""The reserve is this part of the minimum of free space."""

_RESERVE_NAME = "reserve"


class Room:
    """Watermarks of one spool, and its reserve.

    Args:
        root: the spool's folder.
        minimum_bytes: free space below which nothing is received; 0: no watermarks and no reserve.
        low_bytes: free space below which no new study is begun.
    """

    def __init__(self, root: Path, minimum_bytes: int, low_bytes: int) -> None:
        self._root = root
        self._low_bytes = low_bytes if minimum_bytes else 0
        self._reserve_bytes = minimum_bytes // RESERVE_SHARE

    @property
    def free_bytes(self) -> int:
        """Free space of the disk."""
        return shutil.disk_usage(self._root).free

    @property
    def is_low(self) -> bool:
        """True while only studies in progress may go on."""
        return self.free_bytes < self._low_bytes

    def set_aside(self) -> bool:
        """Fill the reserve where it is not and there is room for it; True when it is there (or none is wanted)."""
        path = self._root / _RESERVE_NAME
        if not self._reserve_bytes or (path.exists() and path.stat().st_size >= self._reserve_bytes):
            return True
        if self.free_bytes < self._low_bytes + self._reserve_bytes:
            return False
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.posix_fallocate(handle, 0, self._reserve_bytes)
            finally:
                os.close(handle)
        except OSError:
            give_up_reserve(self._root)
            return False
        return True


def give_up_reserve(root: Path) -> bool:
    """Make room for the report of an acknowledged study; False when there was no reserve."""
    with suppress(FileNotFoundError):
        (root / _RESERVE_NAME).unlink()
        return True
    return False
