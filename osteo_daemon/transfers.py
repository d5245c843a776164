"""What came and what went, as the audit trail tells it: one message for each study and association.

A study's transfer is told to begin with its second object: one image per association must not cost two messages.
Where an association stays open all day, a study's transfer ends when it has gone on to `OPEN_STUDIES` others.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import Outcome
from osteo_daemon.audit.events import AuditStudy, Peer
from osteo_daemon.dicom.identity import patient_of
from osteo_daemon.dicom.received import ReceivedObject
from osteo_daemon.jobs.records import RecordOutcome, ReportObject
from osteo_daemon.settings import DestinationSettings

OPEN_STUDIES: Final = 8
"""Studies of one association that are not told yet."""

_NEW = frozenset({RecordOutcome.STORED, RecordOutcome.REPLACED})


@dataclass(slots=True)
class _Arrived:
    """What came of one study over one association."""

    sender: Peer
    fetched: bool
    path: Path
    new: Counter[str] = field(default_factory=Counter)  # by SOP class
    known: Counter[str] = field(default_factory=Counter)


class ReceivedTransfers:
    """Of one process; several threads may use it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, OrderedDict[str, _Arrived]] = {}

    def note(self, received: ReceivedObject, path: Path, outcome: RecordOutcome) -> None:
        """An object has become durable."""
        if not trail.is_open():
            return
        study = received.identifiers.study_instance_uid
        gone: list[tuple[str, _Arrived]] = []
        with self._lock:
            studies = self._open.setdefault(received.association_id, OrderedDict())
            arrived = studies.get(study)
            if arrived is None:
                sender = Peer(received.source_ae, received.address)
                arrived = studies[study] = _Arrived(sender, received.fetched, path)
            studies.move_to_end(study)
            while len(studies) > OPEN_STUDIES:
                gone.append(studies.popitem(last=False))
            counted = arrived.new if outcome in _NEW else arrived.known
            counted[received.identifiers.sop_class_uid] += 1
            second = arrived.new.total() + arrived.known.total() == 2
        for former, over in gone:
            _tell_arrived(former, over)
        if second:
            by_sender = not arrived.fetched
            begun = [AuditStudy(study)], patient_of(arrived.path), arrived.sender, trail.node()
            trail.record(events.transfer_begun(*begun, by_sender=by_sender))

    def ended(self, association_id: str) -> None:
        """Nothing more comes over this association."""
        with self._lock:
            studies = self._open.pop(association_id, OrderedDict())
        for study, arrived in studies.items():
            _tell_arrived(study, arrived)


def _tell_arrived(study: str, arrived: _Arrived) -> None:
    patient = patient_of(arrived.path)
    for counted, received in ((arrived.new, True), (arrived.known, False)):
        if counted:
            trail.record(
                events.instances_transferred(
                    [AuditStudy(study, dict(counted))],
                    patient,
                    arrived.sender,
                    trail.node(),
                    received=received,
                    by_sender=not arrived.fetched,
                )
            )


def tell_sent(
    destination: DestinationSettings, study: str, stored: Sequence[ReportObject], refused: Sequence[ReportObject]
) -> None:
    """Objects that one attempt brought to a destination, and objects that it would not take."""
    if not trail.is_open():
        return
    for objects, outcome in ((stored, Outcome.SUCCESS), (refused, Outcome.SERIOUS_FAILURE)):
        if not objects:
            continue
        patient = patient_of(objects[0].path)
        if destination.kind in ("hl7", "fhir"):
            where = destination.url or f"mllp://{destination.host}:{destination.port}"
            exported = events.data_exported([AuditStudy(study)], [patient], events.process("osteo-deliverer"), where)
            trail.record(exported if outcome is Outcome.SUCCESS else events.failed(exported, "not taken"))
            continue
        classes = dict(Counter(entry.sop_class_uid for entry in objects))
        peer = Peer(destination.ae_title or destination.url, destination.host)
        reason = "" if outcome is Outcome.SUCCESS else "the destination would not take them"
        trail.record(
            events.instances_transferred(
                [AuditStudy(study, classes)],
                patient,
                trail.node(),
                peer,
                received=False,
                outcome=outcome,
                reason=reason,
            )
        )
