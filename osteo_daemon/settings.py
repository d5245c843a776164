"""The only reader of ``osteo.toml`` and of the environment; every name carries its unit.

A key ``[section] key`` may be overridden by the environment variable ``OSTEO_SECTION__KEY``.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from osteo_daemon.errors import ConfigurationError

ENVIRONMENT_PREFIX = "OSTEO_"
_POSTGRESQL = "postgresql+pg8000"
_AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")


def _ae_title(value: str) -> str:
    # VR AE: at most 16 characters of the default repertoire, no backslash or control character (PS3.5 6.2)
    if not _AE_TITLE.fullmatch(value):
        raise ValueError("an AE title has 1 to 16 printable ASCII characters, no backslash, no space at either end")
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value, strict=False)
    return value


def _crontab(value: str) -> str:
    if len(value.split()) != len(("minute", "hour", "day", "month", "weekday")):
        raise ValueError("minute hour day month weekday, in UTC; weekdays as mon to sun")
    return value


def _certificate_identity(value: str) -> str:
    kind, _, name = value.strip().partition(":")
    if kind == "sha256":
        digest = name.replace(":", "").replace(" ", "").lower()
        if re.fullmatch("[0-9a-f]{64}", digest):
            return f"sha256:{digest}"
    elif kind == "ip":
        return f"ip:{ipaddress.ip_address(name)}"
    elif kind in ("dns", "uri", "cn", "subject") and name:
        return f"dns:{name.lower()}" if kind == "dns" else f"{kind}:{name}"
    raise ValueError("sha256:DIGEST, dns:NAME, ip:ADDRESS, uri:URI, cn:NAME or subject:NAME (RFC 4514)")


def _is_overheard(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


AETitle = Annotated[str, AfterValidator(_ae_title)]
CertificateIdentity = Annotated[str, AfterValidator(_certificate_identity)]
Network = Annotated[str, AfterValidator(_network)]
Hours = Annotated[str, Field(pattern=r"^((?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d)?$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PeerTlsSettings(_Section):
    """How a peer that we connect to is spoken to; files that are not given are those of ``[tls]``."""

    tls: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    certificates: tuple[CertificateIdentity, ...] = ()


class PeerSettings(PeerTlsSettings):
    """Where an application entity listens, and how it is spoken to."""

    ae_title: AETitle
    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)]


class SourceSettings(_Section):
    """A peer that may open associations: its AE title and the addresses or networks it may come from."""

    ae_title: AETitle
    addresses: Annotated[tuple[Network, ...], Field(min_length=1)]
    certificates: tuple[CertificateIdentity, ...] = ()
    tls_required: bool = False
    maximum_associations: int = Field(default=0, ge=0)
    bytes_per_hour: int = Field(default=0, ge=0)
    priority: Literal["stat", "routine", "backfill"] = "routine"
    query: PeerSettings | None = None
    commitment: PeerSettings | None = None


class ReceiverSettings(_Section):
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


class AccompanyingSettings(_Section):
    """What becomes of objects that travel with a CT: kept, or acknowledged and not written."""

    pictures: Literal["keep", "discard"] = "keep"
    documents: Literal["keep", "discard"] = "keep"
    presentations: Literal["keep", "discard"] = "keep"
    segmentations: Literal["keep", "discard"] = "keep"
    radiotherapy: Literal["keep", "discard"] = "keep"
    pet: Literal["keep", "discard"] = "discard"
    raw: Literal["keep", "discard"] = "discard"


class TlsSettings(_Section):
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


class QuotaSettings(_Section):
    """What one sender may take; 0: no limit. An entry of ``[[sources]]`` may set its own."""

    associations_per_ae_title: int = Field(default=40, ge=0)
    associations_per_address: int = Field(default=40, ge=0)
    bytes_per_hour_per_ae_title: int = Field(default=500 * 10**9, ge=0)
    bytes_per_hour_per_address: int = Field(default=500 * 10**9, ge=0)


class CompletenessSettings(_Section):
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


class ScreenerSettings(_Section):
    """The screening worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
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


class TotalSegmentatorSettings(_Section):
    """An installed TotalSegmentator, for ``screener.vertebrae = "totalsegmentator"``."""

    weights_dir: Path | None = None
    fast: bool = False
    timeout_seconds: Seconds = 1800


