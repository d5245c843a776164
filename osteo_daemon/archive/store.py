"""The archive of VOIs: files under random names, rows that name them, a key that alone can tell whose they are.

A file is written before its row and removed after it: whatever stops in between leaves a file without a row, never a
row without a file, and `VoiArchive.verify` finds the rest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osteo_daemon.archive.key import Identity, LinkKey, key_that_fits
from osteo_daemon.errors import ConfigurationError, Damaged, SpoolFull
from osteo_daemon.jobs.archive_rows import ArchivedEntry, ArchiveRows, NewEntry, new_pseudonym
from osteo_daemon.jobs.spool import sync_folder
from osteo_daemon.settings import Settings

if TYPE_CHECKING:
    # resampling needs scipy: a second and 50 MB that retention does without
    from osteo_daemon.archive.record import StudyVois

SUFFIX: Final = ".safetensors"
_PART: Final = ".part"
_LEFTOVER_SECONDS: Final = 3600.0
_GB: Final = 10**9


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """What the archive holds. ``not_archived`` counts studies by reason since the archive began."""

    studies: int
    patients: int
    vertebrae: int
    labels: int
    labelled_studies: int
    size_bytes: int
    oldest: date | None
    newest: date | None
    not_archived: dict[str, int]


@dataclass(frozen=True, slots=True)
class ArchiveFinding:
    """Something that `VoiArchive.verify` found; ``repaired`` when it now is as it should be."""

    problem: str
    detail: str
    repaired: bool = False


class VoiArchive:
    """The archive of one node.

    Args:
        settings: of the node.
        rows: its job store.
    """

    def __init__(self, settings: Settings, rows: ArchiveRows) -> None:
        self._settings = settings
        self._rows = rows
        self._root = settings.archive_dir
        self._key: LinkKey | None = None

    @property
    def key(self) -> LinkKey:
        """The key, checked against the one that sealed what is there.

        Raises:
            ConfigurationError: it is not there, others may read it, or it is another one.
            StoreUnavailable: the store does not answer.
        """
        if self._key is None:
            path = self._settings.archive.key_file
            if path is None:
                raise ConfigurationError("archive.key_file is not set; osteo archive init makes the key")
            key = key_that_fits(path, self._rows.archive_fingerprint())
            if self._rows.set_archive_fingerprint(key.fingerprint) != key.fingerprint:
                raise ConfigurationError(f"{path} is not the key of this archive; bring back its own")
            self._key = key
        return self._key

    def add(self, study: StudyVois, identity: Identity, revision: int, today: date) -> bool:
        """Keep a study, durably, in the place of its older revisions.

        Returns:
            False when the patient objected or a newer revision is there.

        Raises:
            SpoolFull: the disk is below its low watermark, or the write found no room.
            ConfigurationError: the key cannot be used.
            StoreUnavailable: the store does not answer; nothing is kept.
        """
        key = self.key
        data = study.to_bytes()
        name = new_pseudonym()
        self._write(name, data, today)
        new = NewEntry(
            fingerprint=key.fingerprint,
            study_key=identity.study_key(key),
            patient_key=identity.patient_key(key),
            revision=revision,
            archived_on=today,
            file=name,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            vertebrae=len(study.vertebrae),
            seal=lambda entry: key.seal(entry, identity.study),
            seal_patient=lambda patient: key.seal(patient, identity.patient),
        )
        try:
            old = self._rows.keep_entry(new)
        except ConfigurationError:
            self._key = None  # the next study asks for the key anew
            self._remove([name])
            raise
        if old is not None:
            self._remove([old])
        return old != name

    def entries(self) -> list[ArchivedEntry]:
        """Every entry, oldest first."""
        return self._rows.archive_entries()

    def read(self, entry: ArchivedEntry) -> StudyVois:
        """One study's VOIs.

        Raises:
            Damaged: its file is missing or has changed.
        """
        try:
            data = self._path(entry.file).read_bytes()
        except OSError as error:
            raise Damaged(f"the archive's file of {entry.entry} cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise Damaged(f"the archive's file of {entry.entry} has changed since it was written")
        from osteo_daemon.archive.record import StudyVois

        return StudyVois.from_bytes(data)

    def identities(self) -> Iterator[tuple[ArchivedEntry, Identity]]:
        """Every entry with whose it is.

        Raises:
            ConfigurationError: the key cannot be used.
            Damaged: a link does not open.
        """
        key = self.key
        for entry in self.entries():
            patient = key.open(entry.patient, entry.patient_link)
            yield entry, Identity.of(patient, key.open(entry.entry, entry.link))

    def forget_patient(self, patient_id: str, issuer: str | None, *, objects: bool) -> int:
        """Remove everything of a patient: VOIs, labels and links.

        Args:
            patient_id: as in the images.
            issuer: of that ID; None forgets it whoever issued it.
            objects: keep a digest and a sealed link by which later studies are refused.

        Returns:
            How many studies went.
        """
        found = [
            (entry, identity)
            for entry, identity in self.identities()
            if identity.patient_id == patient_id and issuer in (None, identity.issuer)
        ]
        self._remove(self._rows.drop_entries(entry.entry for entry, _ in found))
        if objects:
            if not found:
                raise Damaged("nothing of this patient is archived; an objection is kept by what is known from a study")
            for identity in {identity.patient_key(self.key): identity for _, identity in found}.values():
                self._rows.object_patient(identity.patient_key(self.key), _sealer(self.key, identity))
        return len(found)

    def forget_study(self, accession: str) -> int:
        """Remove what is kept of studies with this accession number; returns how many."""
        found = [entry.entry for entry, identity in self.identities() if accession and identity.accession == accession]
        self._remove(self._rows.drop_entries(found))
        return len(found)

    def retain(self, now: datetime) -> dict[str, int]:
        """Remove what is too old or too much, and files without rows; counts by reason. Needs no key."""
        keep = self._settings.archive
        gone = {"too old": 0, "beyond maximum_gb": 0, "leftovers": 0}
        entries = self.entries()
        old = [
            entry
            for entry in entries
            if (days := keep.labelled_retention_days if entry.labels else keep.retention_days)
            and entry.archived_on < (now - timedelta(days=days)).date()
        ]
        gone["too old"] = self._drop(old)
        going = {entry.entry for entry in old}
        left = [entry for entry in entries if entry.entry not in going]
        size = sum(entry.size_bytes for entry in left)
        beyond = []
        for entry in sorted(left, key=lambda each: bool(each.labels)):
            if size <= keep.maximum_gb * _GB:
                break
            beyond.append(entry)
            size -= entry.size_bytes
        gone["beyond maximum_gb"] = self._drop(beyond)
        gone["leftovers"] = len(self._clear(list(self._leftovers())))
        return gone

    def verify(self, *, repair: bool = False, digests: bool = True) -> list[ArchiveFinding]:
        """Compare rows with files and try the links, where the key is at hand.

        Args:
            repair: forget rows whose file is missing or changed, remove files without rows.
            digests: read every byte.
        """
        findings, broken = [], []
        for entry in self.entries():
            problem = self._problem(entry, digests)
            if problem is not None and entry in self.entries():  # retention may have been quicker
                findings.append(ArchiveFinding(problem, entry.entry, repair))
                broken.append(entry)
        leftovers = list(self._leftovers())
        findings += [ArchiveFinding("leftover", path.name, repair) for path in leftovers]
        if repair:
            self._drop(broken)
            self._clear(leftovers)
        if self._settings.archive.key_file is not None:
            try:
                for _ in self.identities():
                    pass
            except (ConfigurationError, Damaged) as error:
                findings.append(ArchiveFinding("link_unreadable", error.detail))
        return findings

    def status(self) -> ArchiveStatus:
        """What there is; needs no key."""
        entries = self.entries()
        return ArchiveStatus(
            studies=len(entries),
            patients=len({entry.patient for entry in entries}),
            vertebrae=sum(entry.vertebrae for entry in entries),
            labels=sum(entry.labels for entry in entries),
            labelled_studies=sum(bool(entry.labels) for entry in entries),
            size_bytes=sum(entry.size_bytes for entry in entries),
            oldest=min((entry.archived_on for entry in entries), default=None),
            newest=max((entry.archived_on for entry in entries), default=None),
            not_archived=self._rows.not_archived(),
        )

    def rotate(self, new: LinkKey) -> int:
        """Seal every link with another key, in one transaction; returns how many there were."""
        old = self.key

        def patient(pseudonym: str, link: bytes) -> tuple[str, bytes]:
            identity = Identity.of(old.open(pseudonym, link), {})
            return identity.patient_key(new), new.seal(pseudonym, identity.patient)

        def entry(pseudonym: str, link: bytes) -> tuple[str, bytes]:
            identity = Identity.of({}, old.open(pseudonym, link))
            return identity.study_key(new), new.seal(pseudonym, identity.study)

        count = self._rows.reseal(new.fingerprint, patient, entry)
        self._key = new
        return count

    def _write(self, name: str, data: bytes, today: date) -> None:
        path = self._path(name)
        part = path.with_name(path.name + _PART)
        try:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < self._settings.receiver.low_watermark_bytes + len(data):
                raise SpoolFull("the archive's disk is below receiver.low_free_bytes")
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # the moment of writing would tell which study of the job store it was
            midnight = datetime(today.year, today.month, today.day, tzinfo=UTC).timestamp()
            os.utime(part, (midnight, midnight))
            part.rename(path)
            for folder in (path.parent, self._root):
                sync_folder(folder)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise SpoolFull(f"the archive could not be written ({error.strerror})") from error

    def _problem(self, entry: ArchivedEntry, digests: bool) -> str | None:
        path = self._path(entry.file)
        try:
            if path.stat().st_size != entry.size_bytes:
                return "file_changed"
            if digests:
                self.read(entry)
        except FileNotFoundError:
            return "file_missing"
        except Damaged:
            return "file_changed"
        return None

    def _leftovers(self) -> Iterator[Path]:
        """Files of an hour and more that no row names."""
        # the files first: a row that comes meanwhile names a file that is young
        files = [path for path in self._root.glob("??/*") if path.is_file()]
        named = self._rows.archive_files()
        for path in files:
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_ctime > _LEFTOVER_SECONDS
                if old and path.name.removesuffix(SUFFIX) not in named:
                    yield path

    def _drop(self, entries: list[ArchivedEntry]) -> int:
        self._remove(self._rows.drop_entries(entry.entry for entry in entries))
        return len(entries)

    def _remove(self, names: list[str]) -> None:
        self._clear([self._path(name) for name in names])

    @staticmethod
    def _clear(paths: list[Path]) -> list[Path]:
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            if folder.is_dir():
                sync_folder(folder)
        return paths

    def _path(self, name: str) -> Path:
        return self._root / name[:2] / f"{name}{SUFFIX}"


def _sealer(key: LinkKey, identity: Identity) -> Callable[[str], bytes]:
    return lambda pseudonym: key.seal(pseudonym, identity.patient)
