"""Values as people read them, and addresses as they may stand in a redirect."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_LONGEST_UID = 64
# a version may have a plus sign
_LOCAL = re.compile(r"/(?:[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*)?")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def is_uid(text: str) -> bool:
    """Whether a text is a DICOM UID (PS3.5 9.1)."""
    return len(text) <= _LONGEST_UID and _UID.fullmatch(text) is not None


def is_local(target: str) -> bool:
    """Whether a target leads to a page of this console: it becomes a redirect, so nothing else may pass."""
    return _LOCAL.fullmatch(target) is not None


def moment(value: datetime | str | None) -> str:
    """A time in UTC, machine-readable as well; a text is in ISO 8601."""
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return "–"
    value = value.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        value.isoformat(timespec="seconds"), f"{value:%Y-%m-%d %H:%M:%S}"
    )


def duration(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return "–"
    if math.isinf(seconds):
        return "long"
    left, parts = max(int(seconds), 0), list[str]()
    for unit, size in _UNITS:
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts) or "0 s"


def age(value: datetime | None) -> str:
    """How long ago a moment was."""
    return duration(None if value is None else (datetime.now(UTC) - value).total_seconds())


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None, digits: int = 0) -> str:
    """A number with so many digits after the point; a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def words(slug: str | None) -> str:
    """A slug as words."""
    return "" if slug is None else slug.replace("_", " ")


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "moment": moment,
    "duration": duration,
    "age": age,
    "size": size,
    "number": number,
    "words": words,
}
