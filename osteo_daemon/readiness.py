"""``osteo check``: is this node ready to serve?"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from osteo_daemon.archive.key import read_key
from osteo_daemon.audit.courier import transport_of
from osteo_daemon.certificates import read_certificates, whole_days_left
from osteo_daemon.delivery.transport import TRANSPORTS, remote_ae
from osteo_daemon.dicom.tls import expiries, tls_files
from osteo_daemon.dicom.verification import echo
from osteo_daemon.dicomweb_receiver import read_token
from osteo_daemon.errors import ConfigurationError, OsteoError
from osteo_daemon.inference.screening import choose_device
from osteo_daemon.inference.signature import find_signed_bundle
from osteo_daemon.inference.totalsegmentator import TotalSegmentator
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.archive import open_archive
from osteo_daemon.reporting import picture_language
from osteo_daemon.settings import ArchiveSettings, DestinationSettings, Settings
from osteo_daemon.tls import server_context


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; ``detail`` says what was seen or what to do."""

    name: str
    ok: bool
    detail: str


def check_node(settings: Settings) -> list[Finding]:
    """Check folders, disk, job store, bundles, device, sources and every destination; nothing is changed.

    A folder that isn't there yet is created on the first start; here its nearest parent must be writable.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("state folder", lambda: _writable(settings.state_dir)),
        ("disk", lambda: _disk(settings)),
        ("job store", lambda: _store(settings)),
        ("sources", lambda: _sources(settings)),
        ("certificates", lambda: _certificates(settings)),
        ("texts", lambda: _texts(settings)),
        ("localizer bundle", lambda: _bundle(settings, settings.screener.localizer_bundle)),
    ]
    if settings.screener.vertebrae == "totalsegmentator":
        checks.append(("totalsegmentator", lambda: _totalsegmentator(settings)))
    if settings.screener.network_enabled:
        checks.append(("network bundle", lambda: _bundle(settings, settings.screener.network_bundle)))
    checks.append(("device", lambda: str(choose_device(settings.screener.device))))
    if settings.audit.enabled and settings.audit.host:
        checks.append(("audit repository", lambda: _audit_repository(settings)))
    if settings.archive.enabled and (key_file := settings.archive.key_file) is not None:
        checks.append(("archive of VOIs", lambda: _voi_archive(settings, key_file)))
    if not settings.destinations:
        checks.append(("destinations", _no_destination))
    for destination in settings.destinations:
        checks.append((f"destination {destination.name}", lambda d=destination: _echo(settings, d)))  # type: ignore[misc]
    for archive in settings.archives:
        checks.append((f"archive {archive.name}", lambda a=archive: _archive(settings, a)))  # type: ignore[misc]
    if settings.dicomweb.port and settings.dicomweb.token_file is not None:
        checks.append(("dicomweb token", lambda: _token(settings)))
    return [_run(name, probe) for name, probe in checks]


def _archive(settings: Settings, archive: ArchiveSettings) -> str:
    start = time.perf_counter()
    with open_archive(settings, archive, threading.Event()).catalogue() as catalogue:
        catalogue.series("1.2.3")  # a question that costs it nothing
    return f"{archive.retrieve}: answered a query in {(time.perf_counter() - start) * 1000:.0f} ms"


def _token(settings: Settings) -> str:
    assert settings.dicomweb.token_file is not None  # noqa: S101 - asked only then
    read_token(settings.dicomweb.token_file)
    return "usable"


def _run(name: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, probe())
    except (OsteoError, OSError) as error:
        return Finding(name, False, str(error))


def _writable(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"osteo")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ConfigurationError(
            f"state_dir {folder} cannot be used ({error.strerror}); set a folder that this user may write"
        ) from error
    return f"{folder} is writable" if existing == folder else f"{folder} will be created in {existing}"


def _disk(settings: Settings) -> str:
    existing = next(parent for parent in (settings.spool_dir, *settings.spool_dir.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed = settings.receiver.minimum_free_bytes
    if free < needed:
        raise OSError(
            f"{free / 1e9:.1f} GB free, receiver.minimum_free_bytes asks for {needed / 1e9:.1f} GB: make room"
        )
    return f"{free / 1e9:.1f} GB free"


def _store(settings: Settings) -> str:
    if settings.database_file is not None and not settings.database_file.exists():
        _writable(settings.state_dir)
        return "will be created on the first start"
    counts = JobStore(settings.database_url).counts_by_state()
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "empty"


def _voi_archive(settings: Settings, key_file: Path) -> str:
    where = _writable(settings.archive_dir)
    key = read_key(key_file)
    if settings.database_file is None or settings.database_file.exists():
        began_with = JobStore(settings.database_url).archive_fingerprint()
        if began_with not in (None, key.fingerprint):
            raise ConfigurationError(f"{key_file} is not the key of this archive; bring back its own")
    return where


def _audit_repository(settings: Settings) -> str:
    audit = settings.audit
    start = time.perf_counter()
    transport_of(audit).send([])
    taken = (time.perf_counter() - start) * 1000
    where = f"{audit.host}:{audit.port}"
    return f"{where} answered in {taken:.0f} ms" if audit.transport == "tls" else f"{where}, by datagrams: unproven"


def _sources(settings: Settings) -> str:
    if not settings.sources:
        raise OSError("no [[sources]] entry: every sender will be refused; add the AE title and address of your PACS")
    return ", ".join(source.ae_title for source in settings.sources)


def _certificates(settings: Settings) -> str:
    files = tls_files(settings.tls)
    if files is None:
        return "no TLS port"
    server_context(files)
    now = datetime.now(UTC)
    for entry in read_certificates(files.certificate_file):
        if error := entry.validity_error(now):
            raise ConfigurationError(f"{files.certificate_file} {error}: renew it")
    kind, end = min(expiries(files), key=lambda entry: entry[1])
    if end <= now:
        raise ConfigurationError(f"{kind} ended on {end:%Y-%m-%d}: nobody can come in over TLS")
    if not any(source.certificates for source in settings.sources):
        raise ConfigurationError("no [[sources]] entry lists certificates: nobody can come in over TLS")
    days = whole_days_left(end)
    soon = ": renew it soon" if days < settings.tls.expiry_warning_days else ""
    return f"the first that ends is the {kind}, in {days} days{soon}"


def _no_destination() -> str:
    raise OSError("no [[destinations]] entry: results stay here; add the PACS that shall get them")


def _bundle(settings: Settings, name: str) -> str:
    bundle = find_signed_bundle(name, settings)
    return f"{bundle.name} {bundle.version} ({bundle.status}), sha256 {bundle.sha256[:12]}, verified"


def _texts(settings: Settings) -> str:
    language, pictures = settings.site.language, picture_language(settings)
    if pictures != language:
        raise OSError(f"no installed font holds the characters of {language}: pictures are in English; install one")
    return f"{language}, complete"


def _probe(settings: Settings, destination: DestinationSettings) -> str:
    start = time.perf_counter()
    TRANSPORTS[destination.kind](settings, destination).probe()
    where = destination.url or f"{destination.host}:{destination.port}"
    return f"{destination.kind} at {where} answered in {(time.perf_counter() - start) * 1000:.0f} ms"


def _totalsegmentator(settings: Settings) -> str:
    device = choose_device(settings.screener.device).type
    model = TotalSegmentator.find(settings.totalsegmentator, device).model
    return f"TotalSegmentator {model.version}, weights sha256 {model.sha256[:12]}"


def _echo(settings: Settings, destination: DestinationSettings) -> str:
    if destination.kind != "dicom":
        return _probe(settings, destination)
    peer = remote_ae(settings, destination)
    seconds = echo(peer, settings.receiver.ae_title, timeout_seconds=settings.deliverer.connect_timeout_seconds)
    return f"{destination.ae_title} at {destination.host}:{destination.port} answered in {seconds * 1000:.0f} ms"
