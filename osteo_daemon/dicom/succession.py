"""Which report a structured report replaces: read it, and make the form of a report that names another one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pydicom

from osteo_daemon.dicom.report import SeriesReference, retarget
from osteo_daemon.dicom.uids import derived_uid


@dataclass(frozen=True, slots=True)
class Succession:
    """A report that names another predecessor, as a Part 10 file."""

    sop_instance_uid: str
    data: bytes


def predecessor_uid(path: Path) -> str | None:
    """SOP Instance UID of the document that a spooled report replaces (PS3.3 C.17.2), None when it replaces none."""
    header = pydicom.dcmread(path, specific_tags=["PredecessorDocumentsSequence"])
    for study in header.get("PredecessorDocumentsSequence", None) or ():
        return str(study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
    return None


def succeed(path: Path, predecessor: Path | None) -> Succession:
    """A spooled report as the successor of another one, or of none; the same input gives the same bytes.

    Args:
        path: the report in Explicit VR Little Endian.
        predecessor: one of our own spooled reports of the same study.
    """
    document = pydicom.dcmread(path)
    reference = None
    if predecessor is not None:
        held = pydicom.dcmread(
            predecessor, specific_tags=["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
        )
        reference = SeriesReference(
            study_instance_uid=str(held.StudyInstanceUID),
            series_instance_uid=str(held.SeriesInstanceUID),
            sop_class_uid=str(held.SOPClassUID),
            sop_instance_uid=str(held.SOPInstanceUID),
        )
    named = "" if reference is None else reference.sop_instance_uid
    uid = derived_uid("succession", str(document.SOPInstanceUID), named)
    retarget(document, str(document.SOPClassUID), uid, reference)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, document, enforce_file_format=True)
    return Succession(uid, buffer.getvalue())
