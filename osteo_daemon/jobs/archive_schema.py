"""Tables of the archive of VOIs: pseudonyms, sealed links, labels. No identity, UID or study date is readable."""

from __future__ import annotations

from datetime import date, datetime

from sqlalchemy import Boolean, Date, Float, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime

_PSEUDONYM = String(32)
_DIGEST = String(64)


class ArchivePatientRow(Base):
    """A patient under a random pseudonym. ``objected``: nothing of this patient is kept, now or later."""

    __tablename__ = "archive_patients"

    patient: Mapped[str] = mapped_column(_PSEUDONYM, primary_key=True)
    patient_key: Mapped[str] = mapped_column(_DIGEST, unique=True)  # keyed digest of the identity
    link: Mapped[bytes] = mapped_column(LargeBinary)  # the identity, sealed
    objected: Mapped[bool] = mapped_column(Boolean, default=False)


class ArchiveEntryRow(Base):
    """One study's VOIs: where their file lies and, sealed, which study it was."""

    __tablename__ = "archive_entries"
    __table_args__ = (Index(None, "archived_on", "entry"),)

    entry: Mapped[str] = mapped_column(_PSEUDONYM, primary_key=True)
    patient: Mapped[str] = mapped_column(ForeignKey("archive_patients.patient"), index=True)
    study_key: Mapped[str] = mapped_column(_DIGEST, unique=True)
    link: Mapped[bytes] = mapped_column(LargeBinary)
    revision: Mapped[int] = mapped_column(Integer)
    archived_on: Mapped[date] = mapped_column(Date)
    file: Mapped[str] = mapped_column(_PSEUDONYM, unique=True)
    size_bytes: Mapped[int] = mapped_column(Integer)
    sha256: Mapped[str] = mapped_column(_DIGEST)
    vertebrae: Mapped[int] = mapped_column(Integer)


class ArchiveImportRow(Base):
    """One imported file of labels."""

    __tablename__ = "archive_imports"

    import_id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(_DIGEST, unique=True)
    imported_at: Mapped[datetime] = mapped_column(UtcDateTime)
    who: Mapped[str] = mapped_column(String(64))
    matched: Mapped[int] = mapped_column(Integer)
    known: Mapped[int] = mapped_column(Integer)
    ambiguous: Mapped[int] = mapped_column(Integer)
    rejected: Mapped[int] = mapped_column(Integer)


class ArchiveLabelRow(Base):
    """What a densitometer measured of one archived vertebra."""

    __tablename__ = "archive_labels"

    entry: Mapped[str] = mapped_column(ForeignKey("archive_entries.entry"), primary_key=True)
    level: Mapped[str] = mapped_column(String(3), primary_key=True)
    bmd_g_cm2: Mapped[float] = mapped_column(Float)
    t_score: Mapped[float | None] = mapped_column(Float)
    maker: Mapped[str] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(String(64))
    days_apart: Mapped[int] = mapped_column(Integer)
    import_id: Mapped[int] = mapped_column(ForeignKey("archive_imports.import_id"), index=True)


class ArchiveStateRow(Base):
    """Fingerprint of the key, and how often something was not archived, by reason."""

    __tablename__ = "archive_state"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    text: Mapped[str] = mapped_column(String(255), default="")
    count: Mapped[int] = mapped_column(Integer, default=0)
