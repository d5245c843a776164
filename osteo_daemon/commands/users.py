"""``osteo users``: who may log in to the web console."""

from __future__ import annotations

from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import config_option, json_option, print_json, tell
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import load_settings

if TYPE_CHECKING:
    from osteo_daemon.console.users import UserFile

_ROLES = ("viewer", "operator", "administrator")

_name = click.argument("name")
_password_file = click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True),
    help="Take the password from a file's first line (- is standard input) instead of asking for it.",
)


@click.group()
def users() -> None:
    """Who may log in to the web console, and what they may do there."""


@users.command("add")
@_name
@click.option("--role", type=click.Choice(_ROLES), required=True, help="Each may do what the one before may.")
@_password_file
@json_option
@config_option
def add_user(name: str, role: str, password_file: Path | None, as_json: bool, config: Path | None) -> None:
    """Let NAME log in with a password of 12 characters or more."""
    from osteo_daemon.console.users import Role

    users, done = _open(config), f"console user {name} added as {role}"
    users.add(name, Role(role), _password(password_file))
    _tell(done, as_json, {"name": name, "role": role})


@users.command("list")
@json_option
@config_option
def list_users(as_json: bool, config: Path | None) -> None:
    """List users with their roles."""
    found = _open(config).users().values()
    if as_json:
        print_json([{"name": user.name, "role": user.role.value, "changed_at": user.changed_at} for user in found])
        return
    for user in found:
        click.echo(f"{user.name:<32} {user.role.value:<14} changed {user.changed_at[:10]}")
    if not found:
        click.echo("nobody may log in; see osteo users add")


@users.command("remove")
@_name
@json_option
@config_option
def remove_user(name: str, as_json: bool, config: Path | None) -> None:
    """Let NAME log in no longer; open sessions end with their next request."""
    _open(config).remove(name)
    _tell(f"console user {name} removed", as_json, {"name": name, "removed": True})


@users.command("password")
@_name
@_password_file
@json_option
@config_option
def set_password(name: str, password_file: Path | None, as_json: bool, config: Path | None) -> None:
    """Give NAME another password; open sessions end."""
    _open(config).set_password(name, _password(password_file))
    _tell(f"console user {name} has another password", as_json, {"name": name, "password_changed": True})


@users.command("role")
@_name
@click.argument("role", type=click.Choice(_ROLES))
@json_option
@config_option
def set_role(name: str, role: str, as_json: bool, config: Path | None) -> None:
    """Give NAME another role; open sessions end."""
    from osteo_daemon.console.users import Role

    _open(config).set_role(name, Role(role))
    _tell(f"console user {name} is now {role}", as_json, {"name": name, "role": role})


def _open(config: Path | None) -> UserFile:
    from osteo_daemon.audit import trail
    from osteo_daemon.console.users import users_file
    from osteo_daemon.log import configure_logging

    settings = load_settings(config)
    configure_logging(settings.log, "command")
    trail.open_trail(settings, "command")
    return users_file(settings)


def _password(file: Path | None) -> str:
    if file is None:
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    try:
        with click.open_file(str(file), encoding="utf-8") as stream:
            return str(stream.readline()).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {type(error).__name__}") from None


def _tell(text: str, as_json: bool, document: dict[str, Any]) -> None:
    from osteo_daemon.audit import trail
    from osteo_daemon.audit.codes import EventType, Outcome
    from osteo_daemon.audit.events import Peer, security_alert

    kind = EventType.USER_SECURITY_ATTRIBUTES_CHANGED
    trail.record(security_alert(kind, text, performing=Peer(getuser()), outcome=Outcome.SUCCESS))
    tell(as_json, document, text)
