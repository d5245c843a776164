"""``osteo studies``: what came in and what became of it, and what a person may do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import (
    config_option,
    json_option,
    moment,
    open_store,
    print_json,
    reason_option,
    unknown_study,
)
from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.settings import load_settings

if TYPE_CHECKING:
    from osteo_daemon.jobs.records import JobSummary
    from osteo_daemon.jobs.store import JobStore

OPERATOR = "operator"
"""Who acts in events that a command leaves."""

_WHEN = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])
_MOST_ROWS = 1000
_study_argument = click.argument("study_instance_uid")


class _Named(click.Choice[str]):
    """A choice among the names of an enumeration, in any case."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names, case_sensitive=False)


@click.group()
def studies() -> None:
    """What came in and what became of it."""


@studies.command("list")
@config_option
@click.option("--state", type=_Named([state.value for state in JobState]), help="Only studies in this state.")
@click.option("--source", "source_ae", help="Only studies of this calling AE title.")
@click.option("--code", help="Only with this code of exclusion, hold, error or failure.")
@click.option("--since", type=_WHEN, callback=moment, help="Only those whose first image came at or after (UTC).")
@click.option("--until", type=_WHEN, callback=moment, help="Only those whose first image came before (UTC).")
@click.option("--limit", type=click.IntRange(1, _MOST_ROWS), default=50, show_default=True, help="Rows of a page.")
@click.option("--before", "before_job_id", type=int, help="Next page: the number that the last one ended with.")
@json_option
def list_studies(
    config: Path | None,
    state: str | None,
    source_ae: str | None,
    code: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    before_job_id: int | None,
    as_json: bool,
) -> None:
    """List studies, the newest first, a page at a time."""
    _settings, store = open_store(config)
    page = store.recent(
        state=None if state is None else JobState(state.upper()),
        source_ae=source_ae,
        code=code,
        since=since,
        until=until,
        before_job_id=before_job_id,
        limit=limit,
    )
    if as_json:
        print_json([_row(job) for job in page])
        return
    if not page:
        click.echo("no studies")
    for job in page:
        why = f"  {job.code}: {job.detail}" if job.code else ""
        turn = "" if job.priority is Priority.ROUTINE else f"  {job.priority.name.lower()}"
        click.echo(
            f"{job.state.value:<10} r{job.revision} {job.instances:>5} images  "
            f"{job.changed_at.isoformat(timespec='seconds')}  {job.study_instance_uid}{turn}{why}"
        )
    if len(page) == limit:
        click.echo(f"more: --before {page[-1].job_id}", err=True)


@studies.command("show")
@_study_argument
@config_option
def show_study(study_instance_uid: str, config: Path | None) -> None:
    """Print one study as JSON: its job, its history, its result, its report objects and their deliveries."""
    _settings, store = open_store(config)
    jobs = store.recent(study_instance_uid=study_instance_uid, limit=1)
    job = store.job(study_instance_uid)
    if not jobs or job is None:
        raise unknown_study(study_instance_uid)
    print_json(
        {
            **_row(jobs[0]),
            "bundles": {"localizer": job.localizer_bundle, "network": job.network_bundle},
            "events": [
                {
                    "at": event.at.isoformat(),
                    "who": event.who,
                    "event": event.event,
                    "to_state": None if event.to_state is None else event.to_state.value,
                    "revision": event.revision,
                    "reason": event.reason,
                }
                for event in store.events(study_instance_uid)
            ],
            "result": store.result(study_instance_uid),
            "report_objects": [
                {"kind": entry.kind.value, "sop_instance_uid": entry.sop_instance_uid, "sha256": entry.sha256}
                for entry in store.report_objects(study_instance_uid, also_removed=True)
            ],
            "deliveries": [
                {
                    "destination": entry.destination,
                    "revision": entry.revision,
                    "state": entry.state.value,
                    "attempts": entry.attempts,
                    "detail": entry.detail,
                }
                for entry in store.deliveries(study_instance_uid=study_instance_uid)
            ],
        }
    )


@studies.command("hold")
@_study_argument
@reason_option
@config_option
def hold(study_instance_uid: str, reason: str, config: Path | None) -> None:
    """Stop a study; nothing is deleted, and it waits for `release` or `retry`."""
    _act("hold", study_instance_uid, config, lambda store: store.hold_study(study_instance_uid, OPERATOR, reason))


@studies.command("release")
@_study_argument
@reason_option
@config_option
def release(study_instance_uid: str, reason: str, config: Path | None) -> None:
    """Let a held study go on: it is screened when it has been quiet for long enough."""
    _act("release", study_instance_uid, config, lambda store: store.release_study(study_instance_uid, OPERATOR, reason))


