"""What is received, over which listeners, and when a study is complete."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from osteo_daemon.sections.values import AETitle, CertificateIdentity, Port, Seconds, Section


class ReceiverSettings(Section):
    """The C-STORE listener."""

    ae_title: AETitle = "OSTEO"
    address: str = "127.0.0.1"
    port: Port = 11112
    maximum_associations: int = Field(default=50, ge=1)
    maximum_pdu_bytes: int = Field(default=131072, ge=4096, le=1048576)
    acse_timeout_seconds: Seconds = 30
    dimse_timeout_seconds: Seconds = 60
    network_timeout_seconds: Seconds = 120
    maximum_object_bytes: int = Field(default=2 * 1024**3, ge=1024**2)
    maximum_buffered_bytes: int = Field(default=4 * 1024**3, ge=1024**2)
    minimum_free_bytes: int = Field(default=2 * 1024**3, ge=0)
    low_free_bytes: int = Field(default=0, ge=0)

    @property
    def low_watermark_bytes(self) -> int:
        """Free space below which no new study is begun."""
        return self.low_free_bytes or 2 * self.minimum_free_bytes


class AccompanyingSettings(Section):
    """What becomes of objects that travel with a CT: kept, or acknowledged and not written."""

    pictures: Literal["keep", "discard"] = "keep"
    documents: Literal["keep", "discard"] = "keep"
    presentations: Literal["keep", "discard"] = "keep"
    segmentations: Literal["keep", "discard"] = "keep"
    radiotherapy: Literal["keep", "discard"] = "keep"
    pet: Literal["keep", "discard"] = "discard"
    raw: Literal["keep", "discard"] = "discard"


class TlsSettings(Section):
    """Our certificate, whom we believe, and the TLS listener beside (or instead of) the plain one."""

    port: Port = 0
    only: bool = False
    certificate_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    crl_file: Path | None = None
    expiry_warning_days: Annotated[int, Field(ge=0)] = 30

    @model_validator(mode="after")
    def _what_a_listener_needs(self) -> TlsSettings:
        missing = [key for key in ("certificate_file", "key_file", "ca_file") if getattr(self, key) is None]
        if self.port and missing:
            raise ValueError(f"a TLS port needs {', '.join(missing)}")
        if self.only and not self.port:
            raise ValueError("only = true needs a port")
        return self


class QuotaSettings(Section):
    """What one sender may take; 0: no limit. An entry of ``[[sources]]`` may set its own."""

    associations_per_ae_title: int = Field(default=40, ge=0)
    associations_per_address: int = Field(default=40, ge=0)
    bytes_per_hour_per_ae_title: int = Field(default=500 * 10**9, ge=0)
    bytes_per_hour_per_address: int = Field(default=500 * 10**9, ge=0)


class CompletenessSettings(Section):
    """When a study counts as complete."""

    quiet_seconds: Seconds = 60
    quiet_minimum_seconds: Seconds = 20
    quiet_maximum_seconds: Seconds = 300
    early_quiet_seconds: Seconds = 10
    missing_wait_seconds: Seconds = 900
    series_wait_seconds: Annotated[float, Field(ge=0)] = 300
    sweep_seconds: Seconds = 5
    mpps: bool = True
    ian: bool = True
    query_timeout_seconds: Seconds = 10

    @model_validator(mode="after")
    def _bounds_in_order(self) -> CompletenessSettings:
        if self.quiet_minimum_seconds > self.quiet_maximum_seconds:
            raise ValueError("quiet_minimum_seconds is longer than quiet_maximum_seconds")
        return self


class CommitmentScpSettings(Section):
    """Storage commitment for senders."""

    enabled: bool = False
    poll_seconds: Seconds = 5
    retry_base_seconds: Seconds = 10
    retry_maximum_seconds: Seconds = 3600
    give_up_after_seconds: Seconds = 7 * 24 * 3600


class DicomwebSettings(Section):
    """STOW-RS: objects received over HTTP; off while the port is 0."""

    port: Port = 0
    address: str = "127.0.0.1"
    source: AETitle = "DICOMWEB"
    priority: Literal["stat", "routine", "backfill"] = "routine"
    tls: Literal["none", "server", "mutual"] = "none"
    certificates: tuple[CertificateIdentity, ...] = ()
    token_file: Path | None = None
    maximum_part_bytes: int = Field(default=512 * 1024**2, ge=1024)
    maximum_request_bytes: int = Field(default=8 * 1024**3, ge=1024)
    maximum_requests: int = Field(default=8, ge=1)
    idle_timeout_seconds: Seconds = 30

    @model_validator(mode="after")
    def _nobody_unknown(self) -> DicomwebSettings:
        if not self.port:
            return self
        if self.token_file is None and self.tls != "mutual":
            raise ValueError('dicomweb needs a token_file, or tls = "mutual" for certificates of senders')
        if self.tls == "none" and not ipaddress.ip_address(self.address).is_loopback:
            raise ValueError('dicomweb listens beyond loopback over TLS only: tls = "server" or "mutual"')
        return self
