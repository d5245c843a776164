"""``osteo drift``: have scanners, rules or networks changed?"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json

_DAY_SECONDS = 24 * 3600.0


@click.group()
def drift() -> None:
    """Drift of scanners, rules and networks: reports and alarms."""


@drift.command("run")
@json_option
@config_option
def run_drift(as_json: bool, config: Path | None) -> None:
    """Make a report now, as the scheduler does once a day; alarms that are new are raised."""
    from osteo_daemon.drift_watch import STEP, look
    from osteo_daemon.log import configure_logging

    settings, store = open_store(config)
    configure_logging(settings.log, "command")
    # by the limits of the scheduler's own looks: a look by hand must not raise what those would clear
    every = next((run.interval_seconds for run in store.scheduler_runs() if run.step == STEP), _DAY_SECONDS)
    made = look(settings, store, datetime.now(UTC), every)
    store.close()
    document = made.report.to_json()
    if as_json:
        print_json({**document, "raised": made.raised, "cleared": made.cleared, "report": str(made.path)})
        return
    _print(document, made.path)
    click.echo(f"{len(made.raised)} new alarms, {len(made.cleared)} over")


@drift.command("show")
@json_option
@config_option
def show_drift(as_json: bool, config: Path | None) -> None:
    """Print the latest report, and the alarms that stand with the day when they were raised."""
    from osteo_daemon.drift_watch import latest_report

    settings, store = open_store(config)
    standing = store.drift_alarms()
    store.close()
    path = latest_report(settings)
    document = None if path is None else json.loads(path.read_bytes())
    if as_json:
        alarms = [{"chart": a.chart, "raised_at": a.raised_at.isoformat(), "detail": a.detail} for a in standing]
        print_json({"standing": alarms, "report": document})
        return
    if document is None or path is None:
        click.echo("there is no report yet; make one: osteo drift run")
    else:
        _print(document, path)
    for alarm in standing:
        click.echo(f"stands since {alarm.raised_at:%Y-%m-%d}: {alarm.detail}")
    if not standing:
        click.echo("no alarm stands")


def _print(document: dict[str, Any], path: Path) -> None:
    click.echo(f"{path.with_suffix('.html')}")
    click.echo(
        f"{document['made_at']}: current since {document['current_since'][:10]}, reference "
        f"{document['reference_since'][:10]} until {document['reference_until'][:10]}, {document['tests']} tests"
    )
    for scope in document["scopes"]:
        alarms = sum(chart["alarm"] for chart in scope["charts"])
        enough = f"{alarms} of {len(scope['charts'])} charts alarm" if scope["enough"] else "not enough data"
        click.echo(f"{scope['name']}: {scope['reference_studies']} and {scope['current_studies']} studies, {enough}")
    for text in document["alarms"].values():
        click.echo(f"ALARM {text}")
