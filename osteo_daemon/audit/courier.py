"""Brings audit messages from the spool to the repository, oldest first, for as long as it takes."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.audit.syslog import TlsTransport, Transport, UdpTransport
from osteo_daemon.audit.trail import audit_dir
from osteo_daemon.domain.study import PeerTls
from osteo_daemon.errors import ConfigurationError, PeerUnavailable
from osteo_daemon.log import get_logger
from osteo_daemon.settings import AuditSettings, Settings

BATCH = 200
_POLL_SECONDS = 2.0
_PAUSE_MAXIMUM_SECONDS = 60.0


class Courier(threading.Thread):
    """One thread; of several on one spool only one works at a time.

    Args:
        spool: what is to be brought.
        transport: to the repository.
        poll_seconds: how often it looks.
    """

    def __init__(self, spool: AuditSpool, transport: Transport, poll_seconds: float = _POLL_SECONDS) -> None:
        super().__init__(name="audit-courier", daemon=True)
        self._spool = spool
        self._transport = transport
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._failures = 0

    def run(self) -> None:
        """Send until `stop`."""
        while not self._stopping.is_set():
            self._stopping.wait(self._step())

    def stop(self) -> None:
        """Send what waits, once more, and end."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        self._failures = 0
        while self._step() == 0.0:
            pass

    def _step(self) -> float:
        """One batch; returns how long to pause: 0 when more may wait."""
        try:
            with self._alone() as alone:
                batch = self._spool.waiting(BATCH) if alone else []
                if not batch:
                    return self._poll_seconds
                self._transport.send([path.read_bytes() for path in batch])
                self._spool.remove(batch)
        except (PeerUnavailable, ConfigurationError, OSError) as error:
            self._failures += 1
            # once when it begins, then seldom
            if self._failures & (self._failures - 1) == 0:
                detail = error.detail if isinstance(error, PeerUnavailable | ConfigurationError) else error.strerror
                get_logger().warning(
                    "audit_not_delivered", error=type(error).__name__, detail=detail, count=self._spool.count()
                )
            return float(min(self._poll_seconds * 2.0**self._failures, _PAUSE_MAXIMUM_SECONDS))
        if self._failures:
            get_logger().info("audit_delivered_again", count=len(batch))
            self._failures = 0
        return 0.0

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        # two schedulers may run on one machine: messages must not go twice, nor out of order
        descriptor = os.open(self._spool.folder / ".courier", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)


def courier_of(settings: Settings) -> Courier | None:
    """A courier as the settings want it, not yet started; None where nothing is to be sent."""
    audit = settings.audit
    if not audit.enabled or not audit.host:
        return None
    return Courier(AuditSpool(audit_dir(settings), audit.spool_maximum_bytes), transport_of(audit))


def transport_of(audit: AuditSettings) -> Transport:
    """The way to the repository."""
    if audit.transport == "udp":
        return UdpTransport(audit.host, audit.port)
    assert audit.ca_file is not None  # noqa: S101 - the settings see to it
    tls = PeerTls(audit.ca_file, audit.certificate_file, audit.key_file, audit.server_name)
    return TlsTransport(audit.host, audit.port, tls, audit.timeout_seconds)
