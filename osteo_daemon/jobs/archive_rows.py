"""The archive's side of the store: rows are the truth, a file without a row is a leftover."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime

from sqlalchemy import Connection, delete, func, insert, select, update

from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.jobs.archive_schema import (
    ArchiveEntryRow,
    ArchiveImportRow,
    ArchiveLabelRow,
    ArchivePatientRow,
    ArchiveStateRow,
)
from osteo_daemon.jobs.database import Database

FINGERPRINT = "key_fingerprint"
_DROPPED = "dropped_"


def new_pseudonym() -> str:
    """128 random bits in hexadecimal: it says nothing of what it stands for."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class ArchivedEntry:
    """One archived study; ``link`` and ``patient_link`` are sealed."""

    entry: str
    patient: str
    revision: int
    archived_on: date
    file: str
    size_bytes: int
    sha256: str
    vertebrae: int
    link: bytes
    patient_link: bytes
    labels: int


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What is to be kept of a study. The keys are keyed digests; ``seal`` and ``seal_patient`` seal for a pseudonym."""

    fingerprint: str
    study_key: str
    patient_key: str
    revision: int
    archived_on: date
    file: str
    size_bytes: int
    sha256: str
    vertebrae: int
    seal: Callable[[str], bytes]
    seal_patient: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Label:
    """A densitometer's reading of one archived vertebra, on the maker's own scale.

    Attributes:
        days_apart: from the CT to the densitometry, negative when that came first.
    """

    entry: str
    level: str
    bmd_g_cm2: float
    t_score: float | None
    maker: str
    model: str
    days_apart: int


@dataclass(frozen=True, slots=True)
class LabelImport:
    """One imported file, by its digest, and what became of its rows."""

    sha256: str
    imported_at: datetime
    who: str
    matched: int
    known: int
    ambiguous: int
    rejected: int


class ArchiveRows(Database):
    """Entries, patients, labels and imports of the archive."""

    def archive_fingerprint(self) -> str | None:
        """Of the key that sealed the links; None before the first."""
        with self._reading() as connection:
            return connection.execute(
                select(ArchiveStateRow.text).where(ArchiveStateRow.name == FINGERPRINT)
            ).scalar_one_or_none()

    def set_archive_fingerprint(self, fingerprint: str) -> str:
        """Remember the first key; returns the fingerprint that stands."""
        with self._writing() as connection:
            self._alone(connection, "archive")
            known = connection.execute(
                select(ArchiveStateRow.text).where(ArchiveStateRow.name == FINGERPRINT)
            ).scalar_one_or_none()
            if known is None:
                connection.execute(insert(ArchiveStateRow).values(name=FINGERPRINT, text=fingerprint, count=0))
            return known or fingerprint

    def count_not_archived(self, reason: str) -> None:
        """One more study that was not archived."""
        with self._writing() as connection:
            self._alone(connection, "archive")
            name = _DROPPED + reason
            more = update(ArchiveStateRow).where(ArchiveStateRow.name == name)
            if connection.execute(more.values(count=ArchiveStateRow.count + 1)).rowcount == 0:
                connection.execute(insert(ArchiveStateRow).values(name=name, text="", count=1))

    def not_archived(self) -> dict[str, int]:
        """Studies that were not archived, by reason."""
        with self._reading() as connection:
            rows = connection.execute(
                select(ArchiveStateRow.name, ArchiveStateRow.count).where(ArchiveStateRow.name.startswith(_DROPPED))
            ).all()
        return {name.removeprefix(_DROPPED): count for name, count in rows}

    def keep_entry(self, new: NewEntry) -> str | None:
        """Keep a study's file, in the place of an older revision's.

        Returns:
            The file that is not needed any more: the older revision's, the given one when a newer revision is there or
            the patient objected, or None.

        Raises:
            ConfigurationError: the archive has got another key than this entry was sealed with.
        """
        with self._writing() as connection:
            self._alone(connection, "archive")
            sealed_with = select(ArchiveStateRow.text).where(ArchiveStateRow.name == FINGERPRINT)
            if connection.execute(sealed_with).scalar_one_or_none() != new.fingerprint:
                raise ConfigurationError("the archive's key was exchanged meanwhile")
            patient = connection.execute(
                select(ArchivePatientRow.patient, ArchivePatientRow.objected).where(
                    ArchivePatientRow.patient_key == new.patient_key
                )
            ).one_or_none()
            if patient is not None and patient.objected:
                return new.file
            known = connection.execute(
                select(
                    ArchiveEntryRow.entry, ArchiveEntryRow.file, ArchiveEntryRow.revision, ArchiveEntryRow.patient
                ).where(ArchiveEntryRow.study_key == new.study_key)
            ).one_or_none()
            if known is not None and known.revision > new.revision:
                return new.file
            pseudonym = new_pseudonym() if patient is None else str(patient.patient)
            if patient is None:
                connection.execute(
                    insert(ArchivePatientRow).values(
                        patient=pseudonym,
                        patient_key=new.patient_key,
                        link=new.seal_patient(pseudonym),
                        objected=False,
                    )
                )
            entry = new_pseudonym() if known is None else str(known.entry)
            values = {
                "patient": pseudonym,
                "link": new.seal(entry),
                "revision": new.revision,
                "archived_on": new.archived_on,
                "file": new.file,
                "size_bytes": new.size_bytes,
                "sha256": new.sha256,
                "vertebrae": new.vertebrae,
            }
            if known is None:
                connection.execute(insert(ArchiveEntryRow).values(entry=entry, study_key=new.study_key, **values))
                return None
            connection.execute(update(ArchiveEntryRow).where(ArchiveEntryRow.entry == entry).values(**values))
            if known.patient != pseudonym:
                # a corrected identity: labels were matched to somebody else's
                connection.execute(delete(ArchiveLabelRow).where(ArchiveLabelRow.entry == entry))
                _drop_empty_patients(connection)
            return str(known.file)

    def archive_entries(self) -> list[ArchivedEntry]:
        """Every entry, oldest first."""
        labels = select(ArchiveLabelRow.entry, func.count().label("labels")).group_by(ArchiveLabelRow.entry).subquery()
        query = (
            select(
                *[column for column in ArchiveEntryRow.__table__.columns if column.name != "study_key"],
                ArchivePatientRow.link.label("patient_link"),
                func.coalesce(labels.c.labels, 0).label("labels"),
            )
            .join(ArchivePatientRow, ArchivePatientRow.patient == ArchiveEntryRow.patient)
            .outerjoin(labels, labels.c.entry == ArchiveEntryRow.entry)
            .order_by(ArchiveEntryRow.archived_on, ArchiveEntryRow.entry)
        )
        with self._reading() as connection:
            return [ArchivedEntry(**row._mapping) for row in connection.execute(query)]

    def archive_files(self) -> set[str]:
        """Names of every file that a row names."""
        with self._reading() as connection:
            return set(connection.execute(select(ArchiveEntryRow.file)).scalars())

    def drop_entries(self, entries: Iterable[str]) -> list[str]:
        """Forget entries with their labels, and patients who have none left; returns the files to remove."""
        files = []
        with self._writing() as connection:
            self._alone(connection, "archive")
            for entry in entries:
                here = ArchiveEntryRow.entry == entry
                file = connection.execute(select(ArchiveEntryRow.file).where(here)).scalar_one_or_none()
                if file is not None:
                    connection.execute(delete(ArchiveLabelRow).where(ArchiveLabelRow.entry == entry))
                    connection.execute(delete(ArchiveEntryRow).where(here))
                    files.append(file)
            _drop_empty_patients(connection)
        return files

    def object_patient(self, patient_key: str, seal_patient: Callable[[str], bytes]) -> None:
        """Nothing more of this patient is kept; call `drop_entries` for what there is first."""
        with self._writing() as connection:
            self._alone(connection, "archive")
            here = ArchivePatientRow.patient_key == patient_key
            if connection.execute(update(ArchivePatientRow).where(here).values(objected=True)).rowcount == 0:
                pseudonym = new_pseudonym()
                connection.execute(
                    insert(ArchivePatientRow).values(
                        patient=pseudonym,
                        patient_key=patient_key,
                        link=seal_patient(pseudonym),
                        objected=True,
                    )
                )

    def reseal(
        self,
        fingerprint: str,
        patient: Callable[[str, bytes], tuple[str, bytes]],
        entry: Callable[[str, bytes], tuple[str, bytes]],
    ) -> int:
        """Seal every link anew, in one transaction.

        Args:
            fingerprint: of the new key.
            patient, entry: from a pseudonym and its sealed link to the new keyed digest and the new sealed link.
        """
        with self._writing() as connection:
            self._alone(connection, "archive")
            count = 0
            people = connection.execute(select(ArchivePatientRow.patient, ArchivePatientRow.link)).all()
            for name, link in people:
                key, sealed = patient(name, link)
                connection.execute(
                    update(ArchivePatientRow)
                    .where(ArchivePatientRow.patient == name)
                    .values(patient_key=key, link=sealed)
                )
                count += 1
            for name, link in connection.execute(select(ArchiveEntryRow.entry, ArchiveEntryRow.link)).all():
                key, sealed = entry(name, link)
                connection.execute(
                    update(ArchiveEntryRow).where(ArchiveEntryRow.entry == name).values(study_key=key, link=sealed)
                )
                count += 1
            connection.execute(
                update(ArchiveStateRow).where(ArchiveStateRow.name == FINGERPRINT).values(text=fingerprint)
            )
        return count

    def archive_labels(self) -> list[Label]:
        """Every label, by entry and level."""
        query = select(ArchiveLabelRow.__table__).order_by(ArchiveLabelRow.entry, ArchiveLabelRow.level)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [
            Label(row.entry, row.level, row.bmd_g_cm2, row.t_score, row.maker, row.model, row.days_apart)
            for row in rows
        ]

    def label_imports(self) -> list[tuple[int, LabelImport]]:
        """Every import with its number, oldest first."""
        query = select(ArchiveImportRow.__table__).order_by(ArchiveImportRow.import_id)
        with self._reading() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        return [(row.pop("import_id"), LabelImport(**row)) for row in rows]

    def add_labels(self, done: LabelImport, labels: Sequence[Label]) -> int | None:
        """Write an import and its labels, all or nothing.

        Returns:
            The import's number; None when this file was imported before.

        Raises:
            Damaged: the archive changed meanwhile: a vertebra has got another label, or an entry has gone.
        """
        with self._writing() as connection:
            self._alone(connection, "archive")
            before = select(ArchiveImportRow.import_id).where(ArchiveImportRow.sha256 == done.sha256)
            if connection.execute(before).first() is not None:
                return None
            made = connection.execute(
                insert(ArchiveImportRow).values(**asdict(done)).returning(ArchiveImportRow.import_id)
            ).scalar_one()
            for label in labels:
                entry = select(ArchiveEntryRow.entry).where(ArchiveEntryRow.entry == label.entry)
                other = select(ArchiveLabelRow.entry).where(
                    ArchiveLabelRow.entry == label.entry, ArchiveLabelRow.level == label.level
                )
                if connection.execute(entry).first() is None or connection.execute(other).first() is not None:
                    raise Damaged("the archive changed during the import and nothing was imported; do it again")
                connection.execute(insert(ArchiveLabelRow).values(import_id=made, **asdict(label)))
        return int(made)

    def drop_import(self, import_id: int) -> int:
        """Forget an import and its labels; returns how many labels went."""
        with self._writing() as connection:
            self._alone(connection, "archive")
            gone = connection.execute(delete(ArchiveLabelRow).where(ArchiveLabelRow.import_id == import_id)).rowcount
            known = connection.execute(delete(ArchiveImportRow).where(ArchiveImportRow.import_id == import_id)).rowcount
        if not known:
            raise Damaged(f"there is no import {import_id}; see osteo labels status")
        return gone


def _drop_empty_patients(connection: Connection) -> None:
    used = select(ArchiveEntryRow.patient)
    connection.execute(
        delete(ArchivePatientRow).where(ArchivePatientRow.patient.not_in(used), ArchivePatientRow.objected.is_(False))
    )
