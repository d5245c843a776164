"""Which studies a command is about: those it names, or those that have something in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import json_option, moment, print_json, unknown_study
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import IllegalTransition

if TYPE_CHECKING:
    from osteo_daemon.jobs.records import JobSummary
    from osteo_daemon.jobs.store import JobStore

MOST_ROWS = 1000
"""Of one page."""

_WHEN = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


class Named(click.Choice[str]):
    """A choice among the names of an enumeration, in any case."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names, case_sensitive=False)


@dataclass(frozen=True, slots=True)
class StudyFilter:
    """What studies have in common; None: whatever."""

    state: JobState | None
    source_ae: str | None
    code: str | None
    since: datetime | None
    until: datetime | None

    def page(self, store: JobStore, limit: int, before_job_id: int | None) -> list[JobSummary]:
        """Newest first; the next page follows ``before_job_id``."""
        return store.recent(
            state=self.state,
            source_ae=self.source_ae,
            code=self.code,
            since=self.since,
            until=self.until,
            before_job_id=before_job_id,
            limit=limit,
        )

    def all(self, store: JobStore) -> list[str]:
        """Every study that fits, oldest first."""
        found: list[str] = []
        before: int | None = None
        while page := self.page(store, MOST_ROWS, before):
            found += [job.study_instance_uid for job in page]
            before = page[-1].job_id
        return found[::-1]


@dataclass(frozen=True, slots=True)
class Choice:
    """Studies to act on.

    Attributes:
        named: their UIDs, when they were named.
        filter: else what they have in common.
        sure: nobody need be asked.
        as_json: a list of what was done is printed for programs, instead of lines for people.
    """

    named: tuple[str, ...]
    filter: StudyFilter
    sure: bool
    as_json: bool

    def act(self, name: str, store: JobStore, act: Callable[[str], None]) -> None:
        """Do it to each, and say so. One that is named and can't be acted on ends the command; of many it is passed by.

        Raises:
            Damaged: a study that was named is not there.
            IllegalTransition: it is not possible for a study that was named.
            click.Abort: the person said no.
        """
        done: list[dict[str, str | None]] = []
        try:
            self._act(name, store, act, done)
        finally:
            if self.as_json:  # also those before the one that ended it
                print_json(done)

    def _act(self, name: str, store: JobStore, act: Callable[[str], None], done: list[dict[str, str | None]]) -> None:
        for uid in self.named:
            with explained(name, uid):
                act(uid)
            self._tell(name, uid, done)
        if self.named:
            return
        found = self.filter.all(store)
        if found and not self.sure:
            click.confirm(f"{name}: {len(found)} studies?", abort=True, err=self.as_json)
        count = 0
        for uid in found:
            try:
                with explained(name, uid):
                    act(uid)
            except IllegalTransition as error:
                click.echo(error.detail, err=True)
                done.append({"study_instance_uid": uid, "done": None, "refused": error.detail})
            else:
                self._tell(name, uid, done)
                count += 1
        click.echo(f"{name}: {count} of {len(found)} studies", err=True)

    def _tell(self, name: str, uid: str, done: list[dict[str, str | None]]) -> None:
        done.append({"study_instance_uid": uid, "done": name, "refused": None})
        if not self.as_json:
            click.echo(f"{name}: {uid}")


def filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a `StudyFilter`, and the filter as ``wanted``."""

    @wraps(command)
    def filtered(
        *,
        state: str | None,
        source_ae: str | None,
        code: str | None,
        since: datetime | None,
        until: datetime | None,
        **others: Any,
    ) -> None:
        chosen = None if state is None else JobState(state.upper())
        command(wanted=StudyFilter(chosen, source_ae, code, since, until), **others)

    for option in (
        click.option("--until", type=_WHEN, callback=moment, help="Only those whose first image came before (UTC)."),
        click.option(
            "--since", type=_WHEN, callback=moment, help="Only those whose first image came then or later (UTC)."
        ),
        click.option("--code", help="Only with this code of exclusion, hold, error or failure."),
        click.option("--source", "source_ae", help="Only studies of this calling AE title."),
        click.option("--state", type=Named([state.value for state in JobState]), help="Only studies in this state."),
    ):
        filtered = option(filtered)
    return filtered


def study_choice(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command be told studies, or the options of a `StudyFilter`; it gets them as ``choice``."""

    @wraps(command)
    def chosen(*, studies: tuple[str, ...], wanted: StudyFilter, yes: bool, as_json: bool, **others: Any) -> None:
        if bool(studies) == (wanted != StudyFilter(None, None, None, None, None)):
            raise click.UsageError("name studies, or tell by --state, --source, --code, --since, --until which ones")
        command(choice=Choice(studies, wanted, yes, as_json), **others)

    asked = click.option("--yes", is_flag=True, help="Don't ask.")(filter_options(json_option(chosen)))
    return click.argument("studies", nargs=-1, metavar="[STUDY_INSTANCE_UID]...")(asked)


@contextmanager
def explained(name: str, study_instance_uid: str) -> Iterator[None]:
    """Errors that tell a person which study they speak of and where to look."""
    try:
        yield
    except KeyError:
        raise unknown_study(study_instance_uid) from None
    except IllegalTransition as error:
        what = f"{name} is not possible for {study_instance_uid} now ({error.detail})"
        raise IllegalTransition(f"{what}; see osteo studies show {study_instance_uid}") from None
