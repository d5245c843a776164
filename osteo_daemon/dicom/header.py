"""Just enough of a data set to file it: four UIDs and whether its elements end where the bytes end.

No recursion, no decoding, no allocation by a length that a peer chose: every length is compared with the bytes that
are there. Encoding rules from PS3.5 clause 7; file meta information from PS3.10 7.1.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from osteo_daemon.dicom.contexts import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from osteo_daemon.dicom.uids import IMPLEMENTATION_CLASS_UID
from osteo_daemon.errors import NotDicom

_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00080018
_STUDY = 0x0020000D
_SERIES = 0x0020000E
_WANTED = (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES)

_ITEM = 0xFFFEE000
_ITEM_END = 0xFFFEE00D
_SEQUENCE_END = 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
# PS3.5 7.1.2: these have two reserved bytes and a length of 32 bits
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_TEXT_VRS = (b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST", b"TM", b"UI")
_SHORT_VRS = frozenset((*_TEXT_VRS, b"AT", b"FL", b"FD", b"SL", b"SS", b"UL", b"US"))
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")  # leading zeros are not valid and occur
_MAXIMUM_DEPTH = 64
_MAXIMUM_ELEMENTS = 4_000_000  # seconds of work; thousands of frames have a tenth of them
_INFLATED_HEADER_BYTES = 4 * 1024 * 1024
_MAXIMUM_PADDING_BYTES = 8


@dataclass(frozen=True, slots=True)
class Identifiers:
    """The UIDs under which an object is filed."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


def read_identifiers(data_set: bytes | memoryview, transfer_syntax_uid: str) -> Identifiers:
    """Find the UIDs of an encoded data set and walk all its elements to the end.

    Args:
        data_set: as received, without file meta information.
        transfer_syntax_uid: how it is encoded.

    Raises:
        NotDicom: a UID is missing or malformed, or the elements do not end where the bytes end.
    """
    view = memoryview(data_set)
    whole = True
    if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        view, whole = _inflate(view)
    walk = _Walk(
        view,
        explicit=transfer_syntax_uid != IMPLICIT_VR_LITTLE_ENDIAN,
        order=">" if transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN else "<",
    )
    try:
        found = walk.run(whole=whole)
    except struct.error as error:
        raise NotDicom("the data set ends inside an element") from error
    return Identifiers(
        study_instance_uid=_uid(found, _STUDY, "Study Instance UID"),
        series_instance_uid=_uid(found, _SERIES, "Series Instance UID"),
        sop_class_uid=_uid(found, _SOP_CLASS, "SOP Class UID"),
        sop_instance_uid=_uid(found, _SOP_INSTANCE, "SOP Instance UID"),
    )


