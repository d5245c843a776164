"""The only reader of ``osteo.toml`` and of the environment; every name carries its unit.

A key ``[section] key`` may be overridden by the environment variable ``OSTEO_SECTION__KEY``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import ValidationError, model_validator

from osteo_daemon.errors import ConfigurationError
from osteo_daemon.sections.console import ConsoleSettings
from osteo_daemon.sections.keeping import (
    POSTGRESQL,
    AuditSettings,
    BackupSettings,
    KeepSettings,
    LogSettings,
    RetentionSettings,
    StoreSettings,
)
from osteo_daemon.sections.monitoring import MonitorSettings, NotificationSettings
from osteo_daemon.sections.peers import (
    ArchiveSettings,
    DestinationSettings,
    PeerSettings,
    PeerTlsSettings,
    SourceSettings,
)
from osteo_daemon.sections.pulling import NamedPullSettings, PullSettings
from osteo_daemon.sections.receiving import (
    AccompanyingSettings,
    CommitmentScpSettings,
    CompletenessSettings,
    DicomwebSettings,
    QuotaSettings,
    ReceiverSettings,
    TlsSettings,
)
from osteo_daemon.sections.results import DelivererSettings, SiteSettings
from osteo_daemon.sections.screening import (
    DriftSettings,
    ModelsSettings,
    RefitSettings,
    ScreenerSettings,
    TotalSegmentatorSettings,
    VoiArchiveSettings,
)
from osteo_daemon.sections.values import Section

ENVIRONMENT_PREFIX = "OSTEO_"

# the sections are imported from here: which file one stands in is no business of their users
__all__ = [
    "ENVIRONMENT_PREFIX",
    "AccompanyingSettings",
    "ArchiveSettings",
    "AuditSettings",
    "BackupSettings",
    "CommitmentScpSettings",
    "CompletenessSettings",
    "ConsoleSettings",
    "DelivererSettings",
    "DestinationSettings",
    "DicomwebSettings",
    "DriftSettings",
    "KeepSettings",
    "LogSettings",
    "ModelsSettings",
    "MonitorSettings",
    "NamedPullSettings",
    "NotificationSettings",
    "PeerSettings",
    "PeerTlsSettings",
    "PullSettings",
    "QuotaSettings",
    "ReceiverSettings",
    "RefitSettings",
    "RetentionSettings",
    "ScreenerSettings",
    "Settings",
    "SiteSettings",
    "SourceSettings",
    "StoreSettings",
    "TlsSettings",
    "TotalSegmentatorSettings",
    "VoiArchiveSettings",
    "load_settings",
]


class Settings(Section):
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
    console: ConsoleSettings = ConsoleSettings()
    monitor: MonitorSettings = MonitorSettings()
    notifications: NotificationSettings = NotificationSettings()
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
        return urlunsplit(parts._replace(scheme=POSTGRESQL, netloc=place))

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
