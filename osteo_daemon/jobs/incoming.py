"""A file that is written while its bytes still arrive: when the last one is there, little is left to wait for.

It gets its name before it is synced, so that one commit of the file system's journal may hold both. A name that is
there already is another matter: what lies under it may be acknowledged, and only durable bytes take its place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path

Buffer = bytes | bytearray | memoryview
"""Bytes in memory (collections.abc.Buffer from Python 3.12 on)."""

_SYNC_FILE_RANGE_WRITE = 2
_BEGIN_BYTES = 32 << 10
_NAMES = threading.Lock()  # between a look at who has a name and what follows from it
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_FREE_NAME = frozenset({errno.EEXIST, errno.EINVAL, errno.ENOSYS})  # taken; or this file system cannot tell
# no function of the standard library calls these two of Linux
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_BEGIN_WRITING = getattr(_LIBRARY, "sync_file_range", None)
if _BEGIN_WRITING is not None:
    _BEGIN_WRITING.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_RENAME = getattr(_LIBRARY, "renameat2", None)
if _RENAME is not None:
    _RENAME.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


class IncomingFile:
    """A temporary file under a name that is this process's alone; it ends in `keep` or `discard`.

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
        if _BEGIN_WRITING is not None and self.size_bytes - begin >= _BEGIN_BYTES:
            # a hint: it waits for nothing and promises nothing; `sync` does both
            _BEGIN_WRITING(self._handle, begin, self.size_bytes - begin, _SYNC_FILE_RANGE_WRITE)

    @property
    def sha256(self) -> str:
        """Of the bytes so far, lower-case hexadecimal."""
        return self._digest.hexdigest()

    def take_name(self, path: Path) -> bool:
        """Move the file to a name that nothing has; False, and nothing moved, when something has it.

        Raises:
            OSError: the folder is missing, or the disk failed.
        """
        if _RENAME is None:
            return False
        names = os.fsencode(self.path), os.fsencode(path)
        if _RENAME(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
            error = ctypes.get_errno()
            if error in _NO_FREE_NAME:
                return False
            raise OSError(error, os.strerror(error), str(path))
        self.path = path
        return True

    def sync(self) -> None:
        """Wait until every byte is on the disk.

        Raises:
            OSError: the disk failed.
        """
        os.fsync(self._handle)

    def replace_name(self, path: Path) -> None:
        """Move the file to a name, in place of what has it; only after `sync`.

        Raises:
            OSError: the folder is missing, or the disk failed.
        """
        with _NAMES:
            self.path.rename(path)
            self.path = path

    def keep(self) -> None:
        """It is complete and stays: from now on `discard` does nothing."""
        self._close()

    def discard(self) -> None:
        """Give the file up; never another one that got its name meanwhile."""
        if self._handle < 0:
            return
        with _NAMES, suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._handle)):
                self.path.unlink()
        self._close()

    def _close(self) -> None:
        os.close(self._handle)
        self._handle = -1
