"""``osteo store``: where the job store is, and the way from SQLite to PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, json_option, tell
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import Settings, load_settings


@click.group()
def store() -> None:
    """Bring the job store to another database."""


@store.command()
@click.option("--to", "target", required=True, help="postgresql://USER@HOST:PORT/DATABASE, without a password in it.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Holds the password of --to; without it OSTEO_STORE__PASSWORD.",
)
@json_option
@config_option
def migrate(target: str, password_file: Path | None, as_json: bool, config: Path | None) -> None:
    """Copy the whole job store from SQLite into an empty PostgreSQL database; the node must not run.

    All of it or nothing: rows and contents are compared before they count there. The SQLite file stays as it is. Images
    and reports stay where they are.
    """
    from pydantic import ValidationError

    from osteo_daemon.jobs.relocation import relocate
    from osteo_daemon.sections.keeping import StoreSettings
    from osteo_daemon.vitals import running_roles

    settings = load_settings(config)
    if settings.database_file is None:
        raise ConfigurationError("[store] url names PostgreSQL already; migrate with the settings of the SQLite store")
    if not settings.database_file.exists():
        raise ConfigurationError(f"{settings.state_dir} holds no job store; has the node run with these settings?")
    if running := running_roles(settings.state_dir):
        raise ConfigurationError(f"the node runs ({', '.join(running)}); stop it first")
    try:
        there = StoreSettings(url=target, password_file=password_file, password=settings.store.password)
    except ValidationError as error:
        raise ConfigurationError(f"--to: {error.errors()[0]['msg']}") from None
    moved: Settings = settings.model_copy(update={"store": there})
    if moved.database_file is not None:
        raise ConfigurationError("--to: postgresql://USER@HOST:PORT/DATABASE")
    done = relocate(settings.database_url, moved.database_url)
    total = sum(done.rows.values())
    document = {"rows": done.rows, "sha256": done.sha256}
    tell(as_json, document, f"{total} rows of {len(done.rows)} tables; now set [store] url and start the node")
