"""One object as it came, and the checks that all ways in have in common: it is what it was announced to be."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from osteo_daemon.dicom.contexts import ACCOMPANYING_CLASSES, SCREENED_CLASSES, TRANSFER_SYNTAXES
from osteo_daemon.dicom.header import LONG_VRS, Identifiers, file_header, read_identifiers
from osteo_daemon.errors import DataSetMismatch, NotDicom, UnsupportedSopClass

STORED_CLASSES = frozenset((*SCREENED_CLASSES, *ACCOMPANYING_CLASSES))
"""SOP classes that this node takes."""

_PREAMBLE_BYTES = 128
_SOP_CLASS = 0x0002
_SOP_INSTANCE = 0x0003
_TRANSFER_SYNTAX = 0x0010
_META_WANTED = frozenset({_SOP_CLASS, _SOP_INSTANCE, _TRANSFER_SYNTAX})


class Incoming(Protocol):
    """A file that is not yet an object's: bytes are appended, until it is taken over or discarded."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; OSError when the disk failed."""

    def discard(self) -> None:
        """Give it up, if nobody took it over."""


@dataclass(frozen=True, slots=True)
class ReceivedObject:
    """One object as it came: its UIDs, its sender, and the bytes of a Part 10 file in two parts.

    Attributes:
        association_id: what it has in common with the objects of one association, request or retrieval.
        screenable: of a class that makes its study a candidate for screening.
        fetched: it came because this node asked for it: nobody waits for its study.
        file: where it came in pieces: holds the same bytes already.
    """

    identifiers: Identifiers
    transfer_syntax_uid: str
    source_ae: str
    address: str
    association_id: str
    screenable: bool
    parts: tuple[bytes, memoryview]
    fetched: bool = False
    file: Incoming | None = None


def received_object(
    data_set: memoryview,
    *,
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    source_ae: str,
    address: str,
    association_id: str,
    fetched: bool = False,
    file: Incoming | None = None,
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
        fetched=fetched,
        file=file,
    )


def received_file(
    data: bytes | bytearray, *, source_ae: str, address: str, association_id: str, fetched: bool = False
) -> ReceivedObject:
    """The bytes of a Part 10 file; its file meta information is replaced by ours, its data set stays as it is.

    Raises:
        UnsupportedSopClass: none of the classes that this node takes, or a transfer syntax that it doesn't know.
        NotDicom: no readable Part 10 file.
        DataSetMismatch: the data set is another object than the file meta information says.
    """
    meta, start = _file_meta(data)
    transfer_syntax_uid = meta.get(_TRANSFER_SYNTAX, "")
    if transfer_syntax_uid not in TRANSFER_SYNTAXES:
        raise UnsupportedSopClass(f"transfer syntax {printable(transfer_syntax_uid)}")
    return received_object(
        memoryview(data)[start:],
        sop_class_uid=meta.get(_SOP_CLASS, ""),
        sop_instance_uid=meta.get(_SOP_INSTANCE, ""),
        transfer_syntax_uid=transfer_syntax_uid,
        source_ae=source_ae,
        address=address,
        association_id=association_id,
        fetched=fetched,
    )


def _file_meta(data: bytes | bytearray) -> tuple[dict[int, str], int]:
    """UIDs of group 2 by element, and where the data set starts (PS3.10 7.1: always Explicit VR Little Endian)."""
    if data[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4] != b"DICM":
        raise NotDicom("no DICOM file: the prefix is missing")
    found: dict[int, str] = {}
    position = _PREAMBLE_BYTES + 4
    try:
        while position < len(data):
            group, element, vr = struct.unpack_from("<HH2s", data, position)
            if group != 0x0002:
                break
            if vr in LONG_VRS:
                (length,) = struct.unpack_from("<I", data, position + 8)
                value = position + 12
            else:
                (length,) = struct.unpack_from("<H", data, position + 6)
                value = position + 8
            position = value + length
            if position > len(data):
                raise NotDicom("the file meta information is longer than the file")
            if element in _META_WANTED:
                found[element] = bytes(data[value:position]).rstrip(b"\x00 ").decode("ascii", "replace")
    except struct.error as error:
        raise NotDicom("the file ends inside its meta information") from error
    return found, position


def printable(text: str) -> str:
    """What a stranger sent, fit for a log line: no control characters, no novel."""
    return "".join(character if character.isprintable() else "?" for character in text[:64])
