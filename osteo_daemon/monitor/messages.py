"""What a message says: the words of templates, a site's own where it has some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from osteo_daemon.errors import ConfigurationError
from osteo_daemon.monitor.problems import Problem, Severity

_SHIPPED = Path(__file__).parent / "templates"
_SUBJECT, _BODY = "subject.txt.j2", "message.txt.j2"


@dataclass(frozen=True, slots=True)
class Message:
    """One message, the same to everybody.

    Attributes:
        identifier: of this message: a repetition of it carries the same.
        host: name of this machine.
        at: when it was written, in UTC.
        begun: problems that are new, or still stand and are told again.
        over: problems that are over.
        subject: one line.
        text: of the letter.
    """

    identifier: str
    host: str
    at: datetime
    begun: tuple[Problem, ...]
    over: tuple[Problem, ...]
    subject: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """For a webhook."""
        return {
            "id": self.identifier,
            "host": self.host,
            "at": self.at.isoformat(timespec="seconds"),
            "subject": self.subject,
            "problems": [_problem(problem, "begun") for problem in self.begun]
            + [_problem(problem, "over") for problem in self.over],
        }


class Writer:
    """Writes messages.

    Args:
        folder: of the site's templates; what is not there is taken from the shipped ones.
        host: name of this machine.

    Raises:
        ConfigurationError: a template cannot be used.
    """

    def __init__(self, folder: Path | None, host: str) -> None:
        folders = [_SHIPPED] if folder is None else [folder, _SHIPPED]
        # texts, not pages: nothing to escape; what a template may call is kept small
        self._environment = SandboxedEnvironment(
            loader=FileSystemLoader(folders), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._host = host
        example = Problem("example", Severity.WARNING, "An example.")
        self.write("example", (example,), (example,))  # a node whose templates cannot be used refuses to start

    def write(self, identifier: str, begun: Sequence[Problem], over: Sequence[Problem]) -> Message:
        """Write one message.

        Raises:
            ConfigurationError: a template cannot be used.
        """
        at = datetime.now(UTC)
        values = {"host": self._host, "at": at, "begun": begun, "over": over}
        try:
            # a subject of several lines would end a letter's header
            subject = " ".join(self._environment.get_template(_SUBJECT).render(values).split())
            text = self._environment.get_template(_BODY).render(values)
        except (TemplateError, OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"notifications.templates_dir: {type(error).__name__}: {error}") from error
        return Message(identifier, self._host, at, tuple(begun), tuple(over), subject, text)


def _problem(problem: Problem, change: str) -> dict[str, str]:
    return {
        "problem": problem.key,
        "change": change,
        "severity": problem.severity.value,
        "text": problem.text,
    }
