"""``osteo completion``: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from osteo_daemon.errors import ConfigurationError

VARIABLE = "_OSTEO_COMPLETE"
"""By it the shell tells ``osteo`` that it is asked for completions: the name that click gives it."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    bash: osteo completion bash > ~/.local/share/bash-completion/completions/osteo
    zsh:  osteo completion zsh > a folder of $fpath, as _osteo
    fish: osteo completion fish > ~/.config/fish/completions/osteo.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigurationError(f"this installation's command line library knows no completion for {shell}")
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "osteo", VARIABLE).source())
