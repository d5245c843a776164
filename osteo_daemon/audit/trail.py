"""The one place where events are told: ``trail.record(events.study_deleted(...))``.

A process opens the trail once, as it configures its log. Without that, or where the settings turn it off, `record`
does nothing. It never raises: what was done cannot be undone because it could not be told.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osteo_daemon.audit import events
from osteo_daemon.audit.codes import EventType, Outcome
from osteo_daemon.audit.events import Peer
from osteo_daemon.audit.message import AuditMessage, to_xml
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.audit.syslog import syslog_message
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings


class Trail:
    """Writes the events of one process to the audit spool.

    Args:
        spool: where they wait.
        application: name of this process in syslog.
        source_id: names the node in every message.
        site_id: names the institution.
    """

    def __init__(self, spool: AuditSpool, application: str, source_id: str, site_id: str = "") -> None:
        self._spool = spool
        self._application = application
        self._source_id = source_id
        self._site_id = site_id
        self._lock = threading.Lock()
        self._lost = 0

    def record(self, message: AuditMessage) -> None:
        """Keep one event; says so in the log when it cannot, and in the trail when it can again."""
        with self._lock:
            lost = self._lost
        if lost:
            text = f"{lost} audit messages were not recorded since the spool had no room or the disk failed"
            gap = events.security_alert(EventType.AUDIT_RECORDING_STARTED, text, outcome=Outcome.MAJOR_FAILURE)
            if not self._keep(gap):
                self._miss()
                return
            with self._lock:
                self._lost -= lost
        if not self._keep(message):
            self._miss()

    def _keep(self, message: AuditMessage) -> bool:
        xml = to_xml(message, self._source_id, self._site_id)
        try:
            return self._spool.put(syslog_message(xml, message.outcome.value, self._application, message.at))
        except OSError as error:
            get_logger().error("audit_not_written", error=type(error).__name__, detail=error.strerror)
            return False

    def _miss(self) -> None:
        with self._lock:
            self._lost += 1
            count = self._lost
        # the first at once, then at every doubling: loud, and no flood
        if count & (count - 1) == 0:
            get_logger().error("audit_not_recorded", count=count, detail="see [audit] and osteo audit status")


_opened: Trail | None = None
_node = Peer("", "")


def audit_dir(settings: Settings) -> Path:
    """Where the node's audit messages wait."""
    return settings.state_dir / "audit"


def open_trail(settings: Settings, role: str) -> None:
    """Let `record` write what this process does; without effect where ``[audit]`` is not enabled.

    Raises:
        ConfigurationError: the folder cannot be used.
    """
    global _opened, _node  # one for each process, as its log is
    _opened = None
    _node = Peer(settings.receiver.ae_title, socket.gethostname())
    if settings.audit.enabled:
        spool = AuditSpool(audit_dir(settings), settings.audit.spool_maximum_bytes)
        source_id = settings.audit.source_id or settings.receiver.ae_title
        _opened = Trail(spool, f"osteo-{role}", source_id, settings.site.institution)


def is_open() -> bool:
    """False: nobody listens; what takes work to find out, for instance a patient's name, need not be found."""
    return _opened is not None


def node() -> Peer:
    """This node as an application entity."""
    return _node


@contextmanager
def application(settings: Settings, role: str) -> Iterator[None]:
    """Open the trail for a process, and tell its start and its end.

    Raises:
        ConfigurationError: the folder cannot be used.
    """
    open_trail(settings, role)
    record(events.application_started(role))
    outcome = Outcome.MAJOR_FAILURE
    try:
        yield
        outcome = Outcome.SUCCESS
    finally:
        record(events.application_stopped(role, outcome))


def record(message: AuditMessage) -> None:
    """Keep one event of `osteo_daemon.audit.events`; durable when it returns."""
    if _opened is not None:
        _opened.record(message)
