"""At the receiver's start: files are the truth, and received files that no row names become rows again.

Such files are there after a crash between file and row, after an older backup of the job store came back, or when
somebody removed rows. A small file in the spool says how the last receiver ended and what the store held then; from it
follows how much there is to look at: nothing after a clean end, the folders that changed since the last start after a
crash, and everything when the store is older than it was. The receiver listens meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from osteo_daemon.dicom.filed import read_filed
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import NotDicom, StoreUnavailable
from osteo_daemon.jobs.inventory import Area, StudyInventory
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.spool import Spool, is_content_of, is_same_instance, sync_file, sync_folder
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger

UNKNOWN_SOURCE = "UNKNOWN"
"""Calling AE title of objects that were taken up from their files."""

_NAME = "receiver.json"
_MARGIN_SECONDS = 60.0  # file systems keep times coarsely, and clocks are set
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A file that has a row now."""

    study_instance_uid: str
    outcome: RecordOutcome


def take_up(store: JobStore, spool: Spool, path: Path) -> TakenUp:
    """Give a received file the row that it lacks; its study is screened as if it had just come.

    Raises:
        NotDicom: not a file of the receiver, or not whole.
        StoreUnavailable: the job store does not answer, or retention removes the study's files.
        OSError: it cannot be read.
    """
    filed = read_filed(path)
    sha256 = _sha256(path)
    if not is_content_of(path, sha256):
        raise NotDicom("other bytes than were received")
    found = filed.identifiers
    uid = found.study_instance_uid
    instance = SopInstance(
        study_instance_uid=uid,
        series_instance_uid=found.series_instance_uid,
        sop_class_uid=found.sop_class_uid,
        sop_instance_uid=found.sop_instance_uid,
        transfer_syntax_uid=filed.transfer_syntax_uid,
        path=path,
        size_bytes=path.stat().st_size,
        sha256=sha256,
    )
    # a file may have its name before it is durable
    sync_file(path)
    sync_folder(path.parent)
    before = store.job(uid)
    outcome = store.record_instance(instance, UNKNOWN_SOURCE, screenable=filed.screenable)
    if before is None and store.job(uid) is not None and spool.report_files(uid):
        # it was reported once, under revisions that the store has forgotten
        store.lift_revision(uid, "reconciliation", "reports of forgotten revisions lie in the spool")
    return TakenUp(uid, outcome)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How things stood: whether a receiver ended cleanly, what the store held, and what is still to be looked at.

    ``since``: folders that changed after it, in seconds since 1970; 0: all of them.
    """

    clean: bool
    instances: int
    last_event: int
    since: float


class Reconciliation:
    """One receiver's look at what lies in the spool.

    Args:
        store: of the node.
        spool: of the node.

    Raises:
        StoreUnavailable: the job store does not answer.
        OSError: the disk failed.
    """

    def __init__(self, store: JobStore, spool: Spool) -> None:
        self._store = store
        self._spool = spool
        self._path = spool.root / _NAME
        self._begun_at = time.time()
        self._ended = threading.Event()
        self._since = self._what_to_look_at()
        self._keep(clean=False)
        self._thread = threading.Thread(target=self._run, name="reconciliation")

    @property
    def pending(self) -> bool:
        """True while not everything has been looked at."""
        return self._since is not None

    def start(self) -> None:
        """Look, in a thread of its own."""
        if self.pending:
            self._thread.start()

    def stop(self) -> None:
        """The receiver has ended: what was not looked at is left to its next start."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self._keep(clean=not self.pending)
        except StoreUnavailable as error:
            get_logger().warning("reconciliation_failed", reason=str(error))

    def _what_to_look_at(self) -> float | None:
        """Since when folders are looked at (0: all); None: there is no need to."""
        try:
            last = _Ending(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return 0.0
        instances, last_event = self._store.extent()
        if last_event < last.last_event or instances < last.instances:
            return 0.0  # the store has forgotten, or retention removed rows meanwhile
        if last.clean:
            return None if instances == last.instances else 0.0
        return last.since

    def _keep(self, *, clean: bool) -> None:
        instances, last_event = self._store.extent()
        since = self._begun_at - _MARGIN_SECONDS if self._since is None else self._since
        ending = json.dumps(asdict(_Ending(clean, instances, last_event, since))).encode()
        temporary = self._path.with_suffix(".new")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            try:
                os.write(handle, ending)
                os.fsync(handle)
            finally:
                os.close(handle)
            temporary.rename(self._path)
        except OSError as error:
            # without it the next start looks at everything; an old one would say too little
            get_logger().warning("ending_unrecorded", reason=error.strerror)
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                temporary.unlink()
        sync_folder(self._path.parent)

    def _run(self) -> None:
        begun = time.monotonic()
        taken_up = unreadable = 0
        try:
            for path, uid in self._orphans():
                if self._ended.is_set():
                    return
                try:
                    found = take_up(self._store, self._spool, path)
                except (NotDicom, OSError) as error:
                    unreadable += 1
                    get_logger().warning("file_unreadable", study_instance_uid=uid, detail=type(error).__name__)
                    continue
                taken_up += found.outcome is RecordOutcome.STORED
            if self._ended.is_set():
                return
            self._since = None
            self._keep(clean=False)
        except StoreUnavailable as error:
            # the next start looks again, and `osteo fsck --repair` does at any time
            get_logger().warning("reconciliation_failed", reason=str(error))
        finally:
            get_logger().info(
                "reconciled",
                count=taken_up,
                affected=unreadable,
                duration_s=round(time.monotonic() - begun, 3),
                outcome="interrupted" if self.pending else "complete",
            )

    def _orphans(self) -> Iterator[tuple[Path, str | None]]:
        """Received files that no row names, and their study where it is known."""
        if self._since:
            for folder in self._spool.study_folders(Area.RECEIVED.value):
                if self._changed_since(folder, self._since):
                    yield from self._orphans_of(folder, self._study_in(folder))
            return
        known = set()
        for study in self._store.inventory():
            folder = self._spool.study_folder(Area.RECEIVED.value, study.study_instance_uid)
            known.add(folder.name)
            yield from self._orphans_of(folder, study)
        for folder in self._spool.study_folders(Area.RECEIVED.value):
            if folder.name not in known:
                yield from self._orphans_of(folder, None)

    def _orphans_of(self, folder: Path, study: StudyInventory | None) -> Iterator[tuple[Path, str | None]]:
        if self._ended.is_set() or (study is not None and study.going):
            return
        uid = None if study is None else study.study_instance_uid
        named = [] if study is None else [entry.path for entry in study.files if entry.area is Area.RECEIVED]
        paths = set(named)
        for path in sorted(folder.glob("*/*.dcm")):
            # younger ones are another process's, on their way to their rows
            if path in paths or not self._is_old(path) or any(is_same_instance(path, other) for other in named):
                continue
            now = None if uid is None else self._store.inventory_of(uid)
            if now is None or not (now.going or any(entry.path == path for entry in now.files)):
                yield path, uid

    def _study_in(self, folder: Path) -> StudyInventory | None:
        for path in folder.glob("*/*.dcm"):
            try:
                return self._store.inventory_of(read_filed(path).identifiers.study_instance_uid)
            except (NotDicom, OSError):
                continue
        return None

    def _is_old(self, path: Path) -> bool:
        try:
            return path.stat().st_ctime < self._begun_at
        except FileNotFoundError:
            return False

    @staticmethod
    def _changed_since(folder: Path, since: float) -> bool:
        try:
            return any(series.stat().st_mtime >= since for series in folder.iterdir())
        except FileNotFoundError:
            return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
