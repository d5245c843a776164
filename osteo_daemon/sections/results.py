"""How results are sent, and what they say about the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from osteo_daemon.sections.values import Seconds, Section


class DelivererSettings(Section):
    """How results are sent."""

    poll_seconds: Seconds = 1
    lease_seconds: Seconds = 120
    retry_base_seconds: Seconds = 5
    retry_maximum_seconds: Seconds = 3600
    give_up_after_seconds: Seconds = 7 * 24 * 3600
    connect_timeout_seconds: Seconds = 10
    dimse_timeout_seconds: Seconds = 60
    breaker_failures: int = Field(default=3, ge=1)
    probe_maximum_seconds: Seconds = 300
    commitment_linger_seconds: Seconds = 2
    commitment_timeout_seconds: Seconds = 600


class SiteSettings(Section):
    """What the report says about the site."""

    institution: str = ""
    station_name: str = "osteo-daemon"
    device_serial_number: str = "1"
    timezone_offset: Annotated[str, Field(pattern=r"^[+-]\d{4}$")] = "+0000"
    language: Literal["en", "de", "fr", "es", "zh-Hans", "ja"] = "en"
    templates_dir: Path | None = None
    trend: bool = True