class DestinationSettings(PeerTlsSettings):
    """A system that gets the results: a PACS, an HL7 interface or a FHIR server."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    kind: Literal["dicom", "dicomweb", "hl7", "fhir"] = "dicom"
    ae_title: AETitle | Literal[""] = ""
    host: str = ""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    objects: tuple[Literal["sr", "seg", "sc", "kos", "pdf"], ...] = ("seg", "sr", "sc")
    sr_class: Literal["comprehensive-3d", "comprehensive", "enhanced", "basic-text"] = "comprehensive-3d"
    commitment: Literal["storage-commitment", "c-find", "none"] = "storage-commitment"
    accept_unproven: bool = False
    report_exclusions: bool = False
    receiving_application: Annotated[str, Field(max_length=180)] = ""
    receiving_facility: Annotated[str, Field(max_length=180)] = ""
    url: Annotated[str, Field(pattern=r"^(https?://[^\s?#]+)?$")] = ""
    token_file: Path | None = None

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> DestinationSettings:
        needed = {
            "dicom": ("ae_title", "host", "port"),
            "dicomweb": ("url",),
            "hl7": ("host", "port"),
            "fhir": ("url",),
        }[self.kind]
        if self.kind == "dicomweb" and self.token_file is not None and _is_overheard(self.url):
            raise ValueError(f"destination {self.name}: a token goes over https only")
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"destination {self.name} of kind {self.kind} needs {', '.join(missing)}")
        if self.report_exclusions and not (self.takes_objects and "sr" in self.objects):
            raise ValueError(f"destination {self.name} takes no structured report; set report_exclusions = false")
        return self

    @property
    def takes_objects(self) -> bool:
        """It gets DICOM objects, whichever way; otherwise a message."""
        return self.kind in ("dicom", "dicomweb")


class DelivererSettings(_Section):
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


class ArchiveSettings(PeerTlsSettings):
    """A system that studies are fetched from by `osteo pull`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    retrieve: Literal["c-move", "c-get", "dicomweb"] = "c-move"
    ae_title: AETitle | Literal[""] = ""
    host: str = ""
    port: Port = 0
    url: Annotated[str, Field(pattern=r"^(https?://[^\s?#]+)?$")] = ""
    token_file: Path | None = None
    maximum_matches: int = Field(default=500, ge=2)

    @model_validator(mode="after")
    def _what_its_way_needs(self) -> ArchiveSettings:
        needed = ("url",) if self.retrieve == "dicomweb" else ("ae_title", "host", "port")
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"archive {self.name} with retrieve = {self.retrieve} needs {', '.join(missing)}")
        if self.token_file is not None and _is_overheard(self.url):
            raise ValueError(f"archive {self.name}: a token goes over https only")
        return self


class VoiArchiveSettings(_Section):
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


class PullSettings(_Section):
    """How gently studies are fetched; each command may say otherwise."""

    between: Hours = ""
    studies_per_hour: int = Field(default=0, ge=0)
    maximum_waiting: int = Field(default=20, ge=0)
    maximum_attempts: int = Field(default=5, ge=1)
    retry_base_seconds: Seconds = 60
    retry_maximum_seconds: Seconds = 3600
    connect_timeout_seconds: Seconds = 10
    answer_timeout_seconds: Seconds = 300


