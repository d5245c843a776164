"""Pulls as rows and as values: what was asked of an archive, and what became of each study that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime


class PullState(StrEnum):
    """Where a pull stands."""

    SEARCHING = "SEARCHING"  # not all that the archive has is known yet
    FETCHING = "FETCHING"  # every study is known; some are still wanted
    DONE = "DONE"  # nothing more is wanted; some studies may have failed
    CANCELLED = "CANCELLED"  # by hand; what was fetched stays


class PulledState(StrEnum):
    """What became of one study of a pull."""

    WANTED = "WANTED"
    FETCHED = "FETCHED"  # every object that was asked for is stored here
    PRESENT = "PRESENT"  # nothing had to be fetched: all is here, or was screened before
    SKIPPED = "SKIPPED"  # it has no series of those that are wanted
    FAILED = "FAILED"  # attempts spent, or refused for good; the reason stands beside


class PullRow(Base):
    """One pull; its criteria hold no patient's identity: lists of patients are never kept."""

    __tablename__ = "pulls"

    pull_id: Mapped[int] = mapped_column(primary_key=True)
    archive: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16))
    criteria: Mapped[dict[str, Any]] = mapped_column(JSON)
    detail: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class PulledStudyRow(Base):
    """One study that a pull found."""

    __tablename__ = "pulled_studies"
    __table_args__ = (Index(None, "pull_id", "state", "position"),)

    pull_id: Mapped[int] = mapped_column(ForeignKey("pulls.pull_id"), primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int]  # in the order in which they were found
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    instances: Mapped[int]  # fetched by this pull
    detail: Mapped[str | None] = mapped_column(Text)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull as it stands."""

    pull_id: int
    archive: str
    state: PullState
    criteria: dict[str, Any]
    detail: str | None
    created_at: datetime
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class PulledStudy:
    """One study of a pull."""

    study_instance_uid: str
    state: PulledState
    attempts: int
    not_before: datetime | None
    instances: int
    detail: str | None


@dataclass(frozen=True, slots=True)
class StudyHere:
    """What this node has of a study.

    Attributes:
        stored: SOP Instance UIDs of received objects that are here, each with its series.
        own: those of our results, whether their files are still here or not.
        quarantined: those of which other pixels are stored under the same UID.
        removed: its images were here, were screened, and went by retention or by hand.
    """

    stored: Mapping[str, str]
    own: frozenset[str]
    quarantined: frozenset[str]
    removed: bool

    def count(self, series_instance_uid: str) -> int:
        """How many objects of a series are here."""
        return sum(series == series_instance_uid for series in self.stored.values())
