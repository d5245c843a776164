"""The answer to STOW-RS: what is stored and what is not, as DICOM JSON or XML (PS3.18 10.5.3 and F.2, PS3.19 A.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import quoteattr

DICOM_JSON: Final = "application/dicom+json"
DICOM_XML: Final = "application/dicom+xml"

_OUT_OF_RESOURCES: Final = range(0xA700, 0xA800)
_KEYWORDS: Final = {
    "00081150": "ReferencedSOPClassUID",
    "00081155": "ReferencedSOPInstanceUID",
    "00081190": "RetrieveURL",
    "00081197": "FailureReason",
    "00081198": "FailedSOPSequence",
    "00081199": "ReferencedSOPSequence",
    "0008119A": "OtherFailuresSequence",
}


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What became of one part of a request.

    Attributes:
        sop_class_uid: empty when the part could not be read.
        sop_instance_uid: likewise.
        failure: a status of C-STORE, or None for a part that is durable.
        no_room: it failed for want of room on the disk.
    """

    sop_class_uid: str
    sop_instance_uid: str
    failure: int | None = None
    no_room: bool = False


def http_status(parts: Sequence[StoredPart]) -> int:
    """The status for a request that was read to its end (PS3.18 table 10.5.3-1).

    All stored: 200; some: 202; none: 409, but 507 when the disk is full and 503 when it is this node's trouble of the
    moment: the same request may succeed later.
    """
    failed = [part for part in parts if part.failure is not None]
    if not failed:
        return 200
    if len(failed) < len(parts):
        return 202
    if all(part.failure in _OUT_OF_RESOURCES for part in failed):
        return 507 if any(part.no_room for part in failed) else 503
    return 409


def store_response(parts: Sequence[StoredPart], media_type: str) -> bytes:
    """The body of the answer in this media type."""
    document: dict[str, Any] = {"00081190": {"vr": "UR"}}
    stored = [_reference(part) for part in parts if part.failure is None]
    failed = [_reference(part) for part in parts if part.failure is not None and part.sop_instance_uid]
    others = [_reason(part) for part in parts if part.failure is not None and not part.sop_instance_uid]
    for tag, items in (("00081199", stored), ("00081198", failed), ("0008119A", others)):
        if items:
            document[tag] = {"vr": "SQ", "Value": items}
    if media_type == DICOM_XML:
        body = f'<NativeDicomModel xml:space="preserve">{_xml(document)}</NativeDicomModel>'
        return f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode()
    return json.dumps(document, sort_keys=True).encode()


def _reference(part: StoredPart) -> dict[str, Any]:
    item: dict[str, Any] = {
        "00081150": {"vr": "UI", "Value": [part.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [part.sop_instance_uid]},
    }
    if part.failure is None:
        return item
    return {**item, **_reason(part)}


def _reason(part: StoredPart) -> dict[str, Any]:
    return {"00081197": {"vr": "US", "Value": [part.failure]}}


def _xml(document: dict[str, Any]) -> str:
    elements = []
    for tag in sorted(document):
        element = document[tag]
        inner = ""
        for number, value in enumerate(element.get("Value", ()), start=1):
            if element["vr"] == "SQ":
                inner += f'<Item number="{number}">{_xml(value)}</Item>'
            else:
                # UIDs and numbers alone: nothing in them needs escaping
                inner += f'<Value number="{number}">{value}</Value>'
        keyword = quoteattr(_KEYWORDS[tag])
        elements.append(f'<DicomAttribute tag="{tag}" vr="{element["vr"]}" keyword={keyword}>{inner}</DicomAttribute>')
    return "".join(elements)