class NamedPullSettings(_Section):
    """A pull that begins by itself: what it asks for, when, and how gently where ``[pull]`` is not meant."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    archive: str
    cron: Annotated[str, AfterValidator(_crontab)] | Literal[""] = ""
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


class DicomwebSettings(_Section):
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


class StoreSettings(_Section):
    """Where the job store is: a SQLite file below ``state_dir`` unless ``url`` names a PostgreSQL database."""

    url: str = ""
    password_file: Path | None = None
    password: SecretStr | None = None

    @model_validator(mode="after")
    def _no_password_in_url(self) -> StoreSettings:
        # a validator of the section, not of the key: its error must not quote the URL
        parts = urlsplit(self.url)
        if self.url and parts.scheme not in ("postgresql", _POSTGRESQL):
            raise ValueError("url: postgresql://USER@HOST:PORT/DATABASE, or empty for SQLite")
        if parts.password is not None:
            raise ValueError("url: no password in it, please: password_file, or the variable OSTEO_STORE__PASSWORD")
        return self


class RetentionSettings(_Section):
    """When files and rows of finished studies go; 0 days: never."""

    images_days: float = Field(default=30, ge=0)
    reports_days: float = Field(default=0, ge=0)
    quarantine_days: float = Field(default=90, ge=0)
    events_days: float = Field(default=0, ge=0)
    sweep_seconds: Seconds = 3600


class KeepSettings(_Section):
    """AE titles whose studies are kept whatever ``[retention]`` says."""

    sources: tuple[AETitle, ...] = ()


class CommitmentScpSettings(_Section):
    """Storage commitment for senders."""

    enabled: bool = False
    poll_seconds: Seconds = 5
    retry_base_seconds: Seconds = 10
    retry_maximum_seconds: Seconds = 3600
    give_up_after_seconds: Seconds = 7 * 24 * 3600


class BackupSettings(_Section):
    """Backups by the scheduler; without a folder there are none."""

    folder: Path | None = None
    every_hours: Annotated[float, Field(gt=0)] = 24
    keep: int = Field(default=7, ge=1)
    spool: bool = False


class ModelsSettings(_Section):
    """The registry of bundles."""

    require_signature: bool = False
    trusted_keys: tuple[Path, ...] = ()
    shadow_seconds: Seconds = 10

    @model_validator(mode="after")
    def _somebody_to_trust(self) -> ModelsSettings:
        if self.require_signature and not self.trusted_keys:
            raise ValueError("require_signature needs trusted_keys")
        return self


class DriftSettings(_Section):
    """Drift monitoring by the scheduler."""

    enabled: bool = True
    cron: Annotated[str, AfterValidator(_crontab)] = "30 5 * * *"
    current_days: float = Field(default=30, gt=0)
    reference_days: float = Field(default=90, gt=0)
    reference_from: date | None = None
    minimum_reference: int = Field(default=300, ge=100)
    minimum_current: int = Field(default=50, ge=50)
    false_alarms_per_year: float = Field(default=1, gt=0)
    keep_reports: int = Field(default=400, ge=1)


class RefitSettings(_Section):
    """Refits of the network channel for this site, by the refitter."""

    enabled: bool = False
    site: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,31})?$")] = ""
    cron: Annotated[str, AfterValidator(_crontab)] = "0 1 * * sun"
    minimum_new_labels: int = Field(default=100, ge=1)
    yield_to_screening: bool = True
    maximum_hours: float = Field(default=12, gt=0)
    replay_file: Path | None = None
    replay_patients: int = Field(default=96, ge=12)
    poll_seconds: Seconds = 1
    lease_seconds: Seconds = 60


class SiteSettings(_Section):
    """What the report says about the site."""

    institution: str = ""
    station_name: str = "osteo-daemon"
    device_serial_number: str = "1"
    timezone_offset: Annotated[str, Field(pattern=r"^[+-]\d{4}$")] = "+0000"
    language: Literal["en", "de", "fr", "es", "zh-Hans", "ja"] = "en"
    templates_dir: Path | None = None
    trend: bool = True


class AuditSettings(_Section):
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


class LogSettings(_Section):
    """Where log lines go: standard error, as text or JSON."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Settings(_Section):
    """All settings of one node."""

    state_dir: Path = Path("/var/lib/osteo-daemon")
    models_dir: Path | None = None
    receiver: ReceiverSettings = ReceiverSettings()
    accompanying: AccompanyingSettings = AccompanyingSettings()
    tls: TlsSettings = TlsSettings()
    quotas: QuotaSettings = QuotaSettings()
    sources: tuple[SourceSettings, ...] = ()
    completeness: CompletenessSettings = CompletenessSettings()
    screener: ScreenerSettings = ScreenerSettings()
    totalsegmentator: TotalSegmentatorSettings = TotalSegmentatorSettings()
    deliverer: DelivererSettings = DelivererSettings()
    destinations: tuple[DestinationSettings, ...] = ()
    archives: tuple[ArchiveSettings, ...] = ()
    archive: VoiArchiveSettings = VoiArchiveSettings()
    pull: PullSettings = PullSettings()
    pulls: tuple[NamedPullSettings, ...] = ()
    dicomweb: DicomwebSettings = DicomwebSettings()
    store: StoreSettings = StoreSettings()
    retention: RetentionSettings = RetentionSettings()
    keep: KeepSettings = KeepSettings()
    commitment_scp: CommitmentScpSettings = CommitmentScpSettings()
    backup: BackupSettings = BackupSettings()
    models: ModelsSettings = ModelsSettings()
    drift: DriftSettings = DriftSettings()
    refit: RefitSettings = RefitSettings()
    site: SiteSettings = SiteSettings()
    audit: AuditSettings = AuditSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _unique_names(self) -> Settings:
        names = [destination.name for destination in self.destinations]
        if len(set(names)) != len(names):
            raise ValueError("two destinations share one name; give each [[destinations]] entry a name of its own")
        if self.dicomweb.port and self.dicomweb.tls != "none":
            missing = [key for key in ("certificate_file", "key_file", "ca_file") if getattr(self.tls, key) is None]
            if missing:
                raise ValueError(f"dicomweb.tls needs {', '.join(missing)} of [tls]")
        archives = [archive.name for archive in self.archives]
        if len(set(archives)) != len(archives):
            raise ValueError("two archives share one name; give each [[archives]] entry a name of its own")
        pulls = [pull.name for pull in self.pulls]
        if len(set(pulls)) != len(pulls):
            raise ValueError("two pulls share one name; give each [[pulls]] entry a name of its own")
        if nowhere := [pull for pull in self.pulls if pull.archive not in archives]:
            raise ValueError(f"pull {nowhere[0].name}: no archive {nowhere[0].archive} among [[archives]]")
        if self.screener.vertebrae == "segmentation" and self.accompanying.segmentations == "discard":
            raise ValueError('screener.vertebrae = "segmentation" needs accompanying.segmentations = "keep"')
        if (key := self.archive.key_file) is not None and key.resolve().is_relative_to(self.archive_dir.resolve()):
            raise ValueError("archive.key_file must not lie in the archive that it protects")
        titles = [source.ae_title for source in self.sources]
        if len(set(titles)) != len(titles):
            raise ValueError("two sources share one ae_title; list all addresses under one [[sources]] entry")
        if strangers := sorted(set(self.keep.sources) - set(titles)):
            raise ValueError(f"keep.sources names {strangers[0]}, which is no ae_title under [[sources]]")
        peers: list[tuple[str, PeerTlsSettings | None]] = [(entry.name, entry) for entry in self.destinations]
        peers += [(entry.name, entry) for entry in self.archives]
        peers += [(f"query of source {source.ae_title}", source.query) for source in self.sources]
        peers += [(f"commitment of source {source.ae_title}", source.commitment) for source in self.sources]
        for name, peer in peers:
            if peer is not None and peer.tls and not (peer.ca_file or self.tls.ca_file):
                raise ValueError(f"{name} with tls = true needs a ca_file, its own or that of [tls]")
        return self

    def document(self) -> dict[str, Any]:
        """As JSON values, for another process of this node: the store's password is in them, so never for a log."""
        values = self.model_dump(mode="json")
        if self.store.password is not None:
            values["store"]["password"] = self.store.password.get_secret_value()
        return values

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the job store; it may hold a password: for the store alone, never for a log.

        Raises:
            ConfigurationError: the password's file can't be read.
        """
        if not self.store.url:
            return f"sqlite:///{self.state_dir / 'jobs.sqlite'}"
        parts = urlsplit(self.store.url)
        password = None if self.store.password is None else self.store.password.get_secret_value()
        if self.store.password_file is not None:
            try:
                password = self.store.password_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"store.password_file cannot be read: {error}") from None
        place = parts.netloc
        if password is not None:
            user, _, host = place.rpartition("@")
            place = f"{user}:{quote(password, safe='')}@{host}"
        return urlunsplit(parts._replace(scheme=_POSTGRESQL, netloc=place))

    @property
    def database_file(self) -> Path | None:
        """The job store's file; None when it is in PostgreSQL."""
        return None if self.store.url else self.state_dir / "jobs.sqlite"

    @property
    def bundles_dir(self) -> Path:
        """Folder of the site's own bundles; a name that isn't there is that of a shipped one."""
        return self.models_dir or self.state_dir / "models"

    @property
    def archive_dir(self) -> Path:
        """Folder of archived VOIs."""
        return self.archive.folder or self.state_dir / "archive"

    @property
    def refits_dir(self) -> Path:
        """Folder of refits: their data sets, what is done so far, and their candidates."""
        return self.state_dir / "refits"

    @property
    def spool_dir(self) -> Path:
        """Folder of received objects and report objects."""
        return self.state_dir / "spool"


def load_settings(path: Path | None, environment: Mapping[str, str] | None = None) -> Settings:
    """Read settings from a TOML file and the environment.

    Args:
        path: the file, or None for defaults and environment alone.
        environment: variables to read instead of the process's own.

    Raises:
        ConfigurationError: the file is missing or not TOML, or a value is wrong; the message names key, value and fix.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigurationError(f"{path} does not exist; see deploy/osteo.example.toml") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{path} is not TOML: {error}") from error
    overridden: dict[str, str] = {}
    for name, value in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _NOT_SETTINGS:
            overridden[_override(document, name, value)] = name
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        where = path or "environment"
        lines = "; ".join(_explain(entry, overridden) for entry in error.errors())
        raise ConfigurationError(f"{where}: {lines}") from error


_NOT_SETTINGS = frozenset({"OSTEO_TEST_DATA", "OSTEO_CONFIG"})


def _override(document: dict[str, Any], name: str, value: str) -> str:
    """Put a variable's value into the document; gives the key as the errors name it."""
    keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigurationError(
                f"{name}: [{key}] is a list and cannot be set from the environment; use osteo.toml"
            )
    table[keys[-1]] = value
    return ".".join(keys)


def _explain(entry: Any, overridden: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in entry["loc"]) or "settings"
    if key in overridden:
        key = f"{key}, set by the variable {overridden[key]},"
    if entry["type"] == "extra_forbidden":
        return f"{key} is not a setting; see deploy/osteo.example.toml"
    shown = entry["input"]
    secret = entry["loc"][-1:] == ("password",)
    value = f" (is {shown!r})" if isinstance(shown, str | int | float | bool) and not secret else ""
    return f"{key}{value}: {entry['msg'].removeprefix('Value error, ')}"
