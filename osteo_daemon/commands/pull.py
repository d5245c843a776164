"""``osteo pull``: find studies in an archive and fetch them, gently, and never twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json, tell
from osteo_daemon.commands.pull_view import counts_text, progress_bar, pull_row, study_row
from osteo_daemon.errors import ConfigurationError, Damaged, IllegalTransition, Transient
from osteo_daemon.settings import ArchiveSettings, PullSettings, Settings

if TYPE_CHECKING:
    from osteo_daemon.domain.archive import Span
    from osteo_daemon.jobs.pull_rows import Pull
    from osteo_daemon.jobs.store import JobStore
    from osteo_daemon.pull.search import Identities

_DATE = click.DateTime(["%Y-%m-%d", "%Y%m%d"])
_LIST = click.Path(exists=True, dir_okay=False, path_type=Path)
_FAILED_SHOWN = 50

_pull_argument = click.argument("pull_id", type=int)


@click.group()
def pull() -> None:
    """Find studies in an archive of [[archives]] and fetch them."""


def _gently(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--per-hour", type=click.IntRange(0), help="Studies in an hour; instead of [pull]."),
        click.option("--between", help="Only at these hours, as 20:00-06:00; instead of [pull]."),
        click.option("--accessions", type=_LIST, help="A file with accession numbers, one a line; never kept."),
        click.option("--patients", type=_LIST, help="A file with Patient IDs, one a line; never kept."),
    ):
        command = option(command)
    return command


@pull.command()
@click.argument("archive")
@click.option("--from", "since", type=_DATE, help="First study date.")
@click.option("--to", "until", type=_DATE, help="Last study date; today by default.")
@click.option(
    "--days", type=click.IntRange(1), help="Study dates of the last so many days, today among them; for timers."
)
@click.option("--modality", "modalities", multiple=True, default=("CT",), show_default=True, help="Of the series.")
@click.option(
    "--body-part", "body_parts", multiple=True, help="Body Part Examined; series without one are fetched too."
)
@click.option("--description", default="", help="Pattern of the study description: '*ABD*'; case does not matter.")
@click.option("--whole-study", is_flag=True, help="Every series, not only those of the modalities and body parts.")
@click.option("--limit", type=click.IntRange(1), help="So many studies at most of which nothing is here yet.")
@click.option("--again", is_flag=True, help="Also studies that were screened and whose images were removed since.")
@click.option("--dry-run", is_flag=True, help="Ask and count only.")
@_gently
@config_option
@json_option
def start(
    archive: str,
    since: datetime | None,
    until: datetime | None,
    days: int | None,
    modalities: tuple[str, ...],
    body_parts: tuple[str, ...],
    description: str,
    whole_study: bool,
    limit: int | None,
    again: bool,
    dry_run: bool,
    patients: Path | None,
    accessions: Path | None,
    between: str | None,
    per_hour: int | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Find studies in ARCHIVE and fetch them; Ctrl-C ends it, `osteo pull resume` goes on."""
    from osteo_daemon.domain.archive import Wanted
    from osteo_daemon.pull.criteria import Criteria

    settings, store = open_store(config)
    entry = _archive(settings, archive)
    identities = _identities(patients, accessions)
    if days is not None:
        if since is not None or until is not None:
            raise click.UsageError("--days, or --from and --to")
        since = datetime.combine(_today() - timedelta(days=days - 1), datetime.min.time())
    if since is None and until is None and identities is None:
        raise click.UsageError("say which: --from and --to, --days, --patients or --accessions")
    wanted = Wanted(
        tuple(value.upper() for value in modalities),
        tuple(value.upper() for value in body_parts),
        description,
        whole_study,
    )
    listed = 0 if identities is None else len(identities.values)
    criteria = Criteria(wanted, _span(since, until), listed, limit or 0, again)
    if dry_run:
        _count(settings, entry, store, criteria, identities, as_json)
        return
    pull_id = store.create_pull(entry.name, criteria.document())
    click.echo(f"pull {pull_id}", err=True)
    _run(settings, entry, store, pull_id, identities, _pace(settings.pull, between, per_hour), as_json)


