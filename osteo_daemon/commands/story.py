"""How ``osteo --help`` tells what there is: in the order in which a person comes to need it."""

from __future__ import annotations

import click

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Try it", ("demo", "screen", "test-pacs")),
    ("Set it up and run it", ("check", "serve", "run", "completion")),
    ("Look at the work, and act on it", ("studies", "deliveries", "screener", "report", "pull")),
    ("Models and refits", ("models", "refit", "archive", "labels", "drift")),
    ("Keep it sound", ("schedule", "fsck", "backup", "restore", "store", "users", "audit")),
    ("Documents", ("conformance", "reference")),
)
"""Every command of ``osteo`` once."""

FIRST_STEPS = (
    ("osteo demo", "a virtual patient through the whole node; needs no settings"),
    ("osteo check --config osteo.toml", "can the node work here: folders, models, GPU, destinations?"),
    ("osteo serve --config osteo.toml", "run it"),
    ("osteo studies list --config osteo.toml", "what came in, and what became of it"),
)
"""What to type first, and why."""

WHERE_TO_LOOK = (
    ("docs/operations.md", "when something is amiss"),
    ("docs/cli.md", "every command, and what exit statuses mean"),
    ("OSTEO_CONFIG", "the variable that spares --config"),
)
"""Where more is said."""


_LONGEST_STEP = 45
_NEVER_CUT = 1000


class StoryGroup(click.Group):
    """The root command: its help groups the commands and names the first steps."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the story."""
        told = [name for _title, names in GROUPS for name in names]
        return [name for name in told if name in self.commands] + sorted(set(self.commands) - set(told))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """First steps, the commands in groups, and where to look."""
        with formatter.section("First steps"):
            formatter.write_dl(list(FIRST_STEPS), col_max=_LONGEST_STEP)
        for title, names in GROUPS:
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(_NEVER_CUT)) for name in names])
        with formatter.section("Where to look"):
            formatter.write_dl(list(WHERE_TO_LOOK))
