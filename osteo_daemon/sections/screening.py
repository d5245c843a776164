"""Screening: its worker, its models, their drift and their refits."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from osteo_daemon.sections.values import Crontab, Seconds, Section


class ScreenerSettings(Section):
    """The screening workers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    processes: int = Field(default=1, ge=1)
    localizer_bundle: str = "spine-localizer"
    network_bundle: str = "osteo-moe"
    network_enabled: bool = True
    vertebrae: Literal["network", "segmentation", "totalsegmentator"] = "network"
    lease_seconds: Seconds = 120
    poll_seconds: Seconds = 1
    maximum_attempts: int = Field(default=3, ge=1)
    retry_base_seconds: Seconds = 30
    threads: int = Field(default=0, ge=0)
    wall_clock_seconds: Seconds = 1800
    stop_grace_seconds: Seconds = 15
    prefetch_maximum_bytes: int = Field(default=2 * 1024**3, ge=0)
    cpu_fallback: bool = True

    @model_validator(mode="after")
    def _one_for_each(self) -> ScreenerSettings:
        if self.gpus and (self.device == "cpu" or self.processes > 1):
            raise ValueError('gpus have one process each: not with device = "cpu" or processes')
        return self


class TotalSegmentatorSettings(Section):
    """An installed TotalSegmentator, for ``screener.vertebrae = "totalsegmentator"``."""

    weights_dir: Path | None = None
    fast: bool = False
    timeout_seconds: Seconds = 1800


class ModelsSettings(Section):
    """The registry of bundles."""

    require_signature: bool = False
    trusted_keys: tuple[Path, ...] = ()
    shadow_seconds: Seconds = 10

    @model_validator(mode="after")
    def _somebody_to_trust(self) -> ModelsSettings:
        if self.require_signature and not self.trusted_keys:
            raise ValueError("require_signature needs trusted_keys")
        return self


class DriftSettings(Section):
    """Drift monitoring by the scheduler."""

    enabled: bool = True
    cron: Crontab = "30 5 * * *"
    current_days: float = Field(default=30, gt=0)
    reference_days: float = Field(default=90, gt=0)
    reference_from: date | None = None
    minimum_reference: int = Field(default=300, ge=100)
    minimum_current: int = Field(default=50, ge=50)
    false_alarms_per_year: float = Field(default=1, gt=0)
    keep_reports: int = Field(default=400, ge=1)


class RefitSettings(Section):
    """Refits of the network channel for this site, by the refitter."""

    enabled: bool = False
    site: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,31})?$")] = ""
    cron: Crontab = "0 1 * * sun"
    minimum_new_labels: int = Field(default=100, ge=1)
    yield_to_screening: bool = True
    maximum_hours: float = Field(default=12, gt=0)
    replay_file: Path | None = None
    replay_patients: int = Field(default=96, ge=12)
    poll_seconds: Seconds = 1
    lease_seconds: Seconds = 60


class VoiArchiveSettings(Section):
    """Pseudonymous VOIs kept for refits; off unless the site says on what ground it may."""

    enabled: bool = False
    consent: str = ""
    folder: Path | None = None
    key_file: Path | None = None
    maximum_gb: float = Field(default=50, gt=0)
    retention_days: float = Field(default=730, ge=0)
    labelled_retention_days: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _on_what_ground(self) -> VoiArchiveSettings:
        if self.enabled and not self.consent.strip():
            raise ValueError("archive.enabled needs consent: on what ground VOIs may be kept (a vote, a law)")
        if self.enabled and self.key_file is None:
            raise ValueError("archive.enabled needs a key_file outside the archive: osteo archive init makes it")
        return self
