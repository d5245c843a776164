"""``osteo``: the command line. Each role is imported in its own sub-command only: the receiver never loads torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from osteo_daemon.commands.archive import archive
from osteo_daemon.commands.audit import audit
from osteo_daemon.commands.conformance import conformance
from osteo_daemon.commands.deliveries import deliveries
from osteo_daemon.commands.drift import drift
from osteo_daemon.commands.labels import labels
from osteo_daemon.commands.models import models
from osteo_daemon.commands.options import config_option, not_blank
from osteo_daemon.commands.pull import pull
from osteo_daemon.commands.refit import refit
from osteo_daemon.commands.studies import studies
from osteo_daemon.commands.upkeep import backup, fsck, restore, schedule
from osteo_daemon.commands.users import users
from osteo_daemon.errors import ConfigurationError, OsteoError
from osteo_daemon.quick_imports import quick_imports
from osteo_daemon.roles import ROLES
from osteo_daemon.settings import Settings, load_settings

EXIT_DAMAGED = 3
"""Exit status of `osteo screen` when the folder can't be used."""

PRIVATE_UMASK = 0o077
"""What the node writes holds patients' images: for its own user alone."""

_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="osteo-daemon", prog_name="osteo")
def cli() -> None:
    """A DICOM node that screens abdominal CT for osteoporosis and answers with structured reports.

    \b
    osteo check    is this node ready?
    osteo serve    run the whole node on this machine
    osteo run      run one role of it (systemd, containers)
    osteo screen   screen a folder of DICOM files, no PACS needed
    osteo studies  what came in and what became of it
    osteo deliveries  what goes to which destination and what became of it
    osteo pull     find studies in an archive and fetch them
    osteo screener pause, resume or drain the screening
    osteo schedule what the scheduler did and will do
    osteo fsck     do job store, spool and digests agree?
    osteo backup   copy store and spool while the node runs; osteo restore brings them back
    osteo archive  vertebrae kept under pseudonyms for refits
    osteo refit    refit the network channel for this site's densitometers
    osteo labels   densitometry of those vertebrae: import, status
    osteo users    who may log in to the web console
    osteo report   read our reports as text
    osteo conformance  the DICOM conformance statement of this node
    osteo demo     a virtual patient through the whole node

    Exit status: 0 done, 1 the node is not as it should be, 2 wrong usage or settings, 3 what was named cannot be used.
    """


@cli.command()
@config_option
def serve(config: Path | None) -> None:
    """Run receiver, scheduler, screener and deliverer as child processes; stop with SIGTERM or Ctrl-C."""
    os.umask(PRIVATE_UMASK)
    from osteo_daemon import supervisor

    sys.exit(supervisor.serve(load_settings(config), config))


@cli.command()
@click.argument("role", type=click.Choice(ROLES))
@config_option
def run(role: str, config: Path | None) -> None:
    """Run one ROLE in the foreground; stop with SIGTERM or Ctrl-C."""
    settings = load_settings(config)
    os.umask(PRIVATE_UMASK)
    _let_idle_threads_sleep()
    entry: Callable[[Settings], int]
    with quick_imports():
        if role == "receiver":
            from osteo_daemon.receiver import run as entry
        elif role == "dicomweb":
            from osteo_daemon.dicomweb_receiver import run as entry
        elif role == "puller":
            from osteo_daemon.pull_runner import run as entry
        elif role == "scheduler":
            from osteo_daemon.scheduler import run as entry
        elif role == "screener":
            from osteo_daemon.screener import run as entry
        elif role == "refitter":
            from osteo_daemon.refitter import run as entry
        elif role == "console":
            from osteo_daemon.console.role import run as entry
        elif role == "monitor":
            from osteo_daemon.monitor.role import run as entry
        else:
            from osteo_daemon.deliverer import run as entry
        from osteo_daemon.audit import trail

    with trail.application(settings, role):
        status = entry(settings)
    sys.exit(status)


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
@config_option
def screen(folder: Path, out: Path, config: Path | None) -> None:
    """Screen the DICOM files of one study below FOLDER.

    Writes result.json, report.dcm, segmentation.dcm, picture.dcm, picture.png and manifest.json to the folder of --out
    (an excluded study: result.json and manifest.json).
    """
    _let_idle_threads_sleep()
    with quick_imports():
        from osteo_daemon.folder import screen_folder

    screen_folder(load_settings(config), folder, out)


