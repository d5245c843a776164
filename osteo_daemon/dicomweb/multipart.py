"""Bodies of type multipart/related, read as they come: one part in memory at a time (RFC 2046 5.1, RFC 2387)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from enum import Enum

from osteo_daemon.errors import MalformedMessage

_MAXIMUM_HEADER_BYTES = 16384
_MAXIMUM_PREAMBLE_BYTES = 65536
# RFC 2046 allows 70 characters; Orthanc sends 73
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its header fields, names in lower case, and its body."""

    headers: dict[str, str]
    body: bytearray = field(repr=False)

    @property
    def media_type(self) -> str:
        """Type and subtype in lower case; empty when the part names none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class _State(Enum):
    PREAMBLE = 0  # before the first delimiter
    DELIMITER = 1  # after the boundary: padding and the end of the line, or the two hyphens of the last one
    HEADERS = 2
    BODY = 3
    END = 4  # after the last delimiter: what follows is an epilogue and means nothing


class MultipartReader:
    """Takes bytes in any portions and gives the parts that are whole.

    Args:
        boundary: of the message, without hyphens.
        maximum_part_bytes: of one part's body.
    """

    def __init__(self, boundary: str, maximum_part_bytes: int) -> None:
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._maximum_part_bytes = maximum_part_bytes
        # a message may begin with its boundary: then the line end before it is only thought
        self._rest = b"\r\n"
        self._state = _State.PREAMBLE
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._preamble_bytes = 0

    @property
    def ended(self) -> bool:
        """True after the last delimiter."""
        return self._state is _State.END

    def feed(self, data: bytes) -> Iterator[Part]:
        """Take the next bytes; consume the iterator to its end before the next call.

        Raises:
            MalformedMessage: this is no multipart message, or a part of it is longer than allowed.
        """
        window = self._rest + data
        self._rest = b""
        while window and self._state is not _State.END:
            if self._state is _State.DELIMITER:
                after = self._after_delimiter(window)
            elif self._state is _State.HEADERS:
                after = self._after_headers(window)
            else:
                inside = self._state is _State.BODY
                after = self._after_content(window)
                if after is not None and inside:
                    part, self._headers, self._body = Part(self._headers, self._body), {}, bytearray()
                    yield part
            if after is None:
                return
            window = after

    def close(self) -> None:
        """The message has ended.

        Raises:
            MalformedMessage: before its last delimiter.
        """
        if self._state is not _State.END:
            raise MalformedMessage("the multipart message ends before its last boundary")

    def _after_content(self, window: bytes) -> bytes | None:
        end = window.find(self._delimiter)
        # what may be the beginning of a delimiter waits for its end
        known = end if end >= 0 else max(len(window) - len(self._delimiter) + 1, 0)
        if self._state is _State.BODY:
            if len(self._body) + known > self._maximum_part_bytes:
                raise MalformedMessage(f"a part is longer than {self._maximum_part_bytes} bytes")
            self._body += memoryview(window)[:known]
        else:
            self._preamble_bytes += known
            if self._preamble_bytes > _MAXIMUM_PREAMBLE_BYTES:
                raise MalformedMessage("no boundary where the multipart message begins")
        if end < 0:
            self._rest = window[known:]
            return None
        self._state = _State.DELIMITER
        return window[end + len(self._delimiter) :]

    def _after_delimiter(self, window: bytes) -> bytes | None:
        if window.startswith(b"--"):
            self._state = _State.END
            return b""
        line, newline, after = window.partition(b"\r\n")
        if not newline:
            if len(window) > _MAXIMUM_HEADER_BYTES:
                raise MalformedMessage("a boundary without the end of its line")
            self._rest = window
            return None
        if line.strip(b" \t"):
            raise MalformedMessage("something follows a boundary")
        self._state = _State.HEADERS
        return b"\r\n" + after  # a part may have no header at all

    def _after_headers(self, window: bytes) -> bytes | None:
        block, blank, after = window.partition(b"\r\n\r\n")
        if len(block) > _MAXIMUM_HEADER_BYTES:
            raise MalformedMessage("the header of a part is too long")
        if not blank:
            self._rest = window
            return None
        self._headers = _fields(block)
        self._state = _State.BODY
        return after


def _fields(block: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in block.decode("latin-1").split("\r\n"):
        if not line:
            continue
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise MalformedMessage("the header of a part is not readable")
        fields[name.strip().lower()] = value.strip()
    return fields


def media_type_of(content_type: str) -> tuple[str, dict[str, str]]:
    """Type with subtype, in lower case, and parameters of a Content-Type field (RFC 9110 8.3.1)."""
    message = Message()
    message["content-type"] = content_type
    parameters = {str(name).lower(): str(value) for name, value in message.get_params(failobj=[])[1:]}
    return message.get_content_type() if content_type else "", parameters


def boundary_of(content_type: str) -> str:
    """The boundary of a multipart/related message of DICOM objects.

    Raises:
        MalformedMessage: it is another kind of message, or names no usable boundary.
    """
    kind, parameters = media_type_of(content_type)
    if kind != "multipart/related":
        raise MalformedMessage("not a multipart/related message")
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedMessage("no usable boundary")
    return boundary
