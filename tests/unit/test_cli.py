"""The command line as a whole: help, reference, exit statuses, JSON everywhere, completion in a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from osteo_daemon import errors
from osteo_daemon.cli import cli, main
from osteo_daemon.commands.reference import cli_reference, walk
from osteo_daemon.commands.story import FIRST_STEPS, GROUPS
from osteo_daemon.errors import ExitStatus, OsteoError, exit_status
from tests.conftest import ROOT

COMMANDS = dict(walk(cli))

WITHOUT_JSON = {
    ("serve",): "runs until it is stopped; it says what it does in its log, which [log] format makes JSON",
    ("run",): "as serve",
    ("test-pacs",): "as serve",
    ("demo",): "a show for people; the files it leaves are there for programs",
    ("completion",): "prints a script for a shell",
    ("conformance",): "writes a document",
    ("reference", "cli"): "writes a document",
}
"""Commands that have no --json, and why."""


def test_every_command_stands_in_the_story_once() -> None:
    told = Counter(name for _title, names in GROUPS for name in names)
    assert told == Counter(dict.fromkeys(cli.commands, 1))


def test_the_help_shows_groups_first_steps_and_where_to_look() -> None:
    done = CliRunner().invoke(cli, ["--help"], terminal_width=120)
    assert done.exit_code == 0
    for title, names in GROUPS:
        section = done.output.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2:3].strip()] == list(names)
    assert "..." not in done.output.partition("First steps")[2]  # no command's first sentence is cut
    for line, _why in FIRST_STEPS:
        assert line in done.output
        words = tuple(word for word in line.split()[1:] if not word.startswith("--") and "." not in word)
        assert words in COMMANDS, line
    for page in ("docs/operations.md", "docs/cli.md"):
        assert page in done.output
        assert (ROOT / page).exists()


def test_every_command_and_option_says_what_it_does() -> None:
    for path, command in COMMANDS.items():
        assert command.help, path
        assert "." in command.help, path
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (path, parameter.name)


def test_every_command_that_tells_something_has_json() -> None:
    without = {path for path, command in COMMANDS.items() if not any("--json" in p.opts for p in command.params)}
    assert without == set(WITHOUT_JSON)


def test_options_of_one_name_are_the_same_everywhere() -> None:
    for name in ("--json", "--config", "--reason"):
        kinds = {
            (type(parameter.type).__name__, parameter.is_flag)
            for command in COMMANDS.values()
            for parameter in command.params
            if isinstance(parameter, click.Option) and name in parameter.opts
        }
        assert len(kinds) == 1, name


def test_the_reference_is_current_and_whole() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert text == cli_reference(cli), "make docs-results"
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    for path, command in COMMANDS.items():
        assert headings.count(" ".join(("osteo", *path))) == 1
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or all(f"`{name}`" in text for name in parameter.opts)
    for status in ExitStatus:
        assert f"| {status.value} | {status.meaning} |" in text
    assert "Sentinel" not in text
    assert "None" not in text


def _errors(kind: type[OsteoError] = OsteoError) -> Iterator[type[OsteoError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _errors(narrower)


def test_the_class_of_an_error_decides_the_exit_status() -> None:
    for kind in _errors():
        made = kind.__new__(kind)
        expected = (
            ExitStatus.REFUSED_TO_START
            if issubclass(kind, errors.ConfigurationError | errors.BundleError)
            else ExitStatus.LATER
            if issubclass(kind, errors.Transient)
            else ExitStatus.UNUSABLE
        )
        assert exit_status(made) is expected, kind
    assert [int(status) for status in ExitStatus] == [0, 1, 2, 3, 4]
    assert all(len(status.meaning) > 10 for status in ExitStatus)


@pytest.mark.parametrize(
    ("words", "variables", "status"),
    [
        (["--version"], {}, ExitStatus.DONE),
        (["audit", "status", "--json"], {}, ExitStatus.DONE),
        (["check", "--no-such-option"], {}, ExitStatus.REFUSED_TO_START),
        (["audit", "status", "--config", "none.toml"], {}, ExitStatus.REFUSED_TO_START),
        (["report", "show", "{here}"], {}, ExitStatus.UNUSABLE),
        # nothing listens there
        (["studies", "list"], {"OSTEO_STORE__URL": "postgresql://nobody@127.0.0.1:1/none"}, ExitStatus.LATER),
    ],
)
def test_exit_statuses_of_real_commands(
    words: list[str],
    variables: dict[str, str],
    status: ExitStatus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").write_text("not DICOM")
    for name, value in {"OSTEO_STATE_DIR": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["osteo", *(word.format(here=tmp_path / "here") for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == status
    said = capsys.readouterr()
    if status in (ExitStatus.UNUSABLE, ExitStatus.LATER):
        assert said.err.startswith("osteo: ")
        assert len(said.err.splitlines()) == 1


def test_json_of_acts_is_one_document(tmp_path: Path) -> None:
    state = ["--config", str(tmp_path / "osteo.toml")]
    (tmp_path / "osteo.toml").write_text(f'state_dir = "{tmp_path}"\n')
    (tmp_path / "password").write_text("a long enough password\n")
    run = CliRunner()

    def told(*words: str) -> object:
        done = run.invoke(cli, [*words, "--json", *state])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    password = ("--password-file", str(tmp_path / "password"))
    assert told("users", "add", "ada", "--role", "viewer", *password) == {"name": "ada", "role": "viewer"}
    assert told("users", "role", "ada", "operator") == {"name": "ada", "role": "operator"}
    assert told("users", "password", "ada", *password) == {"name": "ada", "password_changed": True}
    assert told("users", "remove", "ada") == {"name": "ada", "removed": True}
    paused = told("screener", "pause", "--reason", "a test")
    assert isinstance(paused, dict)
    assert (paused["mode"], paused["reason"]) == ("pause", "a test")
    status = told("screener", "status")
    assert isinstance(status, dict)
    assert (status["wish"], status["screeners"]) == (paused, [])
    assert "wanted: pause since" in run.invoke(cli, ["screener", "status", *state]).stdout
    assert told("audit", "status") == {"enabled": False}


_BASH = """
source /dev/stdin <<< "$(osteo completion bash)"
complete -p osteo
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _osteo_completion osteo; echo "${COMPREPLY[@]}"; }
ask osteo stu
ask osteo run de
ask osteo studies list --sta
"""


def test_completion_in_bash(tmp_path: Path) -> None:
    """The script is loaded by a real bash, and what it asks `osteo` for is what there is."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = _BASH.replace('"$(osteo completion bash)"', '"$SCRIPT"')
    shown = CliRunner().invoke(cli, ["completion", "bash"], prog_name="osteo")
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-e", "-c", script],
        env={"PATH": path, "HOME": str(tmp_path), "SCRIPT": shown.stdout},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    complete, *answers = done.stdout.splitlines()
    assert complete.endswith(" osteo")
    assert answers == ["studies", "deliverer", "--state"]


@pytest.mark.parametrize(("shell", "word"), [("zsh", "compdef"), ("fish", "complete")])
def test_completion_scripts_of_other_shells(shell: str, word: str) -> None:
    shown = CliRunner().invoke(cli, ["completion", shell])
    assert shown.exit_code == 0
    assert word in shown.stdout
    assert "_OSTEO_COMPLETE" in shown.stdout
