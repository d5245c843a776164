"""The spool: received objects and report objects as files that survive a power cut before anybody hears of them.

Every write: a unique temporary file in the same file system, write, rename to a name that is free, fsync of file and
folder; where the name is taken, fsync before the rename. File names are digests of UIDs and of the content, so that no
UID can name a path, no name tells of a patient, and other bytes never replace those that are there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from osteo_daemon.errors import ConfigurationError, SpoolFull, Transient
from osteo_daemon.jobs.beside import Beside
from osteo_daemon.jobs.incoming import Buffer, IncomingFile
from osteo_daemon.jobs.room import give_up_reserve

T = TypeVar("T")

AREAS = ("received", "reports", "quarantine")
"""Folders of the spool that hold what must not be lost."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME_LENGTH = 32
_CONTENT_LENGTH = 16
_PLACE_ATTEMPTS = 20
_KNOWN_FOLDERS = 1024
_ROOM_TO_COMMIT_BYTES = 16 << 20  # the row of a report must find room, too


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A durable file: where it lies, how long it is and the SHA-256 of its bytes (lower-case hexadecimal)."""

    path: Path
    size_bytes: int
    sha256: str


class Spool:
    """The node's files below one folder; several processes may write at once.

    Args:
        root: created when missing; all below it must be one file system.
        minimum_free_bytes: a write that would leave less free than this is refused before it starts.

    Raises:
        ConfigurationError: the folder cannot be created or written.
    """

    def __init__(self, root: Path, *, minimum_free_bytes: int = 0) -> None:
        self.root = root.resolve()
        self._minimum_free_bytes = minimum_free_bytes
        self._temporary = self.root / "tmp"
        self._known_folders: set[Path] = set()
        self._beside = Beside()
        try:
            for folder in (self._temporary, *(self.root / area for area in AREAS)):
                self._make_durable_folder(folder)
            if not os.access(self._temporary, os.W_OK):
                raise PermissionError(errno.EACCES, "not writable")
        except OSError as error:
            raise ConfigurationError(f"the spool {self.root} cannot be used: {error.strerror}") from error

    def store_instance(
        self, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str, parts: Iterable[Buffer]
    ) -> StoredFile:
        """Make a received object durable; ``parts`` in their order are its bytes.

        Raises:
            SpoolFull: no room; nothing is left behind.
            Transient: retention removed the study's files at that moment.
            OSError: the disk failed.
        """
        return self._store(self._series_folder(study_instance_uid, series_instance_uid), sop_instance_uid, parts)

    def begin(self) -> IncomingFile:
        """A file for an object whose bytes are still to come; `keep_instance` or its `discard` ends it.

        Raises:
            SpoolFull: no room.
            OSError: the disk failed.
        """
        if self._minimum_free_bytes and self.free_bytes() == 0:
            raise SpoolFull(f"less than {self._minimum_free_bytes} bytes free")
        with _full_is_transient():
            return IncomingFile(self._temporary)

    def keep_instance(
        self, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str, incoming: IncomingFile
    ) -> StoredFile:
        """Make a received object durable whose bytes have been written meanwhile.

        Raises:
            SpoolFull: no room; nothing is left behind.
            Transient: retention removed the study's files at that moment.
            OSError: the disk failed.
        """
        return self._keep(incoming, self._series_folder(study_instance_uid, series_instance_uid), sop_instance_uid)

    def store_report(self, study_instance_uid: str, sop_instance_uid: str, parts: Iterable[Buffer]) -> StoredFile:
        """Make a report object durable, before the store commits it; on a full disk the reserve is given up for it.

        Raises:
            SpoolFull: no room; nothing is left behind.
            Transient: retention removed the study's files at that moment.
            OSError: the disk failed.
        """
        folder, listed = self.root / "reports" / _fan_out(study_instance_uid), list(parts)
        try:
            stored = self._store(folder, sop_instance_uid, listed)
        except SpoolFull:
            if not give_up_reserve(self.root):
                raise
            stored = self._store(folder, sop_instance_uid, listed)
        if shutil.disk_usage(self.root).free < _ROOM_TO_COMMIT_BYTES:
            give_up_reserve(self.root)
        return stored

    def quarantine(self, study_instance_uid: str, sop_instance_uid: str, stored: StoredFile) -> StoredFile:
        """Move a received file to where nothing reads it.

        Raises:
            OSError: the disk failed.
        """
        target = self.root / "quarantine" / _fan_out(study_instance_uid) / stored.path.name
        self._make_durable_folder(target.parent)
        stored.path.rename(target)
        sync_folder(target.parent)
        sync_folder(stored.path.parent)
        return StoredFile(target, stored.size_bytes, stored.sha256)

    def discard(self, stored: StoredFile) -> None:
        """Remove a file that no row names; it need not exist."""
        stored.path.unlink(missing_ok=True)

    def study_folder(self, area: str, study_instance_uid: str) -> Path:
        """Where a study's files of an area (received, reports, quarantine) lie; it need not exist."""
        return self.root / area / _fan_out(study_instance_uid)

    def study_folders(self, area: str) -> Iterator[Path]:
        """The folder of every study in an area."""
        return (self.root / area).glob("*/*/")

    def received_files(self, study_instance_uid: str) -> list[Path]:
        """Every file received for a study, those too that a later header replaced."""
        return sorted(path for path in self.study_folder("received", study_instance_uid).rglob("*") if path.is_file())

    def report_files(self, study_instance_uid: str) -> list[Path]:
        """Every report object built for a study, those too of attempts that never committed."""
        return sorted(self.study_folder("reports", study_instance_uid).glob("*.dcm"))

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files for good: when this returns, a power cut doesn't bring them back. They need not exist.

        Raises:
            ValueError: a path is not of this spool; nothing was removed.
            OSError: the disk failed.
        """
        listed = list(paths)
        for path in listed:
            if not path.resolve().is_relative_to(self.root):
                raise ValueError(f"{path} is not in the spool {self.root}")
        for path in listed:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in listed}:
            if folder.is_dir():
                sync_folder(folder)

    def prune(self, study_instance_uid: str) -> None:
        """Remove the folders of a study that hold nothing more."""
        for area in AREAS:
            study = self.study_folder(area, study_instance_uid)
            for folder in (*study.glob("*/"), study):
                with suppress(OSError):
                    folder.rmdir()  # fails when something is in it

    def free_bytes(self) -> int:
        """Bytes that may still be written before `SpoolFull`."""
        return max(shutil.disk_usage(self.root).free - self._minimum_free_bytes, 0)

    def remove_leftovers(self) -> int:
        """Remove temporary files of writers that ended in the middle; returns how many.

        Only for a moment when no other process writes: when the receiver starts.
        """
        found = self.leftovers()
        for leftover in found:
            leftover.unlink(missing_ok=True)
        return len(found)

    def leftovers(self) -> list[Path]:
        """Temporary files of writers that ended in the middle."""
        return [path for path in self._temporary.iterdir() if not _writer_lives(path.name)]

    def _series_folder(self, study_instance_uid: str, series_instance_uid: str) -> Path:
        return self.root / "received" / _fan_out(study_instance_uid) / _digest(series_instance_uid)

    def _store(self, folder: Path, sop_instance_uid: str, parts: Iterable[Buffer]) -> StoredFile:
        incoming = self.begin()
        with _full_is_transient(incoming):
            for part in parts:
                incoming.write(part)
        return self._keep(incoming, folder, sop_instance_uid)

    def _keep(self, incoming: IncomingFile, folder: Path, sop_instance_uid: str) -> StoredFile:
        try:
            return self._name(incoming, folder, sop_instance_uid)
        except FileNotFoundError as error:
            # retention emptied and removed the folder, this file in it, before its name was on the disk
            raise Transient("its study's files were being removed at that moment") from error

    def _name(self, incoming: IncomingFile, folder: Path, sop_instance_uid: str) -> StoredFile:
        with _full_is_transient(incoming):
            sha256 = incoming.sha256
            path = folder / f"{_digest(sop_instance_uid)}-{sha256[:_CONTENT_LENGTH]}.dcm"
            if self._place(incoming.take_name, path):
                # bytes and name wait for one commit of the file system's journal: together, not in turn
                with self._beside.doing(lambda: sync_folder(folder)):
                    incoming.sync()
                incoming.keep()
                return StoredFile(path, incoming.size_bytes, sha256)
            incoming.sync()
            self._place(incoming.replace_name, path)
        incoming.keep()
        sync_folder(folder)
        return StoredFile(path, incoming.size_bytes, sha256)

    def _place(self, move: Callable[[Path], T], path: Path) -> T:
        for _attempt in range(_PLACE_ATTEMPTS - 1):
            try:
                self._make_durable_folder(path.parent)
                return move(path)
            except FileNotFoundError:
                # retention removes empty folders: one may have gone between the two lines, or since it was known
                self._known_folders.difference_update((path.parent, *path.parent.parents))
        self._make_durable_folder(path.parent)
        return move(path)

    def _make_durable_folder(self, folder: Path) -> None:
        """Create a folder and those above it; each name is synced in its parent, also one that another thread made."""
        if folder in self._known_folders:
            return
        above = folder == self.root or folder in self.root.parents
        if not (above and folder.is_dir()):
            self._make_durable_folder(folder.parent)
            folder.mkdir(mode=0o750, exist_ok=True)
            sync_folder(folder.parent)
        if len(self._known_folders) >= _KNOWN_FOLDERS:
            self._known_folders.clear()  # studies come and go; the folders of those at hand are soon known again
        self._known_folders.add(folder)


def is_same_instance(one: Path, other: Path) -> bool:
    """True for two received files of one SOP Instance UID and series: only their bytes differ."""
    return one.parent == other.parent and one.name[:_NAME_LENGTH] == other.name[:_NAME_LENGTH]


@contextmanager
def _full_is_transient(incoming: IncomingFile | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if incoming is not None:
            incoming.discard()
        if error.errno in _NO_ROOM:
            raise SpoolFull(error.strerror or "no room") from error
        raise


def is_content_of(path: Path, sha256: str) -> bool:
    """True when a received file's name says that these are its bytes."""
    return path.stem[_NAME_LENGTH + 1 :] == sha256[:_CONTENT_LENGTH]


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode("utf-8", "surrogateescape")).hexdigest()[:_NAME_LENGTH]


def _fan_out(study_instance_uid: str) -> Path:
    name = _digest(study_instance_uid)
    return Path(name[:2]) / name


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _writer_lives(name: str) -> bool:
    pid = name.partition("-")[0]
    if not pid.isdigit():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