@pull.command()
@_pull_argument
@click.option("--failed", is_flag=True, help="Give studies that failed new attempts.")
@_gently
@config_option
@json_option
def resume(
    pull_id: int,
    failed: bool,
    patients: Path | None,
    accessions: Path | None,
    between: str | None,
    per_hour: int | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Go on with a pull that was stopped, killed or cancelled."""
    from osteo_daemon.jobs.pull_rows import PullState
    from osteo_daemon.pull.criteria import Criteria

    settings, store = open_store(config)
    known = _pull(store, pull_id)
    entry = _archive(settings, known.archive)
    identities = _identities(patients, accessions)
    unfinished = known.state in (PullState.SEARCHING, PullState.CANCELLED)
    if unfinished and Criteria.of(known.criteria).listed and identities is None:
        raise click.UsageError("its search with a list had not ended, and lists are never kept: give the list again")
    store.reopen_pull(pull_id, failed_too=failed)
    _run(settings, entry, store, pull_id, identities, _pace(settings.pull, between, per_hour), as_json)


@pull.command()
@_pull_argument
@json_option
@config_option
def cancel(pull_id: int, as_json: bool, config: Path | None) -> None:
    """End a pull; what was fetched stays. A process that has it in hand stops within seconds."""
    from osteo_daemon.jobs.pull_rows import PullState

    _settings, store = open_store(config)
    _pull(store, pull_id)
    try:
        store.change_pull(pull_id, PullState.CANCELLED)
    except IllegalTransition as error:
        raise Damaged(error.detail) from error
    tell(as_json, pull_row(store, store.pull(pull_id)), f"pull {pull_id} cancelled")


@pull.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The newest so many.")
@config_option
@json_option
def list_pulls(limit: int, config: Path | None, as_json: bool) -> None:
    """List pulls, the newest first."""
    _settings, store = open_store(config)
    rows = [pull_row(store, entry) for entry in store.pulls(limit)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no pulls")
    for row in rows:
        click.echo(f"{row['pull_id']:>5} {row['state']:<9} {row['archive']:<12} {counts_text(row['studies'])}")


@pull.command()
@_pull_argument
@config_option
@json_option
def status(pull_id: int, config: Path | None, as_json: bool) -> None:
    """Say where a pull stands and which of its studies failed, and why."""
    from osteo_daemon.jobs.pull_rows import PulledState

    _settings, store = open_store(config)
    row = pull_row(store, _pull(store, pull_id))
    failed = store.pulled_studies(pull_id, PulledState.FAILED)
    waiting = [
        entry
        for entry in store.pulled_studies(pull_id, PulledState.WANTED)
        if entry.attempts or entry.detail is not None
    ]
    if as_json:
        row["failed"] = [study_row(asdict(entry)) for entry in failed]
        row["waiting"] = [study_row(asdict(entry)) for entry in waiting]
        print_json(row)
        return
    click.echo(f"pull {pull_id} from {row['archive']}: {row['state']}, {counts_text(row['studies'])}")
    for entry in (*failed[:_FAILED_SHOWN], *waiting[:_FAILED_SHOWN]):
        click.echo(f"{entry.state.value:<7} {entry.attempts:>3} attempts  {entry.study_instance_uid}  {entry.detail}")
    if len(failed) > _FAILED_SHOWN:
        click.echo(f"{len(failed) - _FAILED_SHOWN} more failed: --json", err=True)


def _run(
    settings: Settings,
    entry: ArchiveSettings,
    store: JobStore,
    pull_id: int,
    identities: Identities | None,
    pace: PullSettings,
    as_json: bool,
) -> None:
    from osteo_daemon.audit import trail
    from osteo_daemon.discards import Discards
    from osteo_daemon.intake import DurableIntake
    from osteo_daemon.jobs.pull_rows import PulledState, PullState
    from osteo_daemon.jobs.room import Room
    from osteo_daemon.jobs.spool import Spool
    from osteo_daemon.log import configure_logging
    from osteo_daemon.pull.archive import open_archive, taken_classes
    from osteo_daemon.pull.puller import Puller

    _own_spool(settings, entry)
    limits = settings.receiver
    spool = Spool(settings.spool_dir, minimum_free_bytes=limits.minimum_free_bytes)
    room = Room(settings.spool_dir, limits.minimum_free_bytes, limits.low_watermark_bytes)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    with progress_bar(as_json) as show:
        configure_logging(settings.log, "pull")
        trail.open_trail(settings, "pull")
        intake = DurableIntake(spool, store, discards=Discards(settings.accompanying), room=room)
        archive = open_archive(settings, entry, stopping)
        puller = Puller(
            pace,
            store,
            room,
            archive,
            intake,
            entry.maximum_matches,
            taken_classes(settings.accompanying),
            stopping,
            show,
        )
        try:
            state = puller.run(pull_id, identities)
        except IllegalTransition as error:
            raise Damaged(error.detail) from error
        except Transient as error:
            raise type(error)(f"{error.detail}; go on with osteo pull resume {pull_id}") from error
    row = pull_row(store, store.pull(pull_id))
    if as_json:
        print_json(row)
    else:
        click.echo(f"pull {pull_id}: {row['state']}, {counts_text(row['studies'])}")
        if state in (PullState.SEARCHING, PullState.FETCHING):
            click.echo(f"go on with osteo pull resume {pull_id}", err=True)
    done = state is PullState.DONE and not row["studies"][PulledState.FAILED.value]
    sys.exit(0 if done else 1)


def _count(
    settings: Settings,
    entry: ArchiveSettings,
    store: JobStore,
    criteria: Any,
    identities: Identities | None,
    as_json: bool,
) -> None:
    from osteo_daemon.audit import trail
    from osteo_daemon.pull.archive import open_archive
    from osteo_daemon.pull.search import search

    trail.open_trail(settings, "pull")
    stopping = threading.Event()
    archive = open_archive(settings, entry, stopping)
    found: Counter[str] = Counter()
    with archive.catalogue() as catalogue:
        for study in search(
            catalogue,
            criteria.wanted,
            criteria.span,
            entry.maximum_matches,
            identities=identities,
            stopping=stopping,
        ):
            found["studies"] += 1
            found["instances"] += study.instances or 0
            found["instances_unknown"] += study.instances is None
            here = store.study_here(study.study_instance_uid)
            found["known_here"] += bool(here.stored) or here.removed
            if criteria.limit and found["studies"] - found["known_here"] == criteria.limit:
                break
    keys = ("studies", "known_here", "instances", "instances_unknown")
    document = {key: found[key] for key in keys}
    if as_json:
        print_json(document)
        return
    click.echo(
        f"{document['studies']} studies, of {document['known_here']} something is here; {document['instances']} "
        f"instances in all, {document['instances_unknown']} studies of unknown size. Nothing was fetched."
    )


def _archive(settings: Settings, name: str) -> ArchiveSettings:
    for entry in settings.archives:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in settings.archives) or "none"
    raise ConfigurationError(f"no archive {name} among [[archives]]; there are: {known}")


def _identities(patients: Path | None, accessions: Path | None) -> Identities | None:
    from osteo_daemon.pull.search import read_identities

    if patients is not None and accessions is not None:
        raise click.UsageError("--patients or --accessions, not both")
    if accessions is not None:
        return read_identities(accessions, orders=True)
    return None if patients is None else read_identities(patients, orders=False)


def _span(since: datetime | None, until: datetime | None) -> Span | None:
    from osteo_daemon.domain.archive import FIRST_DAY, Span

    if since is None and until is None:
        return None
    first = FIRST_DAY if since is None else since.date()
    last = _today() if until is None else until.date()
    if last < first:
        raise click.UsageError("--to lies before --from")
    return Span(first, last)


def _today() -> date:
    return datetime.now().astimezone().date()  # study dates are those of this place


def _pace(settings: PullSettings, between: str | None, per_hour: int | None) -> PullSettings:
    changed: dict[str, Any] = {}
    if between is not None:
        changed["between"] = between
    if per_hour is not None:
        changed["studies_per_hour"] = per_hour
    try:
        return PullSettings.model_validate({**settings.model_dump(), **changed})
    except ValueError:
        raise click.UsageError("--between takes hours as 20:00-06:00") from None


def _own_spool(settings: Settings, entry: ArchiveSettings) -> None:
    # this process writes into the spool itself: the node's other roles must be able to read it
    if entry.retrieve != "c-move" and settings.spool_dir.exists():
        owner = settings.spool_dir.stat().st_uid
        if owner != os.geteuid():
            raise ConfigurationError(f"{settings.spool_dir} belongs to another user (number {owner}): run this as that")


def _pull(store: JobStore, pull_id: int) -> Pull:
    try:
        return store.pull(pull_id)
    except KeyError:
        raise Damaged(f"no pull {pull_id}; see osteo pull list") from None
