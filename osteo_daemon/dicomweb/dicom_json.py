"""What servers answer in the DICOM JSON model (PS3.18 F.2): matches of queries, and what became of stored objects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from osteo_daemon.domain.archive import FoundStudy
from osteo_daemon.errors import Refused

# tags as the DICOM JSON model names them (PS3.18 F.2)
_STUDY_DATE: Final = "00080020"
_ACCESSION_NUMBER: Final = "00080050"
MODALITY: Final = "00080060"
_MODALITIES_IN_STUDY: Final = "00080061"
_STUDY_DESCRIPTION: Final = "00081030"
_PATIENT_ID: Final = "00100020"
BODY_PART: Final = "00180015"
STUDY: Final = "0020000D"
SERIES: Final = "0020000E"
SOP_CLASS: Final = "00080016"
SOP_INSTANCE: Final = "00080018"
_STUDY_INSTANCES: Final = "00201208"
SERIES_INSTANCES: Final = "00201209"
_FAILED_SEQUENCE: Final = "00081198"
_REFERENCED_SEQUENCE: Final = "00081199"
_OTHER_FAILURES: Final = "0008119A"
_FAILURE_REASON: Final = "00081197"
_UID: Final = re.compile(r"[0-9.]{1,64}")
_LONGEST_NUMBER: Final = 10
_REFERENCED_INSTANCE: Final = "00081155"


def failure_of(status: int, body: bytes, sop_instance_uid: str, host: str) -> int | None:
    """The Failure Reason of the object in a store response; None when it says that it is stored."""
    try:
        document = json.loads(body) if body.strip() else {}
    except ValueError:
        # a server that answers in XML only: then its status alone speaks
        document = {}
    if isinstance(document, list):
        document = document[0] if document else {}
    if not isinstance(document, dict):
        document = {}
    for sequence in (_FAILED_SEQUENCE, _OTHER_FAILURES):
        for item in _values(document, sequence):
            if isinstance(item, dict) and value_of(item, _REFERENCED_INSTANCE) in ("", sop_instance_uid):
                return count_of(item, _FAILURE_REASON) or 0x0110
    referenced = [item for item in _values(document, _REFERENCED_SEQUENCE) if isinstance(item, dict)]
    if any(value_of(item, _REFERENCED_INSTANCE) == sop_instance_uid for item in referenced):
        return None
    if status == 409:
        raise Refused(f"{host}: HTTP 409")
    return None


def study_of(entry: Mapping[str, Any]) -> FoundStudy:
    """A study as a match of a query tells of it."""
    return FoundStudy(
        uid_of(entry, STUDY),
        study_date=value_of(entry, _STUDY_DATE),
        modalities=tuple(str(value) for value in _values(entry, _MODALITIES_IN_STUDY) if value),
        description=value_of(entry, _STUDY_DESCRIPTION),
        instances=count_of(entry, _STUDY_INSTANCES),
        patient_id=value_of(entry, _PATIENT_ID),
        accession_number=value_of(entry, _ACCESSION_NUMBER),
    )


def value_of(entry: Mapping[str, Any], tag: str) -> str:
    """The first value of an attribute; empty when it has none."""
    values = _values(entry, tag)
    return str(values[0]).strip() if values and isinstance(values[0], str | int | float) else ""


def uid_of(entry: Mapping[str, Any], tag: str) -> str:
    """A UID; empty when it is none: it goes into URLs."""
    text = value_of(entry, tag)
    return text if _UID.fullmatch(text) else ""


def count_of(entry: Mapping[str, Any], tag: str) -> int | None:
    """A number; None when there is none."""
    text = value_of(entry, tag)
    return int(text) if text.isdecimal() and len(text) <= _LONGEST_NUMBER else None


def _values(entry: Mapping[str, Any], tag: str) -> list[Any]:
    # what a server sends may be anything
    element = entry.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []
