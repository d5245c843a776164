"""``osteo studies``: what came in and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import (
    config_option,
    echo_fields,
    json_option,
    open_store,
    print_json,
    unknown_study,
)
from osteo_daemon.commands.study_acts import ACTS
from osteo_daemon.commands.study_choice import MOST_ROWS, StudyFilter, filter_options
from osteo_daemon.domain.job import Priority

if TYPE_CHECKING:
    from osteo_daemon.jobs.records import JobSummary


@click.group()
def studies() -> None:
    """What came in and what became of it."""


for act in ACTS:
    studies.add_command(act)


@studies.command("list")
@config_option
@filter_options
@click.option("--limit", type=click.IntRange(1, MOST_ROWS), default=50, show_default=True, help="Rows of a page.")
@click.option("--before", "before_job_id", type=int, help="Next page: the number that the last one ended with.")
@json_option
def list_studies(
    config: Path | None, wanted: StudyFilter, limit: int, before_job_id: int | None, as_json: bool
) -> None:
    """List studies, the newest first, a page at a time."""
    _settings, store = open_store(config)
    page = wanted.page(store, limit, before_job_id)
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
@click.argument("study_instance_uid")
@json_option
@config_option
def show_study(study_instance_uid: str, as_json: bool, config: Path | None) -> None:
    """Show one study: its job, its history, its result, its report objects and their deliveries."""
    _settings, store = open_store(config)
    jobs = store.recent(study_instance_uid=study_instance_uid, limit=1)
    job = store.job(study_instance_uid)
    if not jobs or job is None:
        raise unknown_study(study_instance_uid)
    row = _row(jobs[0])
    bundles = {"localizer": job.localizer_bundle, "network": job.network_bundle}
    events: list[dict[str, Any]] = [
        {
            "at": event.at.isoformat(),
            "who": event.who,
            "event": event.event,
            "to_state": None if event.to_state is None else event.to_state.value,
            "revision": event.revision,
            "reason": event.reason,
        }
        for event in store.events(study_instance_uid)
    ]
    result = store.result(study_instance_uid)
    objects = [
        {"kind": entry.kind.value, "sop_instance_uid": entry.sop_instance_uid, "sha256": entry.sha256}
        for entry in store.report_objects(study_instance_uid, also_removed=True)
    ]
    deliveries: list[dict[str, Any]] = [
        {
            "destination": entry.destination,
            "revision": entry.revision,
            "state": entry.state.value,
            "attempts": entry.attempts,
            "detail": entry.detail,
        }
        for entry in store.deliveries(study_instance_uid=study_instance_uid)
    ]
    if as_json:
        more = {"events": events, "result": result, "report_objects": objects, "deliveries": deliveries}
        print_json({**row, "bundles": bundles, **more})
        return
    echo_fields({**row, **{f"{name} bundle": value for name, value in bundles.items()}})
    if result is not None:
        click.echo(f"{'result':<15} {result['category'] or 'not screened'}; --json says all")
    for event in events:
        state = f" -> {event['to_state']}" if event["to_state"] else ""
        why = f": {event['reason']}" if event["reason"] else ""
        click.echo(f"event           {event['at'][:19]}  {event['who']}  {event['event']}{state}{why}")
    for entry in objects:
        click.echo(f"report object   {entry['kind']:<14} {entry['sop_instance_uid']}")
    for sent in deliveries:
        detail = f"  {sent['detail']}" if sent["detail"] else ""
        click.echo(
            f"delivery        {sent['destination']}  r{sent['revision']}  {sent['state']}  "
            f"{sent['attempts']} attempts{detail}"
        )


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
