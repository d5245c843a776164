"""What codes of results mean, in the words of docs/report.md, the one source, which travels in the wheel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osteo_daemon.errors import ConfigurationError

_HERE = Path(__file__).parent
_PLACES: Final = (_HERE / "report.md", _HERE.parents[1] / "docs" / "report.md")
_CODE = re.compile(r"`[a-z0-9_]+`")


@dataclass(frozen=True, slots=True)
class Explanations:
    """Codes to sentences.

    Attributes:
        flags: of quality flags.
        exclusions: of exclusions.
    """

    flags: Mapping[str, str]
    exclusions: Mapping[str, str]

    def flag(self, code: str) -> str:
        """What a quality flag means; empty for a code of another version."""
        return self.flags.get(code, "")

    def exclusion(self, code: str) -> str:
        """What an exclusion means."""
        return self.exclusions.get(code, "")


def read_explanations() -> Explanations:
    """The document's tables.

    Raises:
        ConfigurationError: the document is not part of this installation.
    """
    path = next((place for place in _PLACES if place.exists()), None)
    if path is None:
        raise ConfigurationError("docs/report.md is missing from this installation; install the package anew")
    text = path.read_text(encoding="utf-8")
    return Explanations(_table(text, "Quality flags"), _table(text, "Exclusions"))


def _table(text: str, title: str) -> dict[str, str]:
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        columns = [column.strip() for column in line.strip().strip("|").split("|")]
        if len(columns) > 1 and _CODE.fullmatch(columns[0]):
            # a code of both a study and a vertebra has a row for each
            code, meaning = columns[0].strip("`"), columns[-1]
            found[code] = f"{found[code]}; {meaning}" if code in found else meaning
    return found
