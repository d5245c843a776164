"""``osteo screener``: pause, resume or drain the screening, and ask how it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, echo_fields, json_option, not_blank, print_json, tell
from osteo_daemon.settings import load_settings


@click.group()
def screener() -> None:
    """Pause, resume or drain the screeners of this node."""


def _wish(name: str, mode: str, help_text: str) -> None:
    @screener.command(name, help=help_text)
    @click.option("--reason", required=True, callback=not_blank, help="Why; kept until the next word.")
    @json_option
    @config_option
    def say(reason: str, as_json: bool, config: Path | None) -> None:
        from osteo_daemon.control import Mode, read_wish, write_wish

        state_dir = load_settings(config).state_dir
        write_wish(state_dir, Mode(mode), "operator", reason)
        tell(as_json, asdict(read_wish(state_dir)), f"{name}: said to every screener of this node")


_wish("pause", "pause", "Finish the study in hand and claim no other; the models stay loaded.")
_wish("resume", "run", "Claim studies again.")
_wish("drain", "drain", "Finish the study in hand, claim no other and unload the models: the GPU is free.")


@screener.command("status")
@json_option
@config_option
def screener_status(as_json: bool, config: Path | None) -> None:
    """Show what was last said to the screeners, and what each of them says of itself."""
    from osteo_daemon.control import read_wish, screener_statuses

    state_dir = load_settings(config).state_dir
    wish, screeners = asdict(read_wish(state_dir)), screener_statuses(state_dir)
    if as_json:
        print_json({"wish": wish, "screeners": screeners})
        return
    said = f" since {wish['at']}, by {wish['who']}: {wish['reason']}" if wish["at"] else ""
    click.echo(f"wanted: {wish['mode']}{said}")
    for one in screeners:
        click.echo("")
        echo_fields(one)
    if not screeners:
        click.echo("no screener runs")
