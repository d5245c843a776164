"""Fonts for pictures: what is installed decides whether a language can be drawn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from matplotlib import font_manager

from osteo_daemon.domain.wording import Wording

BASE_FAMILY: Final = "DejaVu Sans"
"""Comes with matplotlib; holds Latin letters and the signs of pictures."""

_PREFERRED: Final[Mapping[str, tuple[str, ...]]] = {
    # one character has other forms in Chinese and Japanese: the language's own fonts first
    "ja": ("Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "VL Gothic"),
    "zh-Hans": ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
}


def font_families(wording: Wording) -> tuple[str, ...] | None:
    """Font families that hold every character of a language's texts, or None when no installed font does."""
    needed = frozenset(character for table in wording.tables.values() for text in table.values() for character in text)
    return _families(wording.language, needed)


@functools.cache
def _families(language: str, needed: frozenset[str]) -> tuple[str, ...] | None:
    lacking = needed - _characters(font_manager.findfont(BASE_FAMILY))
    if not lacking:
        return (BASE_FAMILY,)
    _learn_system_fonts()
    installed = sorted({entry.name for entry in font_manager.fontManager.ttflist})
    preferred = [name for name in _PREFERRED.get(language, ()) if name in installed]
    for name in (*preferred, *(name for name in installed if name not in preferred)):
        if lacking <= _characters(font_manager.findfont(name)):
            return (BASE_FAMILY, name)
    return None


def _learn_system_fonts() -> None:
    # matplotlib keeps a list of its own, which misses fonts that were installed after it was written
    known = {str(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in sorted(_new_fonts(known)):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError):
            continue  # no font that FreeType reads


def _new_fonts(known: set[str]) -> Iterator[str]:
    for path in font_manager.findSystemFonts():
        if str(path) not in known:
            yield str(path)


def _characters(path: Any) -> frozenset[str]:
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
