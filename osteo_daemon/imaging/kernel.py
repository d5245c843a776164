"""Reconstruction kernels by maker: which are soft enough for trabecular attenuation.

Edge-enhancing kernels overshoot at the cortex and multiply noise; cleared products accept soft filtered back-projection
kernels only. The tables hold the makers' public kernel names; an unknown name is not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum


class KernelClass(StrEnum):
    """How a kernel treats edges."""

    SOFT = "soft"
    SHARP = "sharp"
    UNKNOWN = "unknown"


_SOFT_NAMES = frozenset(
    {"SOFT", "STANDARD", "STND", "STD", "DETAIL", "CHST", "CHEST", "SMOOTH", "BODY"}
)  # GE and plain words
_SHARP_NAMES = frozenset({"LUNG", "BONE", "BONEPLUS", "BONE PLUS", "EDGE", "ULTRA", "HD BONE", "HD LUNG", "SHARP"})
_PHILIPS_SOFT = frozenset({"A", "B", "C", "SA", "SB", "SC", "UA", "UB", "UC", "IMR1", "IMR2"})
_PHILIPS_SHARP = frozenset({"D", "E", "L", "YA", "YB", "YC", "YD", "YE", "F", "SD"})

# in compound names such as United Imaging's B_SOFT_B or Canon's AiCE Body Sharp
_SHARP_WORDS = frozenset({"SHARP", "VSHARP", "LUNG", "BONE", "EDGE", "INNEREAR"})
_SOFT_WORDS = frozenset({"SOFT", "VSOFT", "SMOOTH", "STANDARD", "BODY", "ABDOMEN"})

# Siemens: a region letter or two, then the sharpness: B30f, I31f, Br40d, Bl57, Hr38, Qr40. 50 and above enhance edges.
_SIEMENS = re.compile(r"^(?:B|H|U|D|I|J|T|V|C|BR|BL|BV|BF|HR|HC|HV|HP|QR|UB|SA|UR|TH)(\d{2})[A-Z]?\b", re.IGNORECASE)
_SIEMENS_SHARPEST_SOFT = 49
# Canon/Toshiba: FC01-FC19 body, FC20-FC29 head, others (30 bone, 50 lung, 80 high resolution) enhance edges.
_CANON = re.compile(r"^FC(\d{2})\b", re.IGNORECASE)
_CANON_SHARPEST_SOFT = 29


def classify_kernel(values: Sequence[str]) -> KernelClass:
    """Class of the Convolution Kernel (0018,1210), which may have several values.

    Args:
        values: the attribute's values; Siemens adds its iterative strength as a second one.
    """
    classes = [_classify(value.strip()) for value in values if value.strip()]
    if KernelClass.SHARP in classes:
        return KernelClass.SHARP
    return KernelClass.SOFT if KernelClass.SOFT in classes else KernelClass.UNKNOWN


def _classify(value: str) -> KernelClass:
    name = value.upper()
    if name in _SHARP_NAMES or name in _PHILIPS_SHARP:
        return KernelClass.SHARP
    if name in _SOFT_NAMES or name in _PHILIPS_SOFT:
        return KernelClass.SOFT
    for pattern, limit in ((_SIEMENS, _SIEMENS_SHARPEST_SOFT), (_CANON, _CANON_SHARPEST_SOFT)):
        if match := pattern.match(value):
            return KernelClass.SOFT if int(match.group(1)) <= limit else KernelClass.SHARP
    words = set(re.split(r"[\s_,-]+", name))
    if words & _SHARP_WORDS:
        return KernelClass.SHARP
    return KernelClass.SOFT if words & _SOFT_WORDS else KernelClass.UNKNOWN
