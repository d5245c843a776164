"""The audit log: who did what to studies, and the messages that wait for the audit repository.

Reading it is an audited event of its own (PS3.15 A.5.3.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from starlette.responses import Response

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.console.pages import NotDone, Visit

_ROWS = 100
_MESSAGE = re.compile(rb"<AuditMessage.*</AuditMessage>", re.DOTALL)
_OUTCOMES = {"0": "done", "4": "prevented", "8": "failed", "12": "failed badly"}
_ACTIONS = {"C": "create", "R": "read", "U": "change", "D": "delete", "E": "execute"}


@dataclass(frozen=True, slots=True)
class Line:
    """An audit message in a line.

    Attributes:
        at: as it says.
        event, action, outcome: in words.
        who: participants that asked for it.
        what: identifiers and names of its objects.
        why: what it says of its outcome.
    """

    at: str
    event: str
    action: str
    outcome: str
    who: tuple[str, ...]
    what: tuple[str, ...]
    why: str


def show_audit(visit: Visit) -> Response:
    """Both logs, newest first."""
    settings, before = visit.node.settings, visit.query.get("before", "")
    if before and not before.isdecimal():
        raise NotDone("a page begins after the number of a row")
    rows = visit.node.store.latest_events(before_event_id=int(before) if before else None, limit=_ROWS + 1)
    more = len(rows) > _ROWS
    waiting: list[Path] = []
    spool = None
    if settings.audit.enabled:
        spool = AuditSpool(trail.audit_dir(settings), settings.audit.spool_maximum_bytes)
        waiting = list(reversed(spool.waiting(spool.count())[-_ROWS:]))
        trail.record(events.audit_log_used(events.person(visit.person.name, visit.address), spool.folder.as_uri()))
    return visit.show(
        "audit.html",
        rows=rows[:_ROWS],
        following=f"/audit?before={rows[_ROWS - 1].event_id}" if more else "",
        lines=[line for line in (_line(path) for path in waiting) if line is not None],
        count=0 if spool is None else spool.count(),
        size_bytes=0 if spool is None else spool.size_bytes(),
        audit=settings.audit,
    )


def _line(path: Path) -> Line | None:
    try:
        found = _MESSAGE.search(path.read_bytes())
        # our own writing: without entities and without a document type
        root = None if found is None else ElementTree.fromstring(found[0])  # noqa: S314
    except (OSError, ElementTree.ParseError):
        return None  # sent meanwhile
    event = None if root is None else root.find("EventIdentification")
    if root is None or event is None:
        return None
    kinds = [event.find("EventTypeCode"), event.find("EventID")]
    title = next((kind.get("originalText", "") for kind in kinds if kind is not None), "")
    people = root.findall("ActiveParticipant")
    asking = [each for each in people if each.get("UserIsRequestor") == "true"] or people
    objects = root.findall("ParticipantObjectIdentification")
    return Line(
        at=event.get("EventDateTime", ""),
        event=title,
        action=_ACTIONS.get(event.get("EventActionCode", ""), ""),
        outcome=_OUTCOMES.get(event.get("EventOutcomeIndicator", ""), ""),
        who=tuple(" ".join(filter(None, [each.get("UserID"), each.get("NetworkAccessPointID")])) for each in asking),
        what=tuple(
            " ".join(filter(None, [each.get("ParticipantObjectID"), each.findtext("ParticipantObjectName")]))
            for each in objects
        ),
        why=event.findtext("EventOutcomeDescription") or "",
    )
