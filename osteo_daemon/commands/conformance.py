"""``osteo conformance``: the DICOM conformance statement of this node."""

from __future__ import annotations

from pathlib import Path

import click

from osteo_daemon.commands.options import config_option
from osteo_daemon.settings import load_settings


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; standard output without.")
@config_option
def conformance(out: Path | None, config: Path | None) -> None:
    """Write the DICOM conformance statement (PS3.2) of this node."""
    from osteo_daemon.conformance.statement import conformance_statement

    text = conformance_statement(load_settings(config))
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
