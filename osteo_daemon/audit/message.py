"""One audit message and its XML form, after the schema of PS3.15 A.5.1."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

from osteo_daemon.audit.codes import Action, Code, ObjectRole, ObjectType, Outcome

_APPLICATION_SERVER = "4"  # AuditSourceTypeCode
_IP_ADDRESS, _MACHINE_NAME = "2", "1"  # NetworkAccessPointTypeCode
_ADDRESS: Final = re.compile(r"[0-9.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?")
# XML 1.0, 2.2: no other control characters, and no halves of surrogate pairs
_NO_CHARACTER: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Participant:
    """Who took part: an application entity, a process or a person.

    Attributes:
        user_id: AE title, process or login name.
        requestor: it began; at most one participant of a message did.
        address: IP address or host name; empty: unknown, or this machine.
    """

    user_id: str
    requestor: bool = False
    roles: tuple[Code, ...] = ()
    address: str = ""
    alternative_id: str = ""
    name: str = ""
    medium: Code | None = None


@dataclass(frozen=True, slots=True)
class AuditObject:
    """What it was done to: a study, a patient, a query, a node, a URI.

    Attributes:
        name: of a patient, for people; the schema wants a name or a query, so that it may be empty but not absent.
        query: the question itself; then there is no name.
        details: further values by type.
        sop_classes: how many instances of each SOP class, by UID.
    """

    identifier: str
    kind: Code
    type: ObjectType
    role: ObjectRole | None
    name: str = ""
    query: bytes | None = None
    details: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sop_classes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    accession: str = ""


@dataclass(frozen=True, slots=True)
class AuditMessage:
    """One event. May carry patient identity: it goes to the audit spool and nowhere else."""

    event: Code
    action: Action
    outcome: Outcome
    participants: tuple[Participant, ...]
    objects: tuple[AuditObject, ...] = ()
    types: tuple[Code, ...] = ()
    outcome_description: str = ""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


def to_xml(message: AuditMessage, source_id: str, site_id: str = "") -> bytes:
    """The message in UTF-8, without an XML declaration.

    Args:
        message: to write.
        source_id: names this node.
        site_id: names the institution; empty: left out.
    """
    root = Element("AuditMessage")
    event = SubElement(
        root,
        "EventIdentification",
        {
            "EventActionCode": message.action.value,
            "EventDateTime": message.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "EventOutcomeIndicator": message.outcome.value,
        },
    )
    _code(event, "EventID", message.event)
    for kind in message.types:
        _code(event, "EventTypeCode", kind)
    if message.outcome_description:
        SubElement(event, "EventOutcomeDescription").text = _clean(message.outcome_description)
    for participant in message.participants:
        _participant(root, participant)
    source = SubElement(root, "AuditSourceIdentification", {"AuditSourceID": _clean(source_id)})
    if site_id:
        source.set("AuditEnterpriseSiteID", _clean(site_id))
    SubElement(source, "AuditSourceTypeCode", {"csd-code": _APPLICATION_SERVER})
    for entry in message.objects:
        _object(root, entry)
    written: bytes = tostring(root, encoding="utf-8")
    return written


def _participant(root: Element, participant: Participant) -> None:
    attributes = {"UserID": participant.user_id, "UserIsRequestor": str(participant.requestor).lower()}
    if participant.alternative_id:
        attributes["AlternativeUserID"] = participant.alternative_id
    if participant.name:
        attributes["UserName"] = participant.name
    if participant.address:
        attributes["NetworkAccessPointID"] = participant.address
        is_address = _ADDRESS.fullmatch(participant.address) is not None
        attributes["NetworkAccessPointTypeCode"] = _IP_ADDRESS if is_address else _MACHINE_NAME
    element = SubElement(root, "ActiveParticipant", {key: _clean(value) for key, value in attributes.items()})
    for role in participant.roles:
        _code(element, "RoleIDCode", role)
    if participant.medium is not None:
        _code(SubElement(element, "MediaIdentifier"), "MediaType", participant.medium)


def _object(root: Element, entry: AuditObject) -> None:
    attributes = {"ParticipantObjectID": _clean(entry.identifier), "ParticipantObjectTypeCode": entry.type.value}
    if entry.role is not None:
        attributes["ParticipantObjectTypeCodeRole"] = entry.role.value
    element = SubElement(root, "ParticipantObjectIdentification", attributes)
    _code(element, "ParticipantObjectIDTypeCode", entry.kind)
    if entry.query is None:
        SubElement(element, "ParticipantObjectName").text = _clean(entry.name)
    else:
        SubElement(element, "ParticipantObjectQuery").text = _base64(entry.query)
    for kind, value in entry.details.items():
        SubElement(element, "ParticipantObjectDetail", {"type": _clean(kind), "value": _base64(value.encode())})
    if entry.sop_classes or entry.accession:
        description = SubElement(element, "ParticipantObjectDescription")
        if entry.accession:
            SubElement(description, "Accession", {"Number": _clean(entry.accession)})
        for uid, count in entry.sop_classes.items():
            SubElement(description, "SOPClass", {"UID": _clean(uid), "NumberOfInstances": str(count)})


def _code(parent: Element, name: str, code: Code) -> None:
    attributes = {"csd-code": code.value, "codeSystemName": code.system, "originalText": code.meaning}
    SubElement(parent, name, attributes)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _clean(text: str) -> str:
    return _NO_CHARACTER.sub("?", text)
