"""``osteo fsck``: do spool, store and digests agree? Files are the truth; rows can be made again from them.

The node may run meanwhile: what looks wrong is looked at again before it is told, and files younger than a minute are
left alone, as their rows may be on the way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from osteo_daemon.dicom.filed import read_filed
from osteo_daemon.errors import NotDicom
from osteo_daemon.jobs.inventory import Area, KnownFile, StudyInventory
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.spool import Spool, is_same_instance
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.reconciliation import take_up

YOUNG_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20


class Problem(StrEnum):
    """What can be wrong; those in `NOTES` are no error."""

    FILE_MISSING = "file_missing"  # a row names a file that isn't there: have the study sent again
    FILE_CHANGED = "file_changed"  # other bytes than were acknowledged: the disk or somebody changed them
    ROW_MISSING = "row_missing"  # a received file that no row names: repair takes it up again
    FILE_UNREADABLE = "file_unreadable"  # a file in the spool that isn't one of ours
    DATABASE = "database"  # the database finds itself damaged
    COUNT_WRONG = "count_wrong"  # a counter is off: repair counts anew
    SUPERSEDED = "superseded"  # a file that a later header replaced; retention removes it with its study
    REPORT_UNUSED = "report_unused"  # a report object of an attempt that never committed
    LEFTOVER = "leftover"  # a temporary file of a writer that is gone: repair removes it
    REMOVAL_UNFINISHED = "removal_unfinished"  # retention was interrupted and will go on by itself


NOTES = frozenset({Problem.SUPERSEDED, Problem.REPORT_UNUSED, Problem.REMOVAL_UNFINISHED})


@dataclass(frozen=True, slots=True)
class IntegrityFinding:
    """One thing that is not as it should be; ``repaired`` when it now is."""

    problem: Problem
    detail: str
    study_instance_uid: str | None = None
    repaired: bool = False

    @property
    def is_error(self) -> bool:
        """True when somebody must do something."""
        return self.problem not in NOTES and not self.repaired


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """What was looked at and what was found."""

    studies: int
    files: int
    size_bytes: int
    findings: tuple[IntegrityFinding, ...]

    @property
    def clean(self) -> bool:
        """True when nothing is left to do."""
        return not any(finding.is_error for finding in self.findings)


def check_integrity(
    store: JobStore, spool: Spool, *, repair: bool = False, digests: bool = True, young_seconds: float = YOUNG_SECONDS
) -> IntegrityReport:
    """Compare every row with its file and every file with its row.

    Args:
        store: of the node.
        spool: of the node.
        repair: take up received files that no row names, count anew, remove leftovers. Nothing that was received is
            ever removed.
        digests: read every byte; False compares sizes only.
        young_seconds: younger files are left alone.

    Raises:
        StoreUnavailable: the job store does not answer.
    """
    check = _Check(store, spool, repair, digests, young_seconds)
    findings = list(check.run())
    return IntegrityReport(check.studies, check.files, check.size_bytes, tuple(findings))


class _Check:
    def __init__(self, store: JobStore, spool: Spool, repair: bool, digests: bool, young_seconds: float) -> None:
        self._store, self._spool = store, spool
        self._repair, self._digests, self._young_seconds = repair, digests, young_seconds
        self.studies = self.files = self.size_bytes = 0

    def run(self) -> Iterator[IntegrityFinding]:
        for detail in self._store.damage():
            yield IntegrityFinding(Problem.DATABASE, detail)
        known_folders: set[Path] = set()
        miscounted = False
        for study in self._store.inventory():
            self.studies += 1
            known_folders |= {self._spool.study_folder(area.value, study.study_instance_uid) for area in Area}
            yield from self._study(study)
            miscounted |= self._is_miscounted(study)
        for area in Area:
            for folder in self._spool.study_folders(area.value):
                if folder not in known_folders:
                    for path in _files_below(folder):
                        yield from self._stray(area, path, None)
        yield from self._counts(miscounted)
        for leftover in self._spool.leftovers():
            yield IntegrityFinding(Problem.LEFTOVER, str(leftover), repaired=self._repair)
        if self._repair:
            self._spool.remove_leftovers()

    def _study(self, study: StudyInventory) -> Iterator[IntegrityFinding]:
        uid = study.study_instance_uid
        if study.going:
            yield IntegrityFinding(Problem.REMOVAL_UNFINISHED, "files of this study are being removed", uid)
            return
        for entry in study.files:
            problem = self._file(entry)
            if problem is not None and self._still_named(uid, entry):
                yield IntegrityFinding(problem, f"{entry.sop_instance_uid} at {entry.path}", uid)
        named = {entry.path for entry in study.files}
        for area in Area:
            for path in _files_below(self._spool.study_folder(area.value, uid)):
                if path not in named:
                    yield from self._stray(area, path, study)

    def _file(self, entry: KnownFile) -> Problem | None:
        self.files += 1
        self.size_bytes += entry.size_bytes
        try:
            if entry.path.stat().st_size != entry.size_bytes:
                return Problem.FILE_CHANGED
            if self._digests and _sha256(entry.path) != entry.sha256:
                return Problem.FILE_CHANGED
        except FileNotFoundError:
            return Problem.FILE_MISSING
        except OSError:
            return Problem.FILE_UNREADABLE
        return None

    def _still_named(self, study_instance_uid: str, entry: KnownFile) -> bool:
        # retention or a new header may have come in between
        now = self._store.inventory_of(study_instance_uid)
        return entry.area is Area.QUARANTINE or (now is not None and not now.going and entry in now.files)

    def _stray(self, area: Area, path: Path, study: StudyInventory | None) -> Iterator[IntegrityFinding]:
        uid = None if study is None else study.study_instance_uid
        try:
            young = time.time() - path.stat().st_mtime < self._young_seconds
        except FileNotFoundError:
            return
        if young or (study is not None and self._is_named_now(study.study_instance_uid, path)):
            return
        if area is not Area.RECEIVED:
            yield IntegrityFinding(Problem.REPORT_UNUSED, str(path), uid)
        elif study is not None and any(
            entry.area is Area.RECEIVED and is_same_instance(entry.path, path) for entry in study.files
        ):
            yield IntegrityFinding(Problem.SUPERSEDED, str(path), uid)
        else:
            yield self._row_missing(path, uid)

    def _is_named_now(self, study_instance_uid: str, path: Path) -> bool:
        now = self._store.inventory_of(study_instance_uid)
        return now is not None and (now.going or any(entry.path == path for entry in now.files))

    def _row_missing(self, path: Path, uid: str | None) -> IntegrityFinding:
        try:
            if not self._repair:
                return IntegrityFinding(Problem.ROW_MISSING, str(path), read_filed(path).identifiers.study_instance_uid)
            found = take_up(self._store, self._spool, path)
        except (NotDicom, OSError) as error:
            return IntegrityFinding(Problem.FILE_UNREADABLE, f"{path}: {error}", uid)
        repaired = found.outcome in (RecordOutcome.STORED, RecordOutcome.DUPLICATE)
        return IntegrityFinding(Problem.ROW_MISSING, str(path), found.study_instance_uid, repaired=repaired)

    @staticmethod
    def _is_miscounted(study: StudyInventory) -> bool:
        instances = sum(entry.area is Area.RECEIVED for entry in study.files)
        return not study.going and study.counted_instances != instances

    def _counts(self, miscounted: bool) -> Iterator[IntegrityFinding]:
        details = [f"{state}: {counted}, true {true}" for state, (counted, true) in self._store.wrong_counts().items()]
        if miscounted:
            details.append("instances of a study")
        if details and self._repair:
            self._store.recount()
        for detail in details:
            yield IntegrityFinding(Problem.COUNT_WRONG, detail, repaired=self._repair)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
