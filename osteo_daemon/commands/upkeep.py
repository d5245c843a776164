"""``osteo fsck``, ``osteo backup``, ``osteo restore``, ``osteo schedule``: what keeps a node's memory sound."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json, tell
from osteo_daemon.settings import load_settings

_MINUTE_SECONDS = 60
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--repair", is_flag=True, help="Take up received files without a row, count anew, remove leftovers.")
@click.option("--quick", is_flag=True, help="Compare sizes only, not digests.")
@json_option
@config_option
def fsck(repair: bool, quick: bool, as_json: bool, config: Path | None) -> None:
    """Compare job store, spool and digests. The node may run meanwhile; nothing received is ever removed.

    Exit status 0: all agrees (notes are no error); 1: something is wrong.
    """
    from osteo_daemon.archive.store import VoiArchive
    from osteo_daemon.integrity import check_integrity
    from osteo_daemon.jobs.spool import Spool

    settings, store = open_store(config)
    report = check_integrity(store, Spool(settings.spool_dir), repair=repair, digests=not quick)
    # of the archive it only tells: osteo archive verify --repair gives up what is broken; leftovers go by themselves
    archived = [f for f in VoiArchive(settings, store).verify(digests=not quick) if f.problem != "leftover"]
    clean = report.clean and not archived
    if as_json:
        print_json(
            {
                "studies": report.studies,
                "files": report.files,
                "size_bytes": report.size_bytes,
                "clean": clean,
                "archive": [{"problem": finding.problem, "detail": finding.detail} for finding in archived],
                "findings": [
                    {
                        "problem": finding.problem.value,
                        "error": finding.is_error,
                        "repaired": finding.repaired,
                        "study_instance_uid": finding.study_instance_uid,
                        "detail": finding.detail,
                    }
                    for finding in report.findings
                ],
            }
        )
    else:
        for finding in report.findings:
            word = "repaired" if finding.repaired else "ERROR" if finding.is_error else "note"
            click.echo(f"{word:<9} {finding.problem.value}: {finding.detail}")
        for kept in archived:
            click.echo(f"ERROR     archive, {kept.problem}: {kept.detail}")
        size = f"{report.size_bytes / 1e9:.1f} GB"
        click.echo(f"{report.studies} studies, {report.files} files, {size}: {'clean' if clean else 'not clean'}")
    sys.exit(0 if clean else 1)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--spool/--no-spool", default=True, show_default=True, help="Images and reports too.")
@json_option
@config_option
def backup(folder: Path, spool: bool, as_json: bool, config: Path | None) -> None:
    """Back up to FOLDER, which must not exist, while the node runs.

    Images and reports are hard links where FOLDER is on the same file system: quick and small, but to be brought to
    another disk afterwards.
    """
    from osteo_daemon.jobs.backup import make_backup

    settings, store = open_store(config)
    store.close()
    made = make_backup(settings.database_url, settings.spool_dir, folder.resolve(), spool=spool)
    size = f"job store of {made.store_bytes / 1e6:.1f} MB, {made.files} files of {made.size_bytes / 1e9:.1f} GB"
    document = {"store_bytes": made.store_bytes, "files": made.files, "size_bytes": made.size_bytes}
    tell(as_json, {"folder": str(folder.resolve()), **document}, f"{folder}: {size}")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
@config_option
def restore(folder: Path, as_json: bool, config: Path | None) -> None:
    """Put the backup FOLDER where these settings have no job store yet; the node must not run."""
    from osteo_daemon.jobs.backup import restore_backup

    settings = load_settings(config)
    store = restore_backup(folder, settings.database_url, settings.database_file, settings.spool_dir)
    studies = sum(store.counts_by_state().values())
    tell(as_json, {"studies": studies}, f"{studies} studies restored; now run: osteo fsck --repair")


@click.command()
@json_option
@config_option
def schedule(as_json: bool, config: Path | None) -> None:
    """What the scheduler does, when it did it last, and when it will again."""
    _settings, store = open_store(config)
    runs = store.scheduler_runs()
    if as_json:
        print_json([run.to_json() for run in runs])
        return
    if not runs:
        click.echo("the scheduler has not run yet")
    for run in runs:
        last = "never" if run.started_at is None else f"{run.started_at:%Y-%m-%d %H:%M:%S}"
        coming = "unknown" if run.next_at is None else f"{run.next_at:%Y-%m-%d %H:%M:%S}"
        if run.interval_seconds < _MINUTE_SECONDS:
            coming = f"every {run.interval_seconds:g} s"  # its row is written once a minute
        trouble = f", {run.failures} failed" * bool(run.failures) + f", {run.missed} missed" * bool(run.missed)
        outcome = f"  {run.outcome or ''}{': ' + run.detail if run.detail else ''}"
        click.echo(f"{run.step:<20} last {last}  next {coming}  {run.runs} runs{trouble}{outcome}")
