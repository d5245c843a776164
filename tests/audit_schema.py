"""The rules of PS3.15 for audit messages, for tests: the schema of A.5.1 and the tables of A.5.3.

Written down from the standard, apart from the code that makes the messages: a grammar of elements (children as a
regular expression over their names, attributes with their patterns; whatever isn't named is an error), and for each
event what its table asks for.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import datetime
from xml.etree.ElementTree import Element, fromstring

_LINE = r"[^\t\n\r]*"
_UID = r"[0-2]((\.0)|(\.[1-9][0-9]*))*"
_BOOLEAN = "true|false|0|1"
_CODED = {"csd-code": r"\S+", "codeSystemName": _LINE, "originalText": _LINE}
_CODED_OPTIONAL = {"displayName": _LINE}
_BASE64 = "base64"
_TEXT = "text"
_EMPTY = ""


@dataclass(frozen=True)
class Rule:
    """What an element may hold: children in order as a pattern over ``Name,``, attributes, and its text."""

    children: str = ""
    required: dict[str, str] | None = None
    optional: dict[str, str] | None = None
    text: str = _EMPTY


_CODED_RULE = Rule("", _CODED, _CODED_OPTIONAL)
_CODED_ELEMENTS = ("EventID", "EventTypeCode", "RoleIDCode", "MediaType", "ParticipantObjectIDTypeCode")
SCHEMA = {
    "AuditMessage": Rule(
        "EventIdentification,(ActiveParticipant,)+AuditSourceIdentification,(ParticipantObjectIdentification,)*"
    ),
    "EventIdentification": Rule(
        "EventID,(EventTypeCode,)*(EventOutcomeDescription,)?",
        {"EventDateTime": "dateTime", "EventOutcomeIndicator": "0|4|8|12"},
        {"EventActionCode": "[CRUDE]"},
    ),
    "EventOutcomeDescription": Rule(text=_TEXT),
    "ActiveParticipant": Rule(
        "(RoleIDCode,)*(MediaIdentifier,)?",
        {"UserID": ".*", "UserIsRequestor": _BOOLEAN},
        {
            "AlternativeUserID": ".*",
            "UserName": ".*",
            "NetworkAccessPointID": _LINE,
            "NetworkAccessPointTypeCode": "[1-5]",
        },
    ),
    "MediaIdentifier": Rule("MediaType,"),
    "AuditSourceIdentification": Rule(
        "(AuditSourceTypeCode,)*", {"AuditSourceID": _LINE}, {"AuditEnterpriseSiteID": _LINE}
    ),
    "AuditSourceTypeCode": Rule("", {"csd-code": "[1-9]"}, {**_CODED, **_CODED_OPTIONAL}),
    "ParticipantObjectIdentification": Rule(
        "ParticipantObjectIDTypeCode,(ParticipantObjectName,|ParticipantObjectQuery,)"
        "(ParticipantObjectDetail,)*(ParticipantObjectDescription,)*",
        {"ParticipantObjectID": _LINE},
        {
            "ParticipantObjectTypeCode": "[1-4]",
            "ParticipantObjectTypeCodeRole": "1?[0-9]|2[0-6]",
            "ParticipantObjectDataLifeCycle": "[1-9]|1[0-5]",
            "ParticipantObjectSensitivity": _LINE,
        },
    ),
    "ParticipantObjectName": Rule(text=_TEXT),
    "ParticipantObjectQuery": Rule(text=_BASE64),
    "ParticipantObjectDetail": Rule("", {"type": _LINE, "value": _BASE64}),
    "ParticipantObjectDescription": Rule(
        "(MPPS,)*(Accession,)*(SOPClass,)*(ParticipantObjectContainsStudy,)?(Encrypted,)?(Anonymized,)?"
    ),
    "MPPS": Rule("", {"UID": _UID}),
    "Accession": Rule("", {"Number": _LINE}),
    "SOPClass": Rule("(Instance,)*", {"NumberOfInstances": "[0-9]+"}, {"UID": _UID}),
    "Instance": Rule("", {"UID": _UID}),
    "ParticipantObjectContainsStudy": Rule("(StudyIDs,)*"),
    "StudyIDs": Rule("", {"UID": _UID}),
    "Encrypted": Rule(text=_TEXT),
    "Anonymized": Rule(text=_TEXT),
    **dict.fromkeys(
        ("EventID", "EventTypeCode", "RoleIDCode", "MediaType", "ParticipantObjectIDTypeCode"), _CODED_RULE
    ),
}

STUDY, PATIENT, QUERY, LOG, SUBJECT = "study", "patient", "query", "log", "subject"
_KINDS = {
    # code and system of the identifier, type, role
    ("110180", "DCM", "2", "3"): STUDY,
    ("2", "RFC-3881", "1", "1"): PATIENT,
    ("110181", "DCM", "2", "3"): QUERY,
    ("12", "RFC-3881", "2", "3"): QUERY,  # in the form of another protocol
    ("12", "RFC-3881", "2", "13"): LOG,
    ("110182", "DCM", "2", None): SUBJECT,
    ("12", "RFC-3881", "2", None): SUBJECT,
}
_ANY = 10**6


@dataclass(frozen=True)
class Table:
    """One table of A.5.3: actions, whether a type must be named, participants by role, objects by kind (from, to)."""

    name: str
    actions: str
    types: frozenset[str] | None = None
    roles: tuple[tuple[str, int, int], ...] = ()
    participants: tuple[int, int] = (1, _ANY)
    objects: tuple[tuple[str, int, int], ...] = ()


_TRANSFER = (("110153", 1, 1), ("110152", 1, 1))
_ALERTS = frozenset(str(code) for code in (*range(110126, 110138),))
TABLES = {
    "110100": Table(
        "Application Activity", "E", frozenset({"110120", "110121"}), (("110150", 1, 1), ("110151", 0, _ANY))
    ),
    "110101": Table("Audit Log Used", "R", None, (), (1, 2), ((LOG, 1, 1),)),
    "110102": Table(
        "Begin Transferring DICOM Instances", "E", None, _TRANSFER, (2, _ANY), ((STUDY, 1, _ANY), (PATIENT, 1, 1))
    ),
    "110103": Table("DICOM Instances Accessed", "CRUD", None, (), (1, 2), ((STUDY, 1, _ANY), (PATIENT, 1, 1))),
    "110104": Table(
        "DICOM Instances Transferred", "CRU", None, _TRANSFER, (2, _ANY), ((STUDY, 1, _ANY), (PATIENT, 1, 1))
    ),
    "110105": Table("DICOM Study Deleted", "D", None, (), (1, 2), ((STUDY, 1, _ANY), (PATIENT, 1, 1))),
    "110106": Table(
        "Export", "R", None, (("110153", 1, 2), ("110154", 1, 1)), (2, _ANY), ((STUDY, 0, _ANY), (PATIENT, 1, _ANY))
    ),
    "110112": Table("Query", "E", None, _TRANSFER, (2, _ANY), ((QUERY, 1, 1),)),
    "110113": Table("Security Alert", "E", _ALERTS, (), (1, _ANY), ((SUBJECT, 0, _ANY),)),
    "110114": Table("User Authentication", "E", frozenset({"110122", "110123"}), (), (1, 2)),
}


def check(xml: bytes | str) -> Element:
    """The message, when it keeps every rule.

    Raises:
        AssertionError: with the rule that it breaks.
    """
    root = fromstring(xml)  # noqa: S314 - our own
    assert root.tag == "AuditMessage"
    _element(root)
    _table(root)
    return root


def _element(element: Element) -> None:
    rule = SCHEMA.get(element.tag)
    assert rule is not None, f"unknown element {element.tag}"
    names = "".join(f"{child.tag}," for child in element)
    assert re.fullmatch(rule.children, names), f"{element.tag} holds {names or 'nothing'}"
    required, optional = rule.required or {}, rule.optional or {}
    assert required.keys() <= element.attrib.keys(), f"{element.tag} lacks {required.keys() - element.attrib.keys()}"
    for name, value in element.attrib.items():
        pattern = {**optional, **required}.get(name)
        assert pattern is not None, f"{element.tag} has {name}"
        _value(f"{element.tag}/@{name}", pattern, value)
    if rule.text == _EMPTY:
        assert not (element.text or "").strip(), f"{element.tag} has text"
    elif rule.text == _BASE64:
        _value(element.tag, _BASE64, element.text or "")
    for child in element:
        _element(child)
        assert not (child.tail or "").strip(), f"text behind {child.tag}"


def _value(where: str, pattern: str, value: str) -> None:
    if pattern == _BASE64:
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise AssertionError(f"{where}: no base64") from error
    elif pattern == "dateTime":
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", value), f"{where}: {value}"
        datetime.fromisoformat(value)
    else:
        assert re.fullmatch(pattern, value, re.DOTALL), f"{where}: {value!r}"


def _table(root: Element) -> None:
    event = root.find("EventIdentification")
    assert event is not None
    identifier = event.find("EventID")
    assert identifier is not None
    table = TABLES.get(identifier.attrib["csd-code"])
    assert table is not None, f"unknown event {identifier.attrib}"
    assert (identifier.attrib["codeSystemName"], identifier.attrib["originalText"]) == ("DCM", table.name)
    assert event.attrib["EventActionCode"] in table.actions, table.name
    types = [kind.attrib["csd-code"] for kind in event.findall("EventTypeCode")]
    assert table.types is None or (types and set(types) <= table.types), f"{table.name}: types {types}"
    participants = root.findall("ActiveParticipant")
    least, most = table.participants
    assert least <= len(participants) <= most, f"{table.name}: {len(participants)} participants"
    assert sum(entry.attrib["UserIsRequestor"] == "true" for entry in participants) <= 1, "several requestors"
    assert all(entry.attrib["UserID"] for entry in participants), "a participant without a name"
    for entry in participants:
        assert ("NetworkAccessPointID" in entry.attrib) == ("NetworkAccessPointTypeCode" in entry.attrib)
        media = [role for role in entry.findall("RoleIDCode") if role.attrib["csd-code"] == "110154"]
        assert bool(media) == (entry.find("MediaIdentifier") is not None)
    roles = [role.attrib["csd-code"] for role in root.iter("RoleIDCode")]
    for role, fewest, many in table.roles:
        assert fewest <= roles.count(role) <= many, f"{table.name}: role {role} {roles.count(role)} times"
    kinds = [_kind(entry) for entry in root.findall("ParticipantObjectIdentification")]
    allowed = {kind for kind, _fewest, _many in table.objects}
    assert set(kinds) <= allowed, f"{table.name} about {set(kinds) - allowed}"
    for kind, fewest, many in table.objects:
        assert fewest <= kinds.count(kind) <= many, f"{table.name}: {kind} {kinds.count(kind)} times"


def _kind(entry: Element) -> str:
    code = entry.find("ParticipantObjectIDTypeCode")
    assert code is not None
    key = (
        code.attrib["csd-code"],
        code.attrib["codeSystemName"],
        entry.attrib.get("ParticipantObjectTypeCode", ""),
        entry.attrib.get("ParticipantObjectTypeCodeRole"),
    )
    assert key in _KINDS, f"unknown object {key}"
    kind = _KINDS[key]
    details = [detail.attrib["type"] for detail in entry.findall("ParticipantObjectDetail")]
    if kind == STUDY:
        assert re.fullmatch(_UID, entry.attrib["ParticipantObjectID"])
        description = entry.find("ParticipantObjectDescription")
        assert description is None or description.find("SOPClass") is not None  # A.5.2: required with any other
    if kind == QUERY:
        assert entry.find("ParticipantObjectQuery") is not None
        assert details == (["TransferSyntax"] if code.attrib["csd-code"] == "110181" else [])
    if kind == SUBJECT:
        assert details == ["Alert Description"]
    return kind
