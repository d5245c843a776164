"""Codes of audit messages (PS3.16 CID 400, 401, 402 and 405) and the enumerations of the message's schema."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


@dataclass(frozen=True, slots=True)
class Code:
    """A coded value as audit messages write it."""

    value: str
    meaning: str
    system: str = "DCM"


class EventId:
    """CID 400: what kind of event it is."""

    APPLICATION_ACTIVITY: Final = Code("110100", "Application Activity")
    AUDIT_LOG_USED: Final = Code("110101", "Audit Log Used")
    BEGIN_TRANSFERRING: Final = Code("110102", "Begin Transferring DICOM Instances")
    INSTANCES_ACCESSED: Final = Code("110103", "DICOM Instances Accessed")
    INSTANCES_TRANSFERRED: Final = Code("110104", "DICOM Instances Transferred")
    STUDY_DELETED: Final = Code("110105", "DICOM Study Deleted")
    EXPORT: Final = Code("110106", "Export")
    QUERY: Final = Code("110112", "Query")
    SECURITY_ALERT: Final = Code("110113", "Security Alert")
    USER_AUTHENTICATION: Final = Code("110114", "User Authentication")


class EventType:
    """CID 401: the kind within the family."""

    APPLICATION_START: Final = Code("110120", "Application Start")
    APPLICATION_STOP: Final = Code("110121", "Application Stop")
    LOGIN: Final = Code("110122", "Login")
    LOGOUT: Final = Code("110123", "Logout")
    NODE_AUTHENTICATION: Final = Code("110126", "Node Authentication")
    SOFTWARE_CONFIGURATION: Final = Code("110131", "Software Configuration")
    USE_OF_RESTRICTED_FUNCTION: Final = Code("110132", "Use of Restricted Function")
    AUDIT_RECORDING_STOPPED: Final = Code("110133", "Audit Recording Stopped")
    AUDIT_RECORDING_STARTED: Final = Code("110134", "Audit Recording Started")
    USER_SECURITY_ATTRIBUTES_CHANGED: Final = Code("110137", "User Security Attributes Changed")


class Role:
    """CID 402: what a participant does in the event."""

    APPLICATION: Final = Code("110150", "Application")
    APPLICATION_LAUNCHER: Final = Code("110151", "Application Launcher")
    DESTINATION: Final = Code("110152", "Destination Role ID")
    SOURCE: Final = Code("110153", "Source Role ID")
    DESTINATION_MEDIA: Final = Code("110154", "Destination Media")


class ObjectId:
    """CID 404, and the schema's own codes: what kind of identifier names an object."""

    STUDY_INSTANCE_UID: Final = Code("110180", "Study Instance UID")
    SOP_CLASS_UID: Final = Code("110181", "SOP Class UID")
    NODE_ID: Final = Code("110182", "Node ID")
    PATIENT_NUMBER: Final = Code("2", "Patient Number", "RFC-3881")
    URI: Final = Code("12", "URI", "RFC-3881")


MEDIA_URI: Final = Code("110037", "URI")
"""CID 405: the medium of an export that a URI names: a file, a folder, an interface."""


class Action(StrEnum):
    """EventActionCode."""

    CREATE = "C"
    READ = "R"
    UPDATE = "U"
    DELETE = "D"
    EXECUTE = "E"


class Outcome(StrEnum):
    """EventOutcomeIndicator."""

    SUCCESS = "0"
    MINOR_FAILURE = "4"  # what was prevented, or will be tried again
    SERIOUS_FAILURE = "8"  # the action ended without success
    MAJOR_FAILURE = "12"  # security may be compromised, or the application is no longer there


class ObjectType(StrEnum):
    """ParticipantObjectTypeCode."""

    PERSON = "1"
    SYSTEM = "2"


class ObjectRole(StrEnum):
    """ParticipantObjectTypeCodeRole."""

    PATIENT = "1"
    REPORT = "3"
    SECURITY_RESOURCE = "13"
