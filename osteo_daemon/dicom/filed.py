"""What a file in the spool is, told by itself: for taking it up again when its row is lost."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from osteo_daemon.dicom.contexts import SCREENED_CLASSES
from osteo_daemon.dicom.header import Identifiers, read_identifiers
from osteo_daemon.errors import NotDicom

_META_START = 132  # PS3.10 7.1: preamble of 128 bytes and "DICM"
_GROUP_LENGTH_BYTES = 12


@dataclass(frozen=True, slots=True)
class FiledObject:
    """An object as the receiver wrote it."""

    identifiers: Identifiers
    transfer_syntax_uid: str
    screenable: bool


def read_filed(path: Path) -> FiledObject:
    """Read the UIDs of a file that the receiver wrote, and see that it is whole.

    Raises:
        NotDicom: it is not such a file.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    if data[_META_START - 4 : _META_START] != b"DICM":
        raise NotDicom("no file meta information")
    try:
        group, element, _vr, _length, size = struct.unpack_from("<HH2sHI", data, _META_START)
    except struct.error as error:
        raise NotDicom("the file ends in its meta information") from error
    start = _META_START + _GROUP_LENGTH_BYTES
    if (group, element) != (0x0002, 0x0000) or start + size > len(data):
        raise NotDicom("malformed file meta information")
    transfer_syntax_uid = _transfer_syntax(data[start : start + size])
    identifiers = read_identifiers(memoryview(data)[start + size :], transfer_syntax_uid)
    return FiledObject(identifiers, transfer_syntax_uid, identifiers.sop_class_uid in SCREENED_CLASSES)


def _transfer_syntax(meta: bytes) -> str:
    at = 0
    while at + 8 <= len(meta):
        _group, element, vr, length = struct.unpack_from("<HH2sH", meta, at)
        at += 8
        if vr == b"OB":
            (length,) = struct.unpack_from("<I", meta, at)
            at += 4
        if element == 0x0010:
            return meta[at : at + length].rstrip(b"\x00 ").decode("ascii", "replace")
        at += length
    raise NotDicom("no Transfer Syntax UID")
