"""``osteo``: the command line. Each role is imported in its own sub-command only: the receiver never loads torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from osteo_daemon.commands.archive import archive
from osteo_daemon.commands.audit import audit
from osteo_daemon.commands.completion import completion
from osteo_daemon.commands.conformance import conformance
from osteo_daemon.commands.deliveries import deliveries
from osteo_daemon.commands.drift import drift
from osteo_daemon.commands.labels import labels
from osteo_daemon.commands.models import models
from osteo_daemon.commands.options import config_option, json_option, print_json
from osteo_daemon.commands.pull import pull
from osteo_daemon.commands.reference import reference
from osteo_daemon.commands.refit import refit
from osteo_daemon.commands.report import report
from osteo_daemon.commands.screener import screener
from osteo_daemon.commands.store import store
from osteo_daemon.commands.story import StoryGroup
from osteo_daemon.commands.studies import studies
from osteo_daemon.commands.upkeep import backup, fsck, restore, schedule
from osteo_daemon.commands.users import users
from osteo_daemon.errors import OsteoError, exit_status
from osteo_daemon.quick_imports import quick_imports
from osteo_daemon.roles import ROLES
from osteo_daemon.settings import Settings, load_settings

PRIVATE_UMASK = 0o077
"""What the node writes holds patients' images: for its own user alone."""


@click.group(cls=StoryGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="osteo-daemon", prog_name="osteo")
def cli() -> None:
    """A DICOM node that screens abdominal CT for osteoporosis and answers with structured reports.

    Exit status: 0 done, 1 something is amiss, 2 wrong usage, settings or bundle, 3 what was named can't be used,
    4 not now: try again later.
    """


@cli.command()
@config_option
def serve(config: Path | None) -> None:
    """Run the whole node on this machine: every role a child process; stop with SIGTERM or Ctrl-C."""
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
@json_option
@config_option
def screen(folder: Path, out: Path, as_json: bool, config: Path | None) -> None:
    """Screen the DICOM files of one study below FOLDER.

    Writes result.json, report.dcm, segmentation.dcm, picture.dcm, picture.png and manifest.json to the folder of --out
    (an excluded study: result.json and manifest.json).
    """
    _let_idle_threads_sleep()
    with quick_imports():
        from osteo_daemon.folder import screen_folder

    screening = screen_folder(load_settings(config), folder, out)
    if as_json:
        print_json(screening.result.to_json())


@cli.command()
@json_option
@config_option
def check(as_json: bool, config: Path | None) -> None:
    """Verify settings, folders, disk, model digests and GPU, and C-ECHO every destination."""
    from osteo_daemon.readiness import check_node

    findings = check_node(load_settings(config))
    if as_json:
        print_json([{"check": f.name, "ok": f.ok, "detail": f.detail} for f in findings])
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


def _let_idle_threads_sleep() -> None:
    # OpenMP's threads spin while they wait: beside other work on the same cores that made a screening 15 times slower.
    # The library reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cli.command()
@click.option(
    "--out",
    default=Path("demo-output"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the report, its objects and pictures.",
)
def demo(out: Path) -> None:
    """Send a virtual patient through the whole node and show the report; a local test PACS takes the results."""
    from osteo_daemon.demo import run_demo

    sys.exit(run_demo(out))


@cli.command("test-pacs")
@click.option("--port", required=True, type=int, help="To listen on, at 127.0.0.1.")
@click.option("--ae-title", default="TESTPACS", show_default=True, help="What it is called.")
@click.option("--folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="For what it gets.")
def test_pacs(port: int, ae_title: str, folder: Path) -> None:
    """A small PACS on loopback that keeps structured reports, segmentations and pictures."""
    from osteo_daemon.dicom.test_pacs import serve_test_pacs

    serve_test_pacs(ae_title, port, folder)


for command in (
    archive,
    audit,
    backup,
    completion,
    conformance,
    deliveries,
    drift,
    fsck,
    labels,
    models,
    pull,
    reference,
    refit,
    report,
    restore,
    schedule,
    screener,
    store,
    studies,
    users,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of ``osteo``: errors of the product become one line and an exit status."""
    try:
        cli(standalone_mode=True)
    except OsteoError as error:
        click.echo(f"osteo: {error}", err=True)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