@cli.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(config: Path | None, as_json: bool) -> None:
    """Verify settings, folders, disk, model digests and GPU, and C-ECHO every destination."""
    from osteo_daemon.readiness import check_node

    findings = check_node(load_settings(config))
    if as_json:
        click.echo(json.dumps([{"check": f.name, "ok": f.ok, "detail": f.detail} for f in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


def _let_idle_threads_sleep() -> None:
    # OpenMP's threads spin while they wait: beside other work on the same cores that made a screening 15 times slower.
    # The library reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


cli.add_command(conformance)
cli.add_command(deliveries)
cli.add_command(drift)
cli.add_command(archive)
cli.add_command(labels)
cli.add_command(models)
cli.add_command(pull)
for command in (studies, fsck, backup, restore, schedule, audit, refit, users):
    cli.add_command(command)


@cli.group()
def screener() -> None:
    """Pause, resume or drain the screeners of this node."""


def _wish(name: str, mode: str, help_text: str) -> None:
    @screener.command(name, help=help_text)
    @click.option("--reason", required=True, callback=not_blank, help="Why; kept until the next word.")
    @config_option
    def say(reason: str, config: Path | None) -> None:
        from osteo_daemon.control import Mode, write_wish

        write_wish(load_settings(config).state_dir, Mode(mode), "operator", reason)
        click.echo(f"{name}: said to every screener of this node")


_wish("pause", "pause", "Finish the study in hand and claim no other; the models stay loaded.")
_wish("resume", "run", "Claim studies again.")
_wish("drain", "drain", "Finish the study in hand, claim no other and unload the models: the GPU is free.")


@screener.command("status")
@config_option
def screener_status(config: Path | None) -> None:
    """Print as JSON what was last said to the screeners and what each of them says of itself."""
    from dataclasses import asdict

    from osteo_daemon.control import read_wish, screener_statuses

    state_dir = load_settings(config).state_dir
    click.echo(json.dumps({"wish": asdict(read_wish(state_dir)), "screeners": screener_statuses(state_dir)}, indent=2))


@cli.group()
def report() -> None:
    """Read our reports."""


@report.command("show")
@click.argument("file", type=_EXISTING_FILE)
def show_report(file: Path) -> None:
    """Print one of our structured reports as text."""
    from osteo_daemon.dicom.report_reader import read_report
    from osteo_daemon.dicom.report_text import format_report

    click.echo(format_report(read_report(file)))


@cli.command()
@click.option("--out", default=Path("demo-output"), show_default=True, type=click.Path(file_okay=False, path_type=Path))
def demo(out: Path) -> None:
    """Send a virtual patient through the whole node and show the report; a local test PACS takes the results."""
    from osteo_daemon.demo import run_demo

    sys.exit(run_demo(out))


@cli.command("test-pacs")
@click.option("--port", required=True, type=int)
@click.option("--ae-title", default="TESTPACS", show_default=True)
@click.option("--folder", required=True, type=click.Path(file_okay=False, path_type=Path))
def test_pacs(port: int, ae_title: str, folder: Path) -> None:
    """A small PACS on loopback that keeps structured reports, segmentations and pictures: for trying the node out."""
    from osteo_daemon.dicom.test_pacs import serve_test_pacs

    serve_test_pacs(ae_title, port, folder)


def main() -> None:
    """Entry point of ``osteo``: errors of the product become one line and an exit status."""
    try:
        cli(standalone_mode=True)
    except ConfigurationError as error:
        click.echo(f"osteo: {error}", err=True)
        sys.exit(2)
    except OsteoError as error:
        click.echo(f"osteo: {error}", err=True)
        sys.exit(EXIT_DAMAGED)


if __name__ == "__main__":
    main()
