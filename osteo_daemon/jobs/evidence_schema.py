"""Tables of what peers announce, how sources send, and what senders were promised to be kept.

As everywhere in the store: UIDs and AE titles, no patient identity.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime

_UID = String(64)
_AE = String(16)


class AnnouncementRow(Base):
    """A list of objects that a peer made or has: a performed procedure step or an availability notification."""

    __tablename__ = "announcements"

    announcement_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # of `domain.announcement.AnnouncementKind`
    source_ae: Mapped[str] = mapped_column(_AE)
    state: Mapped[str] = mapped_column(String(16))  # of `domain.announcement.StepState`
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class AnnouncedStudyRow(Base):
    """A study that an announcement belongs to; one step may serve several."""

    __tablename__ = "announced_studies"

    announcement_uid: Mapped[str] = mapped_column(ForeignKey("announcements.announcement_uid"), primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(_UID, primary_key=True, index=True)


class AnnouncedInstanceRow(Base):
    """One object of an announcement."""

    __tablename__ = "announced_instances"

    announcement_uid: Mapped[str] = mapped_column(ForeignKey("announcements.announcement_uid"), primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    series_instance_uid: Mapped[str] = mapped_column(_UID)
    sop_class_uid: Mapped[str] = mapped_column(_UID)


class SourceGapsRow(Base):
    """The largest gap between two instances of each of a source's last studies, in seconds, the latest last."""

    __tablename__ = "source_gaps"

    source_ae: Mapped[str] = mapped_column(_AE, primary_key=True)
    gaps_seconds: Mapped[list[float]] = mapped_column(JSON)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class CommittedStudyRow(Base):
    """A study of which a sender was told that this node keeps it: nothing removes its images by itself."""

    __tablename__ = "committed_studies"

    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"), primary_key=True)
    requester_ae: Mapped[str] = mapped_column(_AE)
    committed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class CommitmentRequestRow(Base):
    """A sender's storage commitment request (PS3.4 annex J), accepted here and answered by an event report."""

    __tablename__ = "commitment_requests"
    __table_args__ = (Index(None, "state", "not_before"),)

    requester_ae: Mapped[str] = mapped_column(_AE, primary_key=True)
    transaction_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))  # of `records.RequestState`
    items: Mapped[list[list[str]]] = mapped_column(JSON)  # SOP class and SOP instance UID of each
    failures: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # Failure Reason by SOP instance UID
    attempts: Mapped[int]
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    detail: Mapped[str | None] = mapped_column(Text)
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)
