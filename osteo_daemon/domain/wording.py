"""What a report says, in the language of the site. No sentence ever calls a study normal.

The texts stand in ``texts/<language>.toml``; a site may replace tables of them with a file of its own (docs/report.md).
"""

from __future__ import annotations

import functools
import hashlib
import json
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import (
    AVERAGED_LEVELS,
    Category,
    Outcome,
    QualityFlag,
    ScreeningResult,
)
from osteo_daemon.errors import ConfigurationError

ENGLISH: Final = "en"
LANGUAGES: Final = ("en", "de", "fr", "es", "zh-Hans", "ja")

FORBIDDEN: Final[Mapping[str, tuple[str, ...]]] = {
    # words that would call a study or a bone normal; lower case
    "en": ("normal", "unremarkable"),
    "de": ("normal", "unauffällig", "ohne befund", "regelrecht"),
    "fr": ("normal", "normaux", "sans anomalie"),
    "es": ("normal", "sin alteraciones", "sin anomalías"),
    "zh-Hans": ("正常", "无异常", "未见异常"),
    "ja": ("正常", "異常なし", "異常はありません", "異常を認め"),
}

_FALLS_BACK: Final = frozenset({"flag", "exclusion"})
"""Tables that a site's file may hold in part: a code without a text is said in plain words."""


def plain(slug: str) -> str:
    """A flag or exclusion code as English words."""
    return slug.replace("_", " ")


@dataclass(frozen=True, slots=True, eq=False)
class Wording:
    """The texts of one language.

    Attributes:
        language: RFC 5646 code.
        tables: table to key to text, as in the files.
    """

    language: str
    tables: Mapping[str, Mapping[str, str]]

    @property
    def digest(self) -> str:
        """sha256 of all texts: another wording makes another report."""
        return hashlib.sha256(json.dumps(self.tables, sort_keys=True).encode()).hexdigest()

    @property
    def language_in_dicom(self) -> str:
        """The language as PS3.16 CID 5000 has it: that knows no scripts."""
        return self.tables["language"]["in_dicom"]

    @property
    def meaning(self) -> str:
        """The language's English name."""
        return self.tables["language"]["meaning"]

    @property
    def disclaimer(self) -> str:
        """What every report and picture says of itself."""
        return self.tables["notice"]["disclaimer"]

    @property
    def investigational(self) -> str:
        """What stands beside the values of an investigational network."""
        return self.tables["notice"]["investigational"]

    def text(self, table: str, key: str, **values: object) -> str:
        """One text with its placeholders filled in."""
        return self.tables[table][key].format(**values)

    def flag(self, code: str) -> str:
        """A quality flag's code in words."""
        return self.tables["flag"].get(code, plain(code))

    def flag_text(self, flag: QualityFlag) -> str:
        """A quality flag in words with its severity."""
        return f"{self.flag(flag.code)} ({self.tables['severity'][flag.severity.value]})"

    def join(self, parts: list[str]) -> str:
        """A list as the language writes it."""
        return self.tables["impression"]["list_separator"].join(parts)

    def conclusion(self, result: ScreeningResult) -> str:
        """The one or two sentences that a reader needs first."""
        if result.outcome is Outcome.EXCLUDED:
            return self.text("conclusion", "excluded", reason=self._exclusion(result))
        return self.text("conclusion", (result.category or Category.INDETERMINATE).value)

    def next_step(self, result: ScreeningResult) -> str:
        """What is recommended."""
        if result.outcome is Outcome.EXCLUDED:
            return self.text("next_step", "excluded")
        return self.text("next_step", (result.category or Category.INDETERMINATE).value)

    def impression(self, result: ScreeningResult) -> str:
        """The impression: conclusion, the attenuation it rests on, flags of the study, what was withheld and why."""
        parts = [f"{self.tables['notice']['prefix']} {self.conclusion(result)}"]
        measured = [
            f"{vertebra.level} {vertebra.attenuation_hu.mean:.0f}"
            for vertebra in result.vertebrae
            if vertebra.level in AVERAGED_LEVELS and vertebra.attenuation_hu is not None and not vertebra.blocked
        ]
        if measured:
            parts.append(self.text("impression", "measured", values=self.join(measured)))
            index = decide(result.vertebrae, result.quality_flags).index_hu
            if index is not None:
                corrected = any(vertebra.attenuation_hu_corrected is not None for vertebra in result.vertebrae)
                key = "decided_corrected" if corrected else "decided"
                parts.append(self.text("impression", key, value=f"{index:.0f}"))
        left_out = [str(vertebra.level) for vertebra in result.vertebrae if vertebra.blocked]
        if left_out:
            parts.append(self.text("impression", "left_out", levels=self.join(left_out)))
        if result.quality_flags:
            flags = self.join([self.flag(flag.code) for flag in result.quality_flags])
            parts.append(self.text("impression", "flags", flags=flags))
        return " ".join([*parts, *self.withheld(result)])

    def withheld(self, result: ScreeningResult) -> list[str]:
        """A sentence for each reason for which values of the network are not given."""
        levels: dict[tuple[str, str], list[str]] = {}
        for vertebra in result.vertebrae:
            if vertebra.network is not None:
                for value, reason in vertebra.network.withheld.items():
                    levels.setdefault((reason, value), []).append(str(vertebra.level))
        everywhere = sum(vertebra.network is not None for vertebra in result.vertebrae)
        grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (reason, value), names in levels.items():
            grouped.setdefault((reason, tuple(names)), []).append(self.value(value))
        return [
            self.text(
                "impression",
                "withheld",
                what=self.join(values) + ("" if len(names) == everywhere else f" {self.join(list(names))}"),
                reason=self.reason(reason),
            )
            for (reason, names), values in grouped.items()
        ]

    def t_score_references(self, result: ScreeningResult) -> list[str]:
        """A sentence for each reference population that T-scores of the result compare with."""
        references = [
            vertebra.network.t_score_reference
            for vertebra in result.vertebrae
            if vertebra.network is not None and vertebra.network.t_score_reference
        ]
        return [
            self.text("impression", "t_score_reference", reference=reference) for reference in dict.fromkeys(references)
        ]

    def value(self, name: str) -> str:
        """Name of a network's value: ``bmd``, ``t_score`` or ``class``."""
        return self.tables["value"][name]

    def reason(self, code: str) -> str:
        """Why a value is withheld."""
        return self.tables["reason"].get(code, plain(code))

    def _exclusion(self, result: ScreeningResult) -> str:
        if result.exclusion is None:
            return self.tables["category"]["indeterminate"]
        said = result.exclusion.reason.rstrip(".")
        # the recorded reason is more exact, and English
        return said if self.language == ENGLISH else self.tables["exclusion"].get(result.exclusion.code, said)


