"""The listener's certificates: loaded at the start, loaded again when their files change, watched until they end."""

from __future__ import annotations

import ssl
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from osteo_daemon.certificates import earliest_next_update, read_certificates, whole_days_left
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.log import get_logger
from osteo_daemon.settings import TlsSettings
from osteo_daemon.tls import TlsFiles, server_context

_LOOK_SECONDS: Final = 1.0
_REMIND_SECONDS: Final = 24 * 3600.0

_State = tuple[tuple[int, int, int] | None, ...]


class ListenerTls:
    """The context of new handshakes; connections that are there keep the one they began with.

    New files that do not work leave the old context in place, with an error line, and are tried again when they change.

    Raises:
        ConfigurationError: the files cannot be used.
    """

    def __init__(self, files: TlsFiles, expiry_warning_days: int) -> None:
        self._files = files
        self._warning_days = expiry_warning_days
        self._lock = threading.Lock()
        self._seen = _state(files)
        self._context = server_context(files)
        self._looked = self._reminded = time.monotonic()
        self._remind()

    @property
    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        return self._context

    def refresh(self, *, at_once: bool = False) -> None:
        """Load the files if they have changed; looks once a second at most. ``at_once``: load them now."""
        now = time.monotonic()
        with self._lock:
            if not at_once and now - self._looked < _LOOK_SECONDS:
                return
            self._looked = now
            # before they are read: what changes meanwhile is seen the next time
            state = _state(self._files)
            if at_once or state != self._seen:
                self._seen = state
                self._load()
            elif now - self._reminded >= _REMIND_SECONDS:
                self._remind()

    def _load(self) -> None:
        try:
            self._context = server_context(self._files)
        except ConfigurationError as error:
            get_logger().error("certificates_refused", reason=error.detail, outcome="those of before stay in use")
            return
        own = read_certificates(self._files.certificate_file)[0]
        get_logger().info("certificates_loaded", certificate=own.fingerprint)
        self._remind()

    def _remind(self) -> None:
        self._reminded = time.monotonic()
        for kind, end in expiries(self._files):
            days = whole_days_left(end)
            if days < self._warning_days:
                event = "certificate_expires" if end > datetime.now(UTC) else "certificate_expired"
                get_logger().warning(event, kind=kind, detail=f"{end:%Y-%m-%d %H:%M} UTC", count=days)
        if self._files.key_file.stat().st_mode & 0o044:
            get_logger().warning("key_readable", detail="others than its owner may read the private key file")


def tls_files(settings: TlsSettings) -> TlsFiles | None:
    """The listener's files; None when no TLS port is set."""
    certificate, key, authority = settings.certificate_file, settings.key_file, settings.ca_file
    if not settings.port or certificate is None or key is None or authority is None:
        return None
    return TlsFiles(certificate, key, authority, settings.crl_file)


def expiries(files: TlsFiles) -> list[tuple[str, datetime]]:
    """What ends when: our certificate and those between, the CA's, the revocation lists; UTC.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    ends = [("certificate", entry.not_after) for entry in read_certificates(files.certificate_file)]
    ends += [("ca", entry.not_after) for entry in read_certificates(files.ca_file)]
    if files.crl_file is not None and (update := earliest_next_update(files.crl_file)) is not None:
        ends.append(("crl", update))
    return ends


def _state(files: TlsFiles) -> _State:
    return tuple(_state_of(path) for path in files.paths)


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
