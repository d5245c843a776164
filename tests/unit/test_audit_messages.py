"""Every audit message against the schema of PS3.15 A.5.1 and its table in A.5.3 (`tests.audit_schema`)."""

from __future__ import annotations

import base64
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osteo_daemon.audit import events
from osteo_daemon.audit.codes import Action, EventType, Outcome
from osteo_daemon.audit.events import AuditPatient, AuditStudy, Peer
from osteo_daemon.audit.message import AuditMessage, to_xml
from osteo_daemon.audit.syslog import framed, syslog_message
from tests.audit_schema import TABLES, check

CT = "1.2.840.10008.5.1.4.1.1.2"
STUDIES = [AuditStudy("1.2.3", {CT: 4}, accession="A1"), AuditStudy("1.2.4")]
PATIENT = AuditPatient("P<1>&", 'Müller^Änne "x"')
NODE, PACS, SCANNER = Peer("OSTEO", "node7"), Peer("PACS", "10.0.0.2"), Peer("CT1", "fe80::1")
PERSON = events.person("operator", "10.0.0.9")

MESSAGES: dict[str, AuditMessage] = {
    "start": events.application_started("receiver"),
    "stop": events.application_stopped("receiver", Outcome.MAJOR_FAILURE),
    "begin": events.transfer_begun(STUDIES, PATIENT, SCANNER, NODE),
    "begin, fetched": events.transfer_begun(STUDIES, PATIENT, PACS, NODE, by_sender=False),
    "received": events.instances_transferred(STUDIES, PATIENT, SCANNER, NODE, received=True),
    "sent": events.instances_transferred(STUDIES, PATIENT, NODE, PACS, received=False),
    "refused": events.instances_transferred(
        STUDIES, PATIENT, NODE, PACS, received=False, outcome=Outcome.SERIOUS_FAILURE, reason="not wanted"
    ),
    "nobody": events.instances_transferred([AuditStudy("1.2")], AuditPatient(), Peer(""), NODE, received=True),
    "read": events.instances_accessed(STUDIES, PATIENT, PERSON),
    "changed": events.instances_accessed(STUDIES, PATIENT, PERSON, Action.UPDATE),
    "deleted": events.study_deleted(STUDIES[0], PATIENT, PERSON),
    "expired": events.study_deleted(STUDIES[0], PATIENT, events.process("osteo-scheduler")),
    "exported": events.data_exported(STUDIES, [PATIENT, PATIENT], PERSON, "mllp://10.0.0.3:2575"),
    "query": events.queried("1.2.840.10008.5.1.4.1.2.2.1", b"\x08\x00\x52\x00", "1.2.840.10008.1.2", NODE, PACS),
    "web query": events.queried("1.2.840.10008.5.1.4.1.2.2.1", b"https://a/studies?StudyDate=20260101", "", NODE, PACS),
    "alert": events.security_alert(EventType.NODE_AUTHENTICATION, "unknown AE title", performing=SCANNER),
    "alert, nobody": events.security_alert(EventType.AUDIT_RECORDING_STARTED, "12 lost"),
    "login": events.user_authenticated("anna", "10.0.0.9"),
    "no login": events.user_authenticated("", "10.0.0.9", outcome=Outcome.MINOR_FAILURE),
    "logout": events.user_authenticated("anna", "10.0.0.9", login=False),
    "log read": events.audit_log_used(PERSON, "file:///var/lib/osteo-daemon/audit"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_keeps_the_standard(name: str) -> None:
    check(to_xml(MESSAGES[name], "OSTEO", "Hospital"))


def test_every_event_that_the_standard_describes_here_is_made() -> None:
    assert {message.event.value for message in MESSAGES.values()} == set(TABLES)


def test_what_a_message_says() -> None:
    moment = datetime(2026, 11, 22, 23, 30, 1, 500000, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    message = events.instances_transferred(STUDIES, PATIENT, SCANNER, NODE, received=True)
    root = check(to_xml(AuditMessage(message.event, message.action, message.outcome, message.participants,
                                     message.objects, at=moment), "OSTEO", "Hospital"))  # fmt: skip
    event = root.find("EventIdentification")
    assert event is not None
    assert event.attrib == {
        "EventActionCode": "C",
        "EventDateTime": "2026-11-22T18:00:01.500Z",
        "EventOutcomeIndicator": "0",
    }
    sender, receiver = root.findall("ActiveParticipant")
    assert sender.attrib == {
        "UserID": "CT1",
        "UserIsRequestor": "true",
        "NetworkAccessPointID": "fe80::1",
        "NetworkAccessPointTypeCode": "2",
    }
    assert receiver.attrib["NetworkAccessPointTypeCode"] == "1"
    study, _other, patient = root.findall("ParticipantObjectIdentification")
    assert study.attrib["ParticipantObjectID"] == "1.2.3"
    (described,) = study.iter("SOPClass")
    assert described.attrib == {"UID": CT, "NumberOfInstances": "4"}
    assert patient.attrib["ParticipantObjectID"] == PATIENT.patient_id
    assert patient.findtext("ParticipantObjectName") == PATIENT.name


def test_a_query_is_kept_as_it_was_sent() -> None:
    root = check(to_xml(MESSAGES["query"], "OSTEO"))
    assert base64.b64decode(root.findtext(".//ParticipantObjectQuery") or "") == b"\x08\x00\x52\x00"
    (detail,) = root.iter("ParticipantObjectDetail")
    assert base64.b64decode(detail.attrib["value"]) == b"1.2.840.10008.1.2"


@given(st.text(), st.text(st.sampled_from(string.printable + "\x00\x0b\ufffe\ud800")))
def test_whatever_a_header_says_the_message_is_xml(patient_id: str, name: str) -> None:
    message = events.study_deleted(STUDIES[0], AuditPatient(patient_id.replace("\n", " "), name), PERSON)
    xml = to_xml(message, "OSTEO", patient_id)
    assert fromstring(xml).tag == "AuditMessage"  # noqa: S314 - our own


def _remove(path: str) -> Callable[[Element], None]:
    def change(root: Element) -> None:
        parent, _, name = path.rpartition("/")
        holder = root.find(parent) if parent else root
        assert holder is not None
        child = holder.find(name)
        assert child is not None
        holder.remove(child)

    return change


def _set(path: str, name: str, value: str | None) -> Callable[[Element], None]:
    def change(root: Element) -> None:
        element = root.find(path)
        assert element is not None
        if value is None:
            del element.attrib[name]
        else:
            element.set(name, value)

    return change


WRONG: dict[str, Callable[[Element], None]] = {
    "no source": _remove("AuditSourceIdentification"),
    "no participant": lambda root: [root.remove(entry) for entry in root.findall("ActiveParticipant")] and None,
    "one participant": _remove("ActiveParticipant"),
    "no patient": lambda root: root.remove(root.findall("ParticipantObjectIdentification")[-1]),
    "no name": _remove("ParticipantObjectIdentification/ParticipantObjectName"),
    "no code": _set("EventIdentification/EventID", "csd-code", None),
    "RFC 3881's code": _set("EventIdentification/EventID", "code", "110104"),
    "no meaning": _set("EventIdentification/EventID", "originalText", None),
    "local time": _set("EventIdentification", "EventDateTime", "2026-11-22T18:00:01"),
    "outcome": _set("EventIdentification", "EventOutcomeIndicator", "1"),
    "action": _set("EventIdentification", "EventActionCode", "D"),
    "two requestors": lambda root: [e.set("UserIsRequestor", "true") for e in root.iter("ActiveParticipant")] and None,
    "order": lambda root: root.append(root.findall("ActiveParticipant")[0]),
    "unknown": lambda root: SubElement(root, "Extra") and None,
    "text": lambda root: setattr(root.findall("ActiveParticipant")[0], "text", "x"),
    "address type": _set("ActiveParticipant", "NetworkAccessPointTypeCode", "6"),
    "UID": _set("ParticipantObjectIdentification", "ParticipantObjectID", "1.02"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_rules_refuse(what: str) -> None:
    root = check(to_xml(MESSAGES["received"], "OSTEO"))
    WRONG[what](root)
    with pytest.raises(AssertionError):
        check(tostring(root))


def test_the_text_of_a_syslog_message() -> None:
    """RFC 5424: version 1, UTC, no structured data, a byte order mark before UTF-8."""
    xml = to_xml(MESSAGES["refused"], "OSTEO")
    text = syslog_message(xml, "8", "osteo receiver", datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC))
    header, _, body = text.partition(b"\xef\xbb\xbf")
    priority, moment, _host, application, pid, message_id, structured, rest = header.split(b" ")
    assert (priority, moment) == (b"<83>1", b"2026-01-02T03:04:05.678Z")
    assert (application, message_id, structured, rest) == (b"osteo_receiver", b"DICOM+RFC3881", b"-", b"")
    assert pid.isdigit()
    assert body == xml
    assert "Müller".encode() in body
    assert framed("ä".encode()) == b"2 \xc3\xa4"
