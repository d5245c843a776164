"""``osteo refit``: ask for a refit of the network channel, and see what became of those before."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json
from osteo_daemon.domain.refit import SITE_NAME
from osteo_daemon.errors import ConfigurationError

if TYPE_CHECKING:
    from osteo_daemon.domain.refit import Refit

_SHOWN = 20


@click.command()
@click.option("--site", help="The site's name; with it a refit is asked for.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a data set (docs/refit-data.md) instead of the archive's labelled vertebrae.",
)
@click.option("--reason", default="by hand", show_default=True, help="Why; kept with the refit. No patient's name.")
@json_option
@config_option
def refit(site: str | None, data: Path | None, reason: str, as_json: bool, config: Path | None) -> None:
    """Ask for a refit of the network channel for --site; without it, list the refits and how far they are.

    The refitter does the work ([refit] enabled = true) and registers candidates with a verdict; to use one is
    ``osteo models promote``.
    """
    settings, store = open_store(config)
    if site is None:
        if data is not None:
            raise click.UsageError("--data needs --site")
        entries = store.refits(_SHOWN)
        if as_json:
            print_json([_json(entry) for entry in entries])
        else:
            for entry in entries:
                click.echo(_line(entry))
        return
    if not SITE_NAME.fullmatch(site):
        raise click.BadParameter(f"of the form {SITE_NAME.pattern}", param_hint="--site")
    if not settings.refit.enabled:
        raise ConfigurationError("no refitter runs: set enabled = true under [refit] and start it")
    if data is not None and not (data / "table.json").exists():
        raise ConfigurationError(f"{data} holds no complete data set; see docs/refit-data.md")
    asked = store.request_refit(
        site, who=getpass.getuser(), reason=reason, data=None if data is None else str(data.resolve())
    )
    if as_json:
        print_json(_json(asked))
    else:
        click.echo(f"refit {asked.refit_id} of {site} waits; osteo refit shows how far it is")


def _json(entry: Refit) -> dict[str, Any]:
    moments = {
        name: None if value is None else value.isoformat()
        for name in ("requested_at", "started_at", "ended_at")
        for value in (getattr(entry, name),)
    }
    names = (
        "refit_id",
        "site",
        "requested_by",
        "reason",
        "data",
        "labels",
        "attempts",
        "verdict",
        "recommended",
        "detail",
    )
    return {
        **{name: getattr(entry, name) for name in names},
        "state": entry.state.value,
        **moments,
        "progress": dict(entry.progress),
        "versions": list(entry.versions),
    }


def _line(entry: Refit) -> str:
    """One refit in a line."""
    from osteo_daemon.domain.refit import RefitState

    what = f"{entry.refit_id:>4}  {entry.requested_at:%Y-%m-%d %H:%M}  {entry.site:<16} {entry.state.value:<8}"
    if entry.state is RefitState.RUNNING:
        return f"{what} {_how_far(entry)}"
    if entry.state is RefitState.DONE:
        candidates = ", ".join(entry.versions)
        return f"{what} {entry.verdict}; recommended: {entry.recommended}; candidates: {candidates}"
    return f"{what} {entry.detail or ''}".rstrip()


def _how_far(entry: Refit) -> str:
    progress = entry.progress
    if progress.get("paused"):
        return "waits for screening"
    words = [str(progress.get("stage", "begins"))]
    if progress.get("total"):
        words.append(f"{progress['done']} of {progress['total']}")
    if progress.get("seconds_left") is not None:
        words.append(f"{progress['seconds_left']:.0f} s left")
    return ", ".join(words)
