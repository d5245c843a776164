"""One object as it came, and the checks that all ways in have in common: it is what it was announced to be."""

from __future__ import annotations

from dataclasses import dataclass

from osteo_daemon.dicom.contexts import ACCOMPANYING_CLASSES, SCREENED_CLASSES
from osteo_daemon.dicom.header import Identifiers, file_header, read_identifiers
from osteo_daemon.errors import DataSetMismatch, UnsupportedSopClass

STORED_CLASSES = frozenset((*SCREENED_CLASSES, *ACCOMPANYING_CLASSES))
"""SOP classes that this node takes."""


@dataclass(frozen=True, slots=True)
class ReceivedObject:
    """One object as it came: its UIDs, its sender, and the bytes of a Part 10 file in two parts."""

    identifiers: Identifiers
    transfer_syntax_uid: str
    source_ae: str
    address: str
    association_id: str
    screenable: bool
    parts: tuple[bytes, memoryview]


def received_object(
    data_set: memoryview,
    *,
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    source_ae: str,
    address: str,
    association_id: str,
) -> ReceivedObject:
    """An encoded data set with what its command, or its file meta information, says that it is.

    Raises:
        UnsupportedSopClass: none of the classes that this node takes.
        NotDicom: not a readable data set.
        DataSetMismatch: its SOP Class or Instance UID is another than the announced one.
    """
    if sop_class_uid not in STORED_CLASSES:
        raise UnsupportedSopClass(printable(sop_class_uid))
    identifiers = read_identifiers(data_set, transfer_syntax_uid)
    if identifiers.sop_class_uid != sop_class_uid:
        raise DataSetMismatch("SOP Class UID differs between command and data set")
    if identifiers.sop_instance_uid != sop_instance_uid:
        raise DataSetMismatch("SOP Instance UID differs between command and data set")
    return ReceivedObject(
        identifiers=identifiers,
        transfer_syntax_uid=transfer_syntax_uid,
        source_ae=source_ae,
        address=address,
        association_id=association_id,
        screenable=sop_class_uid in SCREENED_CLASSES,
        parts=(file_header(sop_class_uid, sop_instance_uid, transfer_syntax_uid), data_set),
    )


def printable(text: str) -> str:
    """What a stranger sent, fit for a log line: no control characters, no novel."""
    return "".join(character if character.isprintable() else "?" for character in text[:64])
