"""Every setting with its value and where that comes from; secrets are never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr
from starlette.responses import Response

from osteo_daemon.console.pages import Visit
from osteo_daemon.settings import ENVIRONMENT_PREFIX, Settings

_WHOSE_PATH_IS_A_KEY = frozenset({"webhook_url"})
"""Addresses at which whoever knows them may post."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One setting.

    Attributes:
        key: its name in its section.
        value: as text; a secret is a word that says so.
        origin: ``default``, ``osteo.toml``, or the variable that set it.
    """

    key: str
    value: str
    origin: str


def show_settings(visit: Visit) -> Response:
    """All sections."""
    return visit.show("settings.html", sections=sections_of(visit.node.settings, os.environ))


def sections_of(settings: Settings, environment: Mapping[str, str]) -> dict[str, list[Shown]]:
    """Title of a section to its settings, in the order of the model; entries of a list are sections of their own."""
    variables = {name.lower(): name for name in environment if name.startswith(ENVIRONMENT_PREFIX)}
    found: dict[str, list[Shown]] = {"": []}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            given = value.model_fields_set if name in settings.model_fields_set else frozenset[str]()
            found[f"[{name}]"] = list(_keys(value, given, name, variables))
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for number, entry in enumerate(value, 1):
                found[f"[[{name}]] {number}"] = list(_keys(entry, entry.model_fields_set, "", {}))
        else:
            origin = _origin(name, settings.model_fields_set, "", variables)
            found[""].append(Shown(name, _text(value), origin))
    return found


def _keys(
    section: BaseModel, given: frozenset[str] | set[str], prefix: str, variables: Mapping[str, str]
) -> Iterator[Shown]:
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            for inner in _keys(value, value.model_fields_set if key in given else frozenset(), "", {}):
                yield Shown(f"{key}.{inner.key}", inner.value, inner.origin)
        else:
            shown = _host(value) if key in _WHOSE_PATH_IS_A_KEY and value else _text(value)
            yield Shown(key, shown, _origin(key, given, prefix, variables))


def _origin(key: str, given: frozenset[str] | set[str], prefix: str, variables: Mapping[str, str]) -> str:
    full = f"{ENVIRONMENT_PREFIX.lower()}{prefix}__{key}" if prefix else f"{ENVIRONMENT_PREFIX.lower()}{key}"
    if full in variables:
        return variables[full]
    return "osteo.toml" if key in given else "default"


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/… (the rest is not shown)"


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "set, not shown"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list | frozenset | set):
        return ", ".join(_text(entry) for entry in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, Path):
        return str(value)
    return str(value) if value != "" else "empty"
