"""A file that is written while its bytes still arrive: when the last one is there, little is left to wait for."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

Buffer = bytes | bytearray | memoryview
"""Bytes in memory (collections.abc.Buffer from Python 3.12 on)."""

_SYNC_FILE_RANGE_WRITE = 2
_BEGIN_BYTES = 32 << 10
_LINUX = getattr(ctypes.CDLL(None), "sync_file_range", None)  # no function of the standard library calls it
if _LINUX is not None:
    _LINUX.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class IncomingFile:
    """A temporary file under a name that is this process's alone; it ends in `seal` or `discard`.

    Args:
        folder: where temporary files lie, in the file system that the file is to stay in.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)

    def write(self, data: Buffer) -> None:
        """Append bytes; the disk begins with them at once.

        Raises:
            OSError: the disk failed or is full.
        """
        view = memoryview(data).cast("B")
        begin = self.size_bytes
        self._digest.update(view)
        self.size_bytes += len(view)
        while view:
            view = view[os.write(self._handle, view) :]
        if _LINUX is not None and self.size_bytes - begin >= _BEGIN_BYTES:
            # a hint: it waits for nothing and promises nothing; `seal` does both
            _LINUX(self._handle, begin, self.size_bytes - begin, _SYNC_FILE_RANGE_WRITE)

    def seal(self) -> str:
        """Wait until every byte is on the disk; returns their SHA-256, lower-case hexadecimal.

        Raises:
            OSError: the disk failed.
        """
        try:
            os.fsync(self._handle)
        finally:
            self._close()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Give the file up, if it is still there."""
        self._close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
