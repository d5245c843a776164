"""Where the store is, what is kept and for how long, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from osteo_daemon.sections.values import AETitle, Seconds, Section

POSTGRESQL = "postgresql+pg8000"


class StoreSettings(Section):
    """Where the job store is: a SQLite file below ``state_dir`` unless ``url`` names a PostgreSQL database."""

    url: str = ""
    password_file: Path | None = None
    password: SecretStr | None = None

    @model_validator(mode="after")
    def _no_password_in_url(self) -> StoreSettings:
        # a validator of the section, not of the key: its error must not quote the URL
        parts = urlsplit(self.url)
        if self.url and parts.scheme not in ("postgresql", POSTGRESQL):
            raise ValueError("url: postgresql://USER@HOST:PORT/DATABASE, or empty for SQLite")
        if parts.password is not None:
            raise ValueError("url: no password in it, please: password_file, or the variable OSTEO_STORE__PASSWORD")
        return self


class RetentionSettings(Section):
    """When files and rows of finished studies go; 0 days: never."""

    images_days: float = Field(default=30, ge=0)
    excluded_days: float | None = Field(default=None, ge=0)
    reports_days: float = Field(default=0, ge=0)
    quarantine_days: float = Field(default=90, ge=0)
    events_days: float = Field(default=0, ge=0)
    sweep_seconds: Seconds = 3600


class KeepSettings(Section):
    """AE titles whose studies are kept whatever ``[retention]`` says."""

    sources: tuple[AETitle, ...] = ()


class BackupSettings(Section):
    """Backups by the scheduler; without a folder there are none."""

    folder: Path | None = None
    every_hours: Annotated[float, Field(gt=0)] = 24
    keep: int = Field(default=7, ge=1)
    spool: bool = False


class AuditSettings(Section):
    """Audit messages of DICOM (PS3.15 A.5), kept until an audit repository has them; without a host they stay here."""

    enabled: bool = False
    host: str = ""
    port: Annotated[int, Field(ge=1, le=65535)] = 6514
    transport: Literal["tls", "udp"] = "tls"
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    timeout_seconds: Seconds = 10
    spool_maximum_bytes: int = Field(default=200 * 1000**2, ge=100_000)
    source_id: str = ""

    @model_validator(mode="after")
    def _whom_to_believe(self) -> AuditSettings:
        if self.enabled and self.host and self.transport == "tls" and self.ca_file is None:
            raise ValueError("audit.transport tls needs ca_file: who may have signed the repository's certificate")
        return self


class LogSettings(Section):
    """Where log lines go: standard error, as text or JSON."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
