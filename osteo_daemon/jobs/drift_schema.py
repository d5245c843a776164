"""Tables of drift monitoring: one short row for each finished study, and the alarms that were raised."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from osteo_daemon.jobs.schema import Base, UtcDateTime


class ObservationRow(Base):
    """A finished study in numbers and codes; its latest revision, at the time when it ended first."""

    __tablename__ = "observations"
    __table_args__ = (Index(None, "at", "job_id"),)

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    manufacturer: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(64))
    kernel: Mapped[str] = mapped_column(String(16))
    outcome: Mapped[str] = mapped_column(String(64))
    values: Mapped[dict[str, Any]] = mapped_column("observed", JSON)  # the rest of `domain.observation.Observation`


class DriftAlarmRow(Base):
    """An alarm of a drift chart; it stands until ``cleared_at``."""

    __tablename__ = "drift_alarms"

    alarm_id: Mapped[int] = mapped_column(primary_key=True)
    chart: Mapped[str] = mapped_column(String(255), index=True)
    raised_at: Mapped[datetime] = mapped_column(UtcDateTime)
    cleared_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    detail: Mapped[str] = mapped_column(Text)
