"""The events that this node tells, each with the participants and objects that PS3.15 A.5.3 asks for."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from osteo_daemon.audit.codes import (
    MEDIA_URI,
    Action,
    Code,
    EventId,
    EventType,
    ObjectId,
    ObjectRole,
    ObjectType,
    Outcome,
    Role,
)
from osteo_daemon.audit.message import AuditMessage, AuditObject, Participant


@dataclass(frozen=True, slots=True)
class Peer:
    """An application entity or another system; ``address`` is an IP address, a host name, or empty."""

    name: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class AuditPatient:
    """Whom a study is of; both may be empty, as they are in anonymised studies."""

    patient_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class AuditStudy:
    """A study, and how many of its instances of each SOP class the event is about, by UID."""

    study_instance_uid: str
    sop_classes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    accession: str = ""


def application_started(role: str) -> AuditMessage:
    """A process of the node begins its work."""
    return _application(role, EventType.APPLICATION_START)


def application_stopped(role: str, outcome: Outcome = Outcome.SUCCESS) -> AuditMessage:
    """A process of the node ends."""
    return replace(_application(role, EventType.APPLICATION_STOP), outcome=outcome)


def transfer_begun(
    studies: Sequence[AuditStudy], patient: AuditPatient, sender: Peer, receiver: Peer, *, by_sender: bool = True
) -> AuditMessage:
    """Instances of one patient are about to go from one entity to another."""
    return AuditMessage(
        EventId.BEGIN_TRANSFERRING,
        Action.EXECUTE,
        Outcome.SUCCESS,
        _both(sender, receiver, by_sender),
        _objects(studies, patient),
    )


def instances_transferred(
    studies: Sequence[AuditStudy],
    patient: AuditPatient,
    sender: Peer,
    receiver: Peer,
    *,
    received: bool,
    by_sender: bool = True,
    outcome: Outcome = Outcome.SUCCESS,
    reason: str = "",
) -> AuditMessage:
    """Instances of one patient have gone from one entity to another, or have failed to.

    Args:
        studies: with the instances that went.
        patient: whose they are.
        sender, receiver: of the instances.
        received: we are the receiver and did not hold them before.
        by_sender: the sender opened the association, not the receiver.
        outcome: instances that went and instances that did not are two messages.
        reason: of a failure.
    """
    return AuditMessage(
        EventId.INSTANCES_TRANSFERRED,
        Action.CREATE if received else Action.READ,
        outcome,
        _both(sender, receiver, by_sender),
        _objects(studies, patient),
        outcome_description=reason,
    )


def instances_accessed(
    studies: Sequence[AuditStudy], patient: AuditPatient, who: Participant, action: Action = Action.READ
) -> AuditMessage:
    """Somebody looked at instances of one patient, made or changed them."""
    # a process is told of with its own name, a person together with the process that served them
    participants = (who,) if who.alternative_id else (who, _process())
    return AuditMessage(EventId.INSTANCES_ACCESSED, action, Outcome.SUCCESS, participants, _objects(studies, patient))


def study_deleted(study: AuditStudy, patient: AuditPatient, who: Participant) -> AuditMessage:
    """A study's files were removed."""
    return AuditMessage(EventId.STUDY_DELETED, Action.DELETE, Outcome.SUCCESS, (who,), _objects([study], patient))


def data_exported(
    studies: Sequence[AuditStudy], patients: Sequence[AuditPatient], who: Participant, where: str
) -> AuditMessage:
    """Data of patients left the node otherwise than as DICOM objects; ``where`` is a URI."""
    exporting = replace(who, roles=(*who.roles, Role.SOURCE))
    medium = Participant(where, roles=(Role.DESTINATION_MEDIA,), medium=MEDIA_URI)
    objects = tuple(entry for patient in patients for entry in _objects((), patient))
    return AuditMessage(
        EventId.EXPORT, Action.READ, Outcome.SUCCESS, (exporting, medium), (*_objects(studies, None), *objects)
    )


def queried(
    sop_class_uid: str, identifier: bytes, transfer_syntax_uid: str, asking: Peer, answering: Peer
) -> AuditMessage:
    """One entity asked another (C-FIND, or QIDO-RS with its URI as ``identifier``).

    Args:
        sop_class_uid: of the information model.
        identifier: the query as it was sent.
        transfer_syntax_uid: of ``identifier``; empty: it is no DICOM data set.
        asking, answering: the two entities.
    """
    system, report = ObjectType.SYSTEM, ObjectRole.REPORT
    if transfer_syntax_uid:
        details = {"TransferSyntax": transfer_syntax_uid}
        subject = AuditObject(sop_class_uid, ObjectId.SOP_CLASS_UID, system, report, query=identifier, details=details)
    else:
        subject = AuditObject(identifier.decode("ascii", "replace"), ObjectId.URI, system, report, query=identifier)
    return AuditMessage(
        EventId.QUERY, Action.EXECUTE, Outcome.SUCCESS, _both(asking, answering, by_sender=True), (subject,)
    )


