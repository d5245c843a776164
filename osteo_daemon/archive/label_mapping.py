"""Which column of a file holds what: a small TOML, or the names that are used without one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from osteo_daemon.domain.densitometry import BMD_LEVELS
from osteo_daemon.errors import ConfigurationError

COLUMNS: Final = (
    "patient_id",
    "issuer",
    "birth_date",
    "accession",
    "date",
    "maker",
    "model",
    "unit",
    "level",
    "bmd",
    "t_score",
)
_CONSTANTS: Final = ("issuer", "maker", "model", "unit")


@dataclass(frozen=True, slots=True)
class LabelMapping:
    """How a file is read.

    Attributes:
        columns: name of ours to the file's; a file with one row for each vertebra has ``level``, ``bmd``, ``t_score``.
        levels: for files with one row for each patient: level to the columns of its BMD and T-score.
        constants: what the file does not say because it is always the same.
        observations: HL7 observation identifiers (OBX-3.1) to level and ``bmd`` or ``t_score``.
        date_format: of strptime.
        sheet: of a workbook; empty takes the only one.
        delimiter: of a CSV.
    """

    columns: Mapping[str, str] = field(default_factory=lambda: {name: name for name in COLUMNS})
    levels: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {level: (f"{level}_bmd", f"{level}_t_score") for level in BMD_LEVELS}
    )
    constants: Mapping[str, str] = field(default_factory=dict)
    observations: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    date_format: str = "%Y-%m-%d"
    sheet: str = ""
    delimiter: str = ","


def read_mapping(path: Path | None) -> LabelMapping:
    """Read a mapping; None gives the names that are used without one.

    Raises:
        ConfigurationError: it cannot be read, or names something unknown.
    """
    if path is None:
        return LabelMapping()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the mapping {path} cannot be read: {error}") from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, path: str) -> LabelMapping:
    """A mapping's text.

    Args:
        text: TOML.
        path: names it in errors.

    Raises:
        ConfigurationError: it is not TOML, or names something unknown.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"the mapping {path} cannot be read: {error}") from error
    known = {"columns", "levels", "constants", "observations", "date_format", "sheet", "delimiter"}
    if strange := sorted(set(document) - known):
        raise ConfigurationError(f"{path}: {strange[0]} is not known; there are {', '.join(sorted(known))}")
    columns = _texts(path, document, "columns", COLUMNS)
    levels = {}
    for level, names in document.get("levels", {}).items():
        if level not in BMD_LEVELS or not isinstance(names, dict) or set(names) - {"bmd", "t_score"}:
            raise ConfigurationError(f"{path}: levels.{level} must be one of {', '.join(BMD_LEVELS)} with bmd, t_score")
        levels[level] = (str(names.get("bmd", "")), str(names.get("t_score", "")))
    observations = {}
    for code, meaning in document.get("observations", {}).items():
        level, _, what = str(meaning).partition(" ")
        if level not in BMD_LEVELS or what not in ("bmd", "t_score"):
            raise ConfigurationError(f'{path}: observations.{code} must read "L1 bmd" or "L1 t_score" with its level')
        observations[str(code)] = (level, what)
    return LabelMapping(
        columns=columns,
        levels=levels,
        constants=_texts(path, document, "constants", _CONSTANTS),
        observations=observations,
        date_format=str(document.get("date_format", "%Y-%m-%d")),
        sheet=str(document.get("sheet", "")),
        delimiter=str(document.get("delimiter", ",")),
    )


def _texts(path: str, document: Mapping[str, Any], table: str, allowed: tuple[str, ...]) -> dict[str, str]:
    values = document.get(table, {})
    if strange := sorted(set(values) - set(allowed)):
        raise ConfigurationError(f"{path}: {table}.{strange[0]} is not known; there are {', '.join(allowed)}")
    return {name: str(value) for name, value in values.items()}
