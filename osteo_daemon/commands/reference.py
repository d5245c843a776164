"""``osteo reference``: docs/cli.md and docs/settings.md, written from the code that they describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from osteo_daemon.commands.story import FIRST_STEPS, GROUPS, StoryGroup
from osteo_daemon.errors import ExitStatus

_HEAD = """\
# The command line

Written by `osteo reference cli` from the commands themselves (`make docs-results`); a test holds this page to them.
`osteo COMMAND --help` says the same. With `--json` a command prints one JSON document to standard output and nothing
else there; what is said beside it, progress too, goes to standard error. Settings come from `--config FILE`, else from
the file that the variable `OSTEO_CONFIG` names, else they are defaults; variables `OSTEO_SECTION__KEY` stand above the
file.
"""

_SECRETS = "What a command prints names no patient; logs don't either."


@click.group()
def reference() -> None:
    """Write the reference of commands and of settings."""


def _document(name: str, make: Callable[[], str], help_text: str) -> None:
    @reference.command(name, help=help_text)
    @click.option(
        "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; standard output without."
    )
    def write(out: Path | None) -> None:
        text = make()
        if out is None:
            click.echo(text, nl=False)
        else:
            out.write_text(text, encoding="utf-8")


def _cli_text() -> str:
    root = click.get_current_context().find_root().command
    assert isinstance(root, StoryGroup)  # noqa: S101 - this command is one of its own
    return cli_reference(root)


_document("cli", _cli_text, "Every command with its arguments, options and exit statuses, as Markdown.")


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that call it."""
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from walk(command.commands[name], (*path, name))
    else:
        yield path, command


def cli_reference(root: StoryGroup) -> str:
    """The reference of all commands, in Markdown."""
    lines = [_HEAD, "## First steps", ""]
    lines += [f"    {line:<44} # {why}" for line, why in FIRST_STEPS]
    lines += ["", "## Exit statuses", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {status.value} | {status.meaning} |" for status in ExitStatus]
    lines += ["", f"An error is one line on standard error that begins with `osteo:`. {_SECRETS}"]
    for title, names in GROUPS:
        lines += ["", f"## {title}"]
        for name in names:
            command = root.commands[name]
            if isinstance(command, click.Group):
                lines += ["", f"### osteo {name}", "", _prose(command)]
            for path, leaf in walk(command, (name,)):
                lines += _command_lines(path, leaf, "####" if len(path) > 1 else "###")
    return "\n".join(lines) + "\n"


def _command_lines(path: tuple[str, ...], command: click.Command, level: str) -> list[str]:
    words = " ".join(("osteo", *path))
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    usage = [words, *(["[OPTIONS]"] if options else []), *(_argument(argument) for argument in arguments)]
    lines = ["", f"{level} {words}", "", f"    {' '.join(usage)}", "", _prose(command)]
    if options:
        lines += ["", "| option | what it does |", "|---|---|", *(_option_row(option) for option in options)]
    return lines


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    if isinstance(argument.type, click.Choice):
        name = "|".join(argument.type.choices)
    if argument.metavar is None:
        name = name if argument.required else f"[{name}]"
        name += "..." if argument.nargs == -1 else ""
    return name


def _option_row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if not option.is_flag:
        names += f" {_value(option)}"
    notes = [option.help or ""]
    if option.required:
        notes.append("Required.")
    if option.multiple:
        notes.append("May be given several times.")
    default = _default(option)
    if default:
        notes.append(f"Default: `{default}`.")
    if option.envvar:
        notes.append(f"Variable: `{option.envvar}`.")
    return f"| {names} | {' '.join(notes)} |"


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    if isinstance(option.type, click.DateTime):
        return "DATE"
    return {"integer": "NUMBER", "integer range": "NUMBER", "text": "TEXT", "file": "FILE", "directory": "FOLDER"}.get(
        option.type.name, option.type.name.upper()
    )


def _default(option: click.Option) -> str:
    if not option.show_default:
        return ""
    value: Any = option.default
    if isinstance(value, bool):
        return next(iter(option.opts if value else option.secondary_opts), "")
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value)


def _prose(command: click.Command) -> str:
    text = inspect.cleandoc(command.help or "").replace("``", "`")
    paragraphs = [
        # after \b click keeps the lines as they are: so does a block
        "\n".join(f"    {line}" for line in paragraph.splitlines()[1:]) if paragraph.startswith("\b") else paragraph
        for paragraph in text.split("\n\n")
    ]
    return "\n\n".join(paragraphs)
