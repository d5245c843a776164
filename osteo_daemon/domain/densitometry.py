"""Densitometers: makers, their scales and what one can read. Plain numbers, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

BMD_LEVELS: Final = ("L1", "L2", "L3", "L4")
"""Vertebrae that a densitometry of the spine measures (ISCD)."""

BMD_RANGE_G_CM2: Final = (0.3, 2.2)
"""Areal BMD of single lumbar vertebrae on any maker's scale; beyond it lies another unit or another quantity."""

T_SCORE_RANGE: Final = (-8.0, 8.0)

_HUI_CENTRE_G_CM2: Final = 1.0436
_HUI: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"Hologic": (1.0550, 0.972), "Lunar": (0.9683, 1.100), "Norland": (0.9743, 0.969)}
)
"""Hui et al., Osteoporos Int 1997: sBMD = slope * (BMD - centre) + 1.0436, spine, in g/cm2."""

MAKERS: Final = tuple(_HUI)

_NAMES: Final = MappingProxyType(
    {
        "hologic": "Hologic",
        "lunar": "Lunar",
        "ge": "Lunar",
        "ge healthcare": "Lunar",
        "ge medical systems": "Lunar",
        "ge lunar": "Lunar",
        "ge medical systems lunar": "Lunar",
        "ge healthcare lunar": "Lunar",
        "norland": "Norland",
        "cooper surgical norland": "Norland",
        "coopersurgical norland": "Norland",
        "norland coopersurgical": "Norland",
        "swissray norland": "Norland",
    }
)


def maker_of(name: str) -> str | None:
    """The maker that a name of a device or manufacturer means; None for one whose scale isn't known."""
    words = " ".join("".join(c if c.isalnum() else " " for c in name).casefold().split())
    for ending in (" inc", " corp", " corporation", " gmbh", " llc", " ltd"):
        words = words.removesuffix(ending)
    return _NAMES.get(words)


def to_sbmd(bmd_g_cm2: float, maker: str) -> float:
    """A densitometer's BMD on the standardised scale (Hui 1997), in g/cm2."""
    slope, centre = _HUI[maker]
    return slope * (bmd_g_cm2 - centre) + _HUI_CENTRE_G_CM2