@functools.cache
def load_wording(language: str = ENGLISH, templates_dir: Path | None = None) -> Wording:
    """The texts of ``language``; tables in ``templates_dir/<language>.toml`` replace those of the package.

    A table of the site must hold every key with the same placeholders (the tables of flags and exclusions may be
    partial). Nothing may call a study normal.

    Raises:
        ConfigurationError: a file, table or key is missing, unknown or unusable; the message names it.
    """
    if language not in LANGUAGES:
        raise ConfigurationError(f"site.language is {language!r}; it can be {', '.join(LANGUAGES)}")
    shipped = tomllib.loads((files("osteo_daemon.domain") / "texts" / f"{language}.toml").read_text(encoding="utf-8"))
    if templates_dir is None:
        return Wording(language, shipped)
    path = templates_dir / f"{language}.toml"
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"site.templates_dir: {path} cannot be read as TOML: {error}") from error
    merged = dict(shipped)
    for name, table in own.items():
        if name == "language" or name not in shipped or not isinstance(table, dict):
            raise ConfigurationError(f"{path}: [{name}] is no table of texts that a site may set; see docs/report.md")
        _check_table(path, language, name, table, shipped[name])
        merged[name] = {**shipped[name], **table}
    return Wording(language, merged)


def _check_table(path: Path, language: str, name: str, table: Mapping[str, object], shipped: Mapping[str, str]) -> None:
    where = f"{path}: [{name}]"
    missing = [] if name in _FALLS_BACK else [key for key in shipped if key not in table]
    if missing:
        raise ConfigurationError(f"{where} lacks {', '.join(missing)}; a table of your own must be complete")
    for key, text in table.items():
        if key not in shipped and name not in _FALLS_BACK:
            raise ConfigurationError(f"{where} {key} is not a text of reports; it can be {', '.join(shipped)}")
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            raise ConfigurationError(f"{where} {key} must be one line of text")
        wanted = placeholders(shipped[key]) if key in shipped else frozenset[str]()
        try:
            found = placeholders(text)
        except ValueError as error:
            raise ConfigurationError(f"{where} {key}: {error}; write a brace of the text twice") from error
        if found != wanted:
            names = ", ".join(f"{{{each}}}" for each in sorted(wanted)) or "none"
            raise ConfigurationError(f"{where} {key} must hold these placeholders, each plain: {names}")
        word = next((each for each in FORBIDDEN[language] if each in text.lower()), None)
        if word is not None:
            raise ConfigurationError(f"{where} {key} says {word!r}: no report may call a study that")


def placeholders(text: str) -> frozenset[str]:
    """Names between braces in a text; a conversion or a format counts as part of the name.

    Raises:
        ValueError: the braces don't pair.
    """
    found = set()
    for _, name, specification, conversion in string.Formatter().parse(text):
        if name is not None:
            found.add(name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else ""))
    return frozenset(found)
