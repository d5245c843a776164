"""How studies are fetched from archives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from osteo_daemon.sections.values import Crontab, Hours, Seconds, Section


class PullSettings(Section):
    """How gently studies are fetched; each command may say otherwise."""

    between: Hours = ""
    studies_per_hour: int = Field(default=0, ge=0)
    maximum_waiting: int = Field(default=20, ge=0)
    maximum_attempts: int = Field(default=5, ge=1)
    retry_base_seconds: Seconds = 60
    retry_maximum_seconds: Seconds = 3600
    connect_timeout_seconds: Seconds = 10
    answer_timeout_seconds: Seconds = 300


class NamedPullSettings(Section):
    """A pull that begins by itself: what it asks for, when, and how gently where ``[pull]`` is not meant."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    archive: str
    cron: Crontab | Literal[""] = ""
    every_hours: float = Field(default=0, ge=0)
    days: int = Field(default=3, ge=1)
    modalities: tuple[str, ...] = ("CT",)
    body_parts: tuple[str, ...] = ()
    description: str = ""
    whole_study: bool = False
    limit: int = Field(default=0, ge=0)
    between: Hours | None = None
    studies_per_hour: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _when(self) -> NamedPullSettings:
        if bool(self.cron) == bool(self.every_hours):
            raise ValueError(f"pull {self.name}: either cron or every_hours")
        return self