def file_header(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble, prefix and file meta information for a data set, the same whoever sent it.

    Without version name and sender: a digest of the file tells of the object alone.
    """
    elements = b"".join(
        (
            b"\x02\x00\x01\x00OB\x00\x00\x02\x00\x00\x00\x00\x01",
            _ui(0x0002, sop_class_uid),
            _ui(0x0003, sop_instance_uid),
            _ui(0x0010, transfer_syntax_uid),
            _ui(0x0012, IMPLEMENTATION_CLASS_UID),
        )
    )
    return b"\x00" * 128 + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


def _ui(element: int, uid: str) -> bytes:
    value = uid.encode("ascii")
    value += b"\x00" * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, element, b"UI", len(value)) + value


def _uid(found: dict[int, bytes], tag: int, name: str) -> str:
    if tag not in found:
        raise NotDicom(f"no {name}")
    text = found[tag].rstrip(b"\x00 ").decode("ascii", "replace")
    if not _UID.fullmatch(text):
        raise NotDicom(f"malformed {name}")
    return text


def _inflate(view: memoryview) -> tuple[memoryview, bool]:
    engine = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        head = engine.decompress(view, _INFLATED_HEADER_BYTES)
    except zlib.error as error:
        raise NotDicom("the deflated data set cannot be inflated") from error
    if len(head) < _INFLATED_HEADER_BYTES and not engine.eof:
        raise NotDicom("the deflated data set ends early")
    return memoryview(head), engine.eof


class _Walk:
    """One pass over the top-level elements; nested ones are stepped over."""

    def __init__(self, view: memoryview, *, explicit: bool, order: str) -> None:
        self._view = view
        self._end = len(view)
        self._elements = 0
        self._explicit = explicit
        self._tag = struct.Struct(order + "HH")
        self._u16 = struct.Struct(order + "H")
        self._u32 = struct.Struct(order + "I")

    def run(self, *, whole: bool) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        position = 0
        while position < self._end:
            if self._end - position < _MAXIMUM_PADDING_BYTES and not any(self._view[position:]):
                break  # some senders pad the last fragment
            tag, vr, length, value = self._element(position)
            if tag >> 16 < 0x0008:
                raise NotDicom(f"element ({tag >> 16:04x},{tag & 0xFFFF:04x}) in a data set")
            if length == _UNDEFINED:
                position = self._skip_undefined(value, self._explicit and vr != b"UN")
                continue
            position = value + length
            if position > self._end:
                if not whole and len(found) == len(_WANTED):
                    break  # the rest of a deflated data set was not looked at
                raise NotDicom(f"element ({tag >> 16:04x},{tag & 0xFFFF:04x}) is longer than the data set")
            if tag in _WANTED:
                uid = bytes(self._view[value : min(position, value + 128)])
                if found.setdefault(tag, uid) != uid:
                    # the next reader may take the other one: nobody knows whose object this is
                    raise NotDicom(f"element ({tag >> 16:04x},{tag & 0xFFFF:04x}) twice, with different values")
        return found

    def _element(self, position: int, explicit: bool | None = None) -> tuple[int, bytes, int, int]:
        """Tag, VR, length and where the value starts."""
        self._elements += 1
        if self._elements > _MAXIMUM_ELEMENTS:
            raise NotDicom(f"more than {_MAXIMUM_ELEMENTS} elements")
        group, element = self._tag.unpack_from(self._view, position)
        tag = group << 16 | element
        explicit = self._explicit if explicit is None else explicit
        if group == 0xFFFE or not explicit:
            return tag, b"", self._u32.unpack_from(self._view, position + 4)[0], position + 8
        vr = bytes(self._view[position + 4 : position + 6])
        if vr in _SHORT_VRS:
            return tag, vr, self._u16.unpack_from(self._view, position + 6)[0], position + 8
        if vr in LONG_VRS:
            return tag, vr, self._u32.unpack_from(self._view, position + 8)[0], position + 12
        raise NotDicom(f"element ({group:04x},{element:04x}) has no known VR")

    def _skip_undefined(self, position: int, explicit: bool) -> int:
        """The end of a sequence or encapsulated value of undefined length that starts here.

        A stack of what is open: True for a sequence (holds items), False for an item (holds elements). A value of VR
        UN and undefined length is encoded implicitly (PS3.5 6.2.2).
        """
        stack: list[tuple[bool, bool]] = [(True, explicit)]
        while stack:
            in_sequence, explicit = stack[-1]
            tag, vr, length, value = self._element(position, explicit)
            position = value
            if tag == (_SEQUENCE_END if in_sequence else _ITEM_END):
                stack.pop()
            elif in_sequence and tag != _ITEM:
                raise NotDicom("a sequence holds something that is no item")
            elif length == _UNDEFINED:
                if len(stack) >= _MAXIMUM_DEPTH:
                    raise NotDicom(f"sequences nested more than {_MAXIMUM_DEPTH} deep")
                stack.append((not in_sequence, explicit and vr != b"UN"))
            else:
                position += length
                if position > self._end:
                    raise NotDicom("an item is longer than the data set")
        return position
