"""Tables of the registry of bundles: who changed what was deployed, and what candidates said in the shadow."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime


class ModelChangeRow(Base):
    """A change of what is deployed, written before it is made and settled after it."""

    __tablename__ = "model_changes"
    __table_args__ = (Index(None, "name", "change_id"),)

    change_id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    who: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(16))  # of `records.ModelChangeKind`
    name: Mapped[str] = mapped_column(String(64))
    from_version: Mapped[str | None] = mapped_column(String(100))
    from_sha256: Mapped[str | None] = mapped_column(String(64))
    to_version: Mapped[str | None] = mapped_column(String(100))
    to_sha256: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    done: Mapped[bool | None]  # None: begun; a process that was killed leaves it so until the next one looks


class ShadowRow(Base):
    """What a candidate said of a study beside the deployed bundle; it reaches no report."""

    __tablename__ = "shadows"
    __table_args__ = (Index(None, "sha256", "at"),)

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)  # of the candidate
    deployed_sha256: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    seconds: Mapped[float] = mapped_column(Float)
    error: Mapped[str | None] = mapped_column(Text)
    levels: Mapped[dict[str, Any]] = mapped_column(JSON)
