"""How `osteo pull` looks: a progress bar, and pulls as rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osteo_daemon.jobs.pull_rows import Pull
    from osteo_daemon.jobs.store import JobStore
    from osteo_daemon.pull.puller import Report


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Report], None]]:
    """A bar on a terminal; nothing where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield lambda _report: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from osteo_daemon.jobs.pull_rows import PulledState

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("searching", total=None)

        def tell(report: Report) -> None:
            total = sum(report.counts.values())
            text = report.waits or (f"{report.instances} objects of one study" if report.instances else "")
            wanted = report.counts.get(PulledState.WANTED, 0)
            progress.update(task, total=total or None, completed=total - wanted, description=text)

        yield tell


def pull_row(store: JobStore, entry: Pull) -> dict[str, Any]:
    """A pull for lists."""
    counts = store.pull_counts(entry.pull_id)
    return {
        "pull_id": entry.pull_id,
        "archive": entry.archive,
        "state": entry.state.value,
        "criteria": entry.criteria,
        "studies": {state.value: count for state, count in counts.items()},
        "created_at": entry.created_at.isoformat(),
        "changed_at": entry.changed_at.isoformat(),
    }


def study_row(document: dict[str, Any]) -> dict[str, Any]:
    """One of its studies for programs."""
    not_before = document["not_before"]
    return {**document, "not_before": None if not_before is None else not_before.isoformat()}


def counts_text(studies: dict[str, int]) -> str:
    """How many studies stand where, for people."""
    return ", ".join(f"{count} {state.lower()}" for state, count in studies.items() if count) or "no studies"