@studies.command("retry")
@_study_argument
@reason_option
@config_option
def retry(study_instance_uid: str, reason: str, config: Path | None) -> None:
    """Let a held, failed or excluded study run again at once, with new attempts."""
    _act("retry", study_instance_uid, config, lambda store: store.retry_study(study_instance_uid, OPERATOR, reason))


@studies.command("reprocess")
@_study_argument
@reason_option
@click.option("--localizer", "localizer_bundle", help="Bundle for this revision, instead of screener.localizer_bundle.")
@click.option("--network", "network_bundle", help="Bundle for this revision, instead of screener.network_bundle.")
@config_option
def reprocess(
    study_instance_uid: str,
    reason: str,
    localizer_bundle: str | None,
    network_bundle: str | None,
    config: Path | None,
) -> None:
    """Screen a finished study again under a new revision, whose report names the one before."""
    if localizer_bundle or network_bundle:
        from osteo_daemon.inference.bundle import find_bundle

        models_dir = load_settings(config).bundles_dir
        for name in filter(None, (localizer_bundle, network_bundle)):
            find_bundle(name, models_dir)  # a wrong name is said now, not when the study is screened

    def act(store: JobStore) -> None:
        store.reprocess_study(
            study_instance_uid,
            OPERATOR,
            reason,
            localizer_bundle=localizer_bundle,
            network_bundle=network_bundle,
        )

    _act("reprocess", study_instance_uid, config, act)


@studies.command("prioritise")
@_study_argument
@click.option("--priority", required=True, type=_Named([priority.name.lower() for priority in Priority]))
@reason_option
@config_option
def prioritise(study_instance_uid: str, priority: str, reason: str, config: Path | None) -> None:
    """Change the class in which a study waits for its screening."""
    wanted = Priority[priority.upper()]
    _act(
        "prioritise",
        study_instance_uid,
        config,
        lambda store: store.prioritise_study(study_instance_uid, wanted, OPERATOR, reason),
    )


@studies.command("purge")
@_study_argument
@reason_option
@click.option("--force", is_flag=True, help="Also what was not screened or not delivered: it never will be.")
@click.option("--also-committed", is_flag=True, help="Even if a sender was promised that this node keeps it.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@config_option
def purge(
    study_instance_uid: str, reason: str, force: bool, also_committed: bool, yes: bool, config: Path | None
) -> None:
    """Remove a study's images and report objects here; job, history and result stay."""
    settings, store = open_store(config)
    jobs = store.recent(study_instance_uid=study_instance_uid, limit=1)
    if not jobs:
        raise unknown_study(study_instance_uid)
    if not yes:
        what = f"{jobs[0].instances} images of a study in state {jobs[0].state.value} and its report objects"
        click.confirm(f"Remove {what} from this node?", abort=True)
    from osteo_daemon.audit import trail
    from osteo_daemon.audit.events import person
    from osteo_daemon.handling import deletion_of, tell
    from osteo_daemon.jobs.spool import Spool

    spool = Spool(settings.spool_dir)
    trail.open_trail(settings, "command")
    deletion = deletion_of(store, study_instance_uid, person(getuser()))
    with _explained("purge", study_instance_uid):
        store.purge_study(study_instance_uid, spool, OPERATOR, reason, force=force, also_committed=also_committed)
    tell(deletion)
    click.echo(f"purge: {study_instance_uid}")


def _act(name: str, study_instance_uid: str, config: Path | None, act: Callable[[JobStore], None]) -> None:
    _settings, store = open_store(config)
    with _explained(name, study_instance_uid):
        act(store)
    click.echo(f"{name}: {study_instance_uid}")


@contextmanager
def _explained(name: str, study_instance_uid: str) -> Iterator[None]:
    try:
        yield
    except KeyError:
        raise unknown_study(study_instance_uid) from None
    except IllegalTransition as error:
        what = f"{name} is not possible for {study_instance_uid} now ({error.detail})"
        raise IllegalTransition(f"{what}; see osteo studies show {study_instance_uid}") from None


def _row(job: JobSummary) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "study_instance_uid": job.study_instance_uid,
        "state": job.state.value,
        "priority": job.priority.name.lower(),
        "revision": job.revision,
        "attempts": job.attempts,
        "instances": job.instances,
        "source_ae": job.source_ae,
        "first_received_at": job.first_received_at.isoformat(timespec="seconds"),
        "changed_at": job.changed_at.isoformat(timespec="seconds"),
        "code": job.code,
        "detail": job.detail,
    }
