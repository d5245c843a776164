"""Broken CT objects, always the same for the same seed: each a small lie or a large one.

A mutant is made of the bytes of a data set, as they would come over the network, not of a parsed one: what a parser
would refuse to write is among them.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.dsutils import encode

_TEXT_VRS = (b"LO", b"PN", b"SH", b"UI", b"DS", b"IS", b"CS", b"DA", b"TM", b"US", b"SS", b"UL", b"FD", b"AT")
_LONG_VRS = (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC")
_CHARSETS = (
    b"ISO_IR 192",
    b"ISO 2022 IR 87",
    b"ISO 2022 IR 149",
    b"GB18030",
    b"\\\\\\\\",
    b"NO SUCH SET",
    b"\xff\xfe\x00 ",
)
_UIDS = (
    b"../../../../etc/passwd",
    b"/dev/null",
    b"1.2.3\x00/../4",
    b"..",
    b".",
    b"",
    b"1.2.\r\n3",
    b"1." * 40,
    b"9" * 64,
    b"9" * 65,
    b"CON",
    b"1.2.3 ; rm",
    "１.２".encode(),
)
_NUMBERS = (
    b"1e400",
    b"-1e400",
    b"nan",
    b"inf",
    b"9" * 16,
    b"-",
    b"0x10",
    b"1\\2\\3\\4\\5\\6\\7",
    b"\x00\x00",
    b"1,5",
    b"0",
)
_NUMERIC_TAGS = (
    (0x0018, 0x0050),  # Slice Thickness
    (0x0018, 0x0060),  # KVP
    (0x0020, 0x0013),  # Instance Number
    (0x0020, 0x0032),  # Image Position (Patient)
    (0x0020, 0x0037),  # Image Orientation (Patient)
    (0x0028, 0x0030),  # Pixel Spacing
    (0x0028, 0x1052),  # Rescale Intercept
    (0x0028, 0x1053),  # Rescale Slope
    (0x0010, 0x0030),  # Patient's Birth Date
    (0x0010, 0x1010),  # Patient's Age
    (0x0008, 0x0020),  # Study Date
)
_SHORT_TAGS = (
    (0x0028, 0x0010),
    (0x0028, 0x0011),
    (0x0028, 0x0100),
    (0x0028, 0x0101),
    (0x0028, 0x0002),
    (0x0028, 0x0103),
)
_UID_TAGS = ((0x0008, 0x0016), (0x0008, 0x0018), (0x0020, 0x000D), (0x0020, 0x000E))


@dataclass(frozen=True)
class Encoded:
    """A data set without file meta information, and how it is encoded."""

    body: bytes
    syntax: str

    @property
    def order(self) -> str:
        """Byte order for `struct`."""
        return ">" if self.syntax == ExplicitVRBigEndian else "<"

    @property
    def explicit(self) -> bool:
        """Whether elements carry their VR."""
        return self.syntax != ImplicitVRLittleEndian


@dataclass(frozen=True)
class Mutant:
    """A broken data set.

    Attributes:
        made_by: the mutations' names, for a message.
    """

    body: bytes
    syntax: str
    made_by: str


def encoded(dataset: Dataset, syntax: UID) -> Encoded:
    """A data set in one of the uncompressed transfer syntaxes."""
    data = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian)
    assert data is not None
    return Encoded(data, str(syntax))


def bases(ct: Path, multi_frame: Path) -> list[Encoded]:
    """What is broken: one CT image in four encodings, one multi-frame CT."""
    single = dcmread(ct)
    found = [encoded(single, uid) for uid in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)]
    plain = found[0].body
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = Encoded(engine.compress(plain) + engine.flush(), str(DeflatedExplicitVRLittleEndian))
    frames = encoded(dcmread(multi_frame), ExplicitVRLittleEndian)
    # single images in explicit little endian are what most senders send
    return [*found, found[0], found[0], deflated, frames]


def element(tag: tuple[int, int], vr: bytes, value: bytes, of: Encoded, length: int | None = None) -> bytes:
    """One encoded element; its length may be a lie."""
    size = len(value) if length is None else length
    head = struct.pack(of.order + "HH", *tag)
    if not of.explicit:
        return head + struct.pack(of.order + "I", size & 0xFFFFFFFF) + value
    if vr in _LONG_VRS:
        return head + vr + b"\x00\x00" + struct.pack(of.order + "I", size & 0xFFFFFFFF) + value
    return head + vr + struct.pack(of.order + "H", size & 0xFFFF) + value


def _find(of: Encoded, body: bytes, tag: tuple[int, int]) -> tuple[int, int] | None:
    """Where the first element of a tag begins and ends, as far as the bytes say."""
    start = body.find(struct.pack(of.order + "HH", *tag))
    if start < 0 or start + 8 > len(body):
        return None
    if of.explicit and body[start + 4 : start + 6] not in _LONG_VRS:
        (size,) = struct.unpack_from(of.order + "H", body, start + 6)
        return start, min(start + 8 + size, len(body))
    return (
        None
        if of.explicit
        else (start, min(start + 8 + struct.unpack_from(of.order + "I", body, start + 4)[0], len(body)))
    )


def _replaced(of: Encoded, body: bytes, tag: tuple[int, int], vr: bytes, value: bytes) -> bytes:
    place = _find(of, body, tag)
    new = element(tag, vr, value + b" " * (len(value) % 2), of)
    return body + new if place is None else body[: place[0]] + new + body[place[1] :]


def flip(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """Bytes anywhere."""
    changed = bytearray(body)
    for _ in range(draw.randrange(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def cut(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """The end, or a part in the middle, is missing."""
    begin = draw.randrange(len(body))
    return body[:begin] + (b"" if draw.random() < 0.5 else body[begin + draw.randrange(1, 40) :])


def lie_about_length(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A length that is not that of the value."""
    changed = bytearray(body)
    where = draw.randrange(4, max(len(changed) - 4, 5))
    changed[where : where + 4] = draw.choice(
        [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xfe\xff\xff\x7f", b"\x01\x00\x00\x00"]
    )
    return bytes(changed)


def swap_vr(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A value under another VR."""
    places = [at for vr in (*_TEXT_VRS, *_LONG_VRS) if (at := body.find(vr)) >= 0]
    if not places:
        return flip(of, body, draw)
    at = draw.choice(places)
    return body[:at] + draw.choice([*_TEXT_VRS, *_LONG_VRS, b"XX", b"\x00\x00"]) + body[at + 2 :]


def duplicate(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A tag twice, the second time with another value."""
    tag = draw.choice([*_UID_TAGS, *_NUMERIC_TAGS])
    extra = element(tag, b"UI" if tag in _UID_TAGS else b"DS", draw.choice([b"1.2.3.4 ", b"", b"99"]), of)
    return body + extra if draw.random() < 0.5 else extra + body


def huge_number(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A number that is none, or too many of them."""
    if draw.random() < 0.3:
        tag = draw.choice(_SHORT_TAGS)
        return _replaced(of, body, tag, b"US", struct.pack(of.order + "H", draw.choice([0, 1, 7, 512, 65535])))
    return _replaced(of, body, draw.choice(_NUMERIC_TAGS), b"DS", draw.choice(_NUMBERS))


def undefined_length(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A sequence or a value that never ends, or ends as something else."""
    inner = draw.choice([b"", b"\xfe\xff\x00\xe0\x00\x00\x00\x00", b"\xfe\xff\x0d\xe0" + b"\x00" * 4, b"x" * 30])
    end = draw.choice([b"", b"\xfe\xff\xdd\xe0" + b"\x00" * 4])
    vr = draw.choice([b"SQ", b"UN", b"OB", b"UT"])
    return body + element((0x0040, 0x0275), vr, inner, of, 0xFFFFFFFF) + end


def nest(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """Sequences in sequences, deeper than any parser's stack."""
    depth = draw.choice([3, 60, 70, 400, 3000])
    item = struct.pack(of.order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    if draw.random() < 0.5:
        return body + (element((0x0040, 0x0275), b"SQ", b"", of, 0xFFFFFFFF) + item) * depth
    inner = b""
    for _ in range(min(depth, 400)):  # each with its length
        inner = struct.pack(of.order + "HHI", 0xFFFE, 0xE000, len(inner)) + inner
        inner = element((0x0040, 0x0275), b"SQ", inner, of)
    return body + inner


def charset(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """Characters of a set that they are not of."""
    broken = _replaced(of, body, (0x0008, 0x0005), b"CS", draw.choice(_CHARSETS))
    name = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 60)))
    return _replaced(of, broken, (0x0010, 0x0010), b"PN", name)


def evil_uid(of: Encoded, body: bytes, draw: random.Random) -> bytes:
    """A UID that would be a path, a line of a log, or too long."""
    return _replaced(of, body, draw.choice(_UID_TAGS), b"UI", draw.choice(_UIDS))


MUTATIONS: Sequence[Callable[[Encoded, bytes, random.Random], bytes]] = (
    flip,
    cut,
    lie_about_length,
    swap_vr,
    duplicate,
    huge_number,
    undefined_length,
    nest,
    charset,
    evil_uid,
)


def mutants(of: Sequence[Encoded], count: int, seed: int) -> Iterator[Mutant]:
    """Broken data sets, one after another; most with one mutation, some with two or three."""
    draw = random.Random(seed)
    for number in range(count):
        base = of[number % len(of)]
        chosen = draw.choices(MUTATIONS, k=draw.choice([1, 1, 1, 2, 3]))
        body = base.body
        if base.syntax == DeflatedExplicitVRLittleEndian:
            body = _deflated(base, chosen, draw)
        else:
            for mutation in chosen:
                body = mutation(base, body, draw) or b"\x00"
        yield Mutant(body, base.syntax, ", ".join(mutation.__name__ for mutation in chosen))


def _deflated(
    base: Encoded, chosen: Sequence[Callable[[Encoded, bytes, random.Random], bytes]], draw: random.Random
) -> bytes:
    """Broken before, or after, it is deflated."""
    if draw.random() < 0.3:
        return flip(base, base.body, draw)
    body = zlib.decompress(base.body, wbits=-zlib.MAX_WBITS)
    for mutation in chosen:
        body = mutation(base, body, draw) or b"\x00"
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return engine.compress(body) + engine.flush()
