"""What the sub-commands of ``osteo`` share: options, and the way to the job store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.settings import Settings, load_settings

if TYPE_CHECKING:
    # the job store is imported where a command needs it: `osteo --help` doesn't wait for it
    from osteo_daemon.jobs.store import JobStore

config_option = click.option(
    "--config",
    envvar="OSTEO_CONFIG",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Settings file (osteo.toml); without it, defaults and OSTEO_... variables.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def not_blank(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Click's callback for a text that must say something."""
    if not value.strip():
        raise click.BadParameter("say why")
    return value


reason_option = click.option(
    "--reason", required=True, callback=not_blank, help="Why; kept in the study's history. No patient's name."
)


def moment(_context: click.Context, _parameter: click.Parameter, value: datetime | None) -> datetime | None:
    """Click's callback for a date or time, which is in UTC."""
    return None if value is None else value.replace(tzinfo=UTC)


def open_store(config: Path | None) -> tuple[Settings, JobStore]:
    """The settings and the job store that they name.

    Raises:
        ConfigurationError: there is none.
    """
    from osteo_daemon.jobs.store import JobStore

    settings = load_settings(config)
    if settings.database_file is not None and not settings.database_file.exists():
        raise ConfigurationError(f"{settings.state_dir} holds no job store; has the node run with these settings?")
    return settings, JobStore(settings.database_url)


def print_json(document: Any) -> None:
    """Print for programs."""
    click.echo(json.dumps(document, indent=2))


def echo_fields(document: Mapping[str, Any]) -> None:
    """Print for people, a line for each that has a value."""
    for key, value in document.items():
        if value is not None:
            click.echo(f"{key:<15} {value}")


def tell(as_json: bool, document: Any, line: str) -> None:
    """Say what was done: for programs, or for people in a line."""
    if as_json:
        print_json(document)
    else:
        click.echo(line)


def unknown_study(study_instance_uid: str) -> Damaged:
    """The error of a command that names a study that isn't there."""
    return Damaged(f"no study {study_instance_uid}; see osteo studies list")