def failed(message: AuditMessage, reason: str, outcome: Outcome = Outcome.SERIOUS_FAILURE) -> AuditMessage:
    """The same event, which did not succeed."""
    return replace(message, outcome=outcome, outcome_description=reason)


def security_alert(
    kind: Code, description: str, *, performing: Peer | None = None, outcome: Outcome = Outcome.SERIOUS_FAILURE
) -> AuditMessage:
    """Something touched the node's security.

    Args:
        kind: of `EventType`, for instance NODE_AUTHENTICATION for an association or a handshake that was refused.
        description: in one line, without patient identity.
        performing: who did it.
        outcome: SUCCESS for information; a minor or serious failure was fended off, a major one may not have been.
    """
    participants = [_process()]
    subjects = []
    if performing is not None:
        participants.append(Participant(performing.name or "unknown", requestor=True, address=performing.address))
    subject = performing.address if performing is not None and performing.address else socket.gethostname()
    subjects.append(
        AuditObject(
            subject, ObjectId.NODE_ID, ObjectType.SYSTEM, None, subject, details={"Alert Description": description}
        )
    )
    return AuditMessage(EventId.SECURITY_ALERT, Action.EXECUTE, outcome, tuple(participants), tuple(subjects), (kind,))


def user_authenticated(
    user: str, address: str, *, login: bool = True, outcome: Outcome = Outcome.SUCCESS
) -> AuditMessage:
    """A person logged in or out, or failed to."""
    person = Participant(user or "unknown", requestor=True, address=address)
    kind = EventType.LOGIN if login else EventType.LOGOUT
    return AuditMessage(EventId.USER_AUTHENTICATION, Action.EXECUTE, outcome, (person, _process()), types=(kind,))


def audit_log_used(who: Participant, uri: str) -> AuditMessage:
    """Somebody read audit messages; ``uri`` names where they lie."""
    log = AuditObject(uri, ObjectId.URI, ObjectType.SYSTEM, ObjectRole.SECURITY_RESOURCE, name="Security Audit Log")
    return AuditMessage(EventId.AUDIT_LOG_USED, Action.READ, Outcome.SUCCESS, (who,), (log,))


def person(name: str, address: str = "") -> Participant:
    """Somebody who acts, for instance the user of a command."""
    return Participant(name, requestor=True, address=address)


def process(name: str) -> Participant:
    """A part of this node that acts by itself, for instance the scheduler."""
    return replace(_process(), user_id=name, requestor=True)


def _application(role: str, kind: Code) -> AuditMessage:
    started = Participant(
        f"osteo-{role}", roles=(Role.APPLICATION,), address=socket.gethostname(), alternative_id=str(os.getpid())
    )
    return AuditMessage(EventId.APPLICATION_ACTIVITY, Action.EXECUTE, Outcome.SUCCESS, (started,), types=(kind,))


def _process() -> Participant:
    return Participant(f"osteo-daemon-{os.getpid()}", address=socket.gethostname(), alternative_id=str(os.getpid()))


def _both(sender: Peer, receiver: Peer, by_sender: bool) -> tuple[Participant, ...]:
    return (
        Participant(sender.name or "unknown", by_sender, (Role.SOURCE,), sender.address),
        Participant(receiver.name or "unknown", not by_sender, (Role.DESTINATION,), receiver.address),
    )


def _objects(studies: Sequence[AuditStudy], patient: AuditPatient | None) -> tuple[AuditObject, ...]:
    found = [
        AuditObject(
            study.study_instance_uid,
            ObjectId.STUDY_INSTANCE_UID,
            ObjectType.SYSTEM,
            ObjectRole.REPORT,
            sop_classes=study.sop_classes,
            accession=study.accession if study.sop_classes else "",
        )
        for study in studies
    ]
    if patient is not None:
        kind, role = ObjectId.PATIENT_NUMBER, ObjectRole.PATIENT
        found.append(AuditObject(patient.patient_id, kind, ObjectType.PERSON, role, name=patient.name))
    return tuple(found)
