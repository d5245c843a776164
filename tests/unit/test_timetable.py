"""Timed steps: late runs count once, missed ones are told, none overlaps itself, and restarts forget no due run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osteo_daemon.errors import ConfigurationError, SpoolFull
from osteo_daemon.jobs.records import SchedulerRun
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.timetable import MAKE_UP_SECONDS, MISFIRE_GRACE_SECONDS, Timetable
from tests.fakes import until
from tests.stores import new_sqlite

HOUR = timedelta(hours=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = new_sqlite(tmp_path)
    yield store
    store.close()


def row(store: JobStore, step: str) -> SchedulerRun:
    (found,) = [run for run in store.scheduler_runs() if run.step == step]
    return found


def counted(ran: list[str], name: str) -> Callable[[], str]:
    def act() -> str:
        ran.append(name)
        return name

    return act


def test_late_runs_count_once_and_a_run_too_late_is_missed_and_told(store: JobStore) -> None:
    ran: list[str] = []
    table = Timetable(store, lambda: True)
    table.every(3600, "late", counted(ran, "late"))
    table.every(48 * 3600, "missed", counted(ran, "missed"))
    now = datetime.now(UTC)
    # as after a machine that slept: ten runs of the one were due, the only one of the other is out of its grace
    table._engine.modify_job("late", next_run_time=now - 10.5 * HOUR)
    table._engine.modify_job("missed", next_run_time=now - timedelta(seconds=MISFIRE_GRACE_SECONDS) - HOUR)
    table.announce()
    table.start()
    until(lambda: row(store, "late").runs and row(store, "missed").missed)
    table.stop()
    assert ran == ["late"]
    late, missed = row(store, "late"), row(store, "missed")
    assert (late.runs, late.missed, late.failures, late.outcome, late.detail) == (1, 0, 0, "done", "late")
    assert late.started_at is not None
    assert late.next_at is not None
    assert timedelta(0) < late.next_at - now <= HOUR
    assert (missed.runs, missed.missed, missed.outcome, missed.started_at) == (0, 1, "missed", None)


def test_a_step_never_runs_beside_itself_and_its_end_is_awaited(store: JobStore) -> None:
    begun, end = threading.Event(), threading.Event()
    starts: list[float] = []

    def act() -> str:
        starts.append(time.monotonic())
        begun.set()
        end.wait(30)
        return "whole"

    beside: list[str] = []
    table = Timetable(store, lambda: True)
    table.every(0.05, "slow", act)
    table.every(0.05, "quick", counted(beside, "quick"))
    table.start()
    assert begun.wait(30)
    seen = len(beside)
    until(lambda: len(beside) >= seen + 4)  # meanwhile others run, and it was due as often
    assert len(starts) == 1
    threading.Timer(0.2, end.set).start()
    table.stop()
    assert row(store, "slow").detail == "whole"  # the end of a step that runs is noted, not cut off


def test_the_next_run_that_is_shown_is_to_come(store: JobStore) -> None:
    """Also when the engine has not come to it yet: it was due again while the step ran."""

    def act() -> str:
        table._engine.pause()  # as if this thread had all of the processor
        time.sleep(0.25)
        return "done"

    table = Timetable(store, lambda: True)
    table.every(0.1, "step", act)
    table.start()
    (found,) = until(store.scheduler_runs)
    table.stop()
    assert found.ended_at is not None
    assert found.next_at is not None
    assert found.ended_at < found.next_at <= found.ended_at + timedelta(seconds=0.2)


@pytest.mark.parametrize(("error", "outcome"), [(SpoolFull("no room"), "SpoolFull"), (ValueError("x"), "ValueError")])
def test_a_step_that_fails_is_seen_and_comes_again(store: JobStore, error: Exception, outcome: str) -> None:
    def act() -> str:
        raise error

    table = Timetable(store, lambda: True)
    table.every(0.1, "fails", act)
    table.announce()
    table.start()
    until(lambda: row(store, "fails").failures >= 2)
    table.stop()
    assert row(store, "fails").outcome == outcome


def test_who_does_not_lead_runs_and_notes_nothing(store: JobStore) -> None:
    ran: list[str] = []
    asked: list[bool] = []

    def leads() -> bool:
        asked.append(True)
        return False

    table = Timetable(store, leads)
    table.every(0.02, "step", counted(ran, "step"))
    table.start()
    until(lambda: len(asked) >= 3)
    table.stop()
    assert ran == []
    assert store.scheduler_runs() == []


@pytest.mark.parametrize(
    ("ran_hours_ago", "expected_hours"),
    [(None, None), (0.5, 23.5), (30, None), (-5, None)],  # the last: written by a clock that has been set back since
)
def test_a_restart_neither_forgets_nor_repeats(
    store: JobStore, ran_hours_ago: float | None, expected_hours: float | None
) -> None:
    now = datetime.now(UTC)
    daily = (
        f"{now.minute} {now.hour} * * *"
        if expected_hours is None
        else f"{(now - HOUR).minute} {(now - HOUR).hour} * * *"
    )
    for step in ("every", "at"):
        if ran_hours_ago is not None:
            values = {"interval_seconds": 86400.0, "started_at": now - ran_hours_ago * HOUR}
            store.note_run(step, values=values, more={"runs": 1})
    table = Timetable(store, lambda: True)
    table.every(24 * 3600, "every", str)
    table.at(daily, "at", str)
    table.announce()
    every, at = row(store, "every").next_at, row(store, "at").next_at
    assert every is not None
    assert at is not None
    if expected_hours is None:
        assert timedelta(seconds=-5) < every - now <= timedelta(seconds=MAKE_UP_SECONDS + 5)
    else:
        assert every == pytest.approx(now + expected_hours * HOUR, abs=timedelta(seconds=5))
        assert timedelta(hours=22) < at - now < timedelta(hours=24)  # it ran since it was last due
    if ran_hours_ago == 30:
        assert at - now <= timedelta(seconds=MAKE_UP_SECONDS + 5)
    assert table.seconds_between("at") == 24 * 3600


@pytest.mark.parametrize("crontab", ["61 * * * *", "0 0 31 feb *"])
def test_times_that_never_come_are_refused(store: JobStore, crontab: str) -> None:
    with pytest.raises(ConfigurationError, match="the cron of odd"):
        Timetable(store, lambda: True).at(crontab, "odd", str)
