"""``osteo report``: our structured reports for people and programs."""

from __future__ import annotations

from pathlib import Path

import click

from osteo_daemon.commands.options import json_option, print_json


@click.group()
def report() -> None:
    """Read our reports."""


@report.command("show")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def show_report(file: Path, as_json: bool) -> None:
    """Print one of our structured reports as text, or with --json the result that it tells."""
    from osteo_daemon.dicom.report_reader import parse_report, read_report
    from osteo_daemon.dicom.report_text import format_report

    dataset = read_report(file)
    if as_json:
        print_json(parse_report(dataset).to_json())
    else:
        click.echo(format_report(dataset))
