"""The table of refits."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime


class RefitRow(Base):
    """One refit (`osteo_daemon.domain.refit.Refit`)."""

    __tablename__ = "refits"
    __table_args__ = (Index(None, "state", "refit_id"),)

    refit_id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16))
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime)
    requested_by: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    data: Mapped[str | None] = mapped_column(Text)
    labels: Mapped[int]
    attempts: Mapped[int]
    fencing_token: Mapped[int]
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON)
    verdict: Mapped[str | None] = mapped_column(String(16))
    recommended: Mapped[str | None] = mapped_column(String(16))
    versions: Mapped[list[str]] = mapped_column(JSON)
    detail: Mapped[str | None] = mapped_column(Text)
