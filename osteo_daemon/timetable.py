"""Timed steps: when each runs, what came of it, and that this is written where people look.

APScheduler skips a run silently when it is one second late; here a late run still counts, several late runs count
once, and a missed one is logged and kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

from osteo_daemon.errors import ConfigurationError, Damaged, Transient
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger

MISFIRE_GRACE_SECONDS = 24 * 3600
"""How late a run may begin; a later one is missed."""

MAKE_UP_SECONDS = 60.0
"""How soon after a start comes the run that was due while the scheduler was down."""

_THREADS = 8
_CLOCK_SECONDS = 1.0
_CLOCK_STEP_SECONDS = 2.0  # slewing is slower, an administrator's or NTP's step is larger
_NOTED_EVERY_SECONDS = 60.0
"""Steps that run more often and have nothing to tell write their row only this often."""


@dataclass
class _Step:
    """One timed step and what was not yet written of its runs."""

    name: str
    act: Callable[[], str]
    seconds: float
    runs: int = 0
    noted_at: datetime | None = None


class Timetable:
    """Steps and their times; a step runs while ``leads`` says so, each in one thread at most.

    Args:
        jobs: where runs are written down.
        leads: whether this process is the one to act.

    Raises:
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, jobs: JobStore, leads: Callable[[], bool]) -> None:
        self._jobs = jobs
        self._leads = leads
        self._last = {run.step: run.started_at for run in jobs.scheduler_runs()}
        self._ended = threading.Event()
        self._asking = threading.Lock()
        self._ran_at = time.monotonic()
        self._steps: dict[str, _Step] = {}
        self._engine: Any = BackgroundScheduler(
            timezone="UTC",
            executors={"default": ThreadPoolExecutor(_THREADS)},
            job_defaults={"misfire_grace_time": MISFIRE_GRACE_SECONDS, "coalesce": True, "max_instances": 1},
        )
        self._engine.add_listener(self._on_event, EVENT_JOB_MISSED | EVENT_JOB_ERROR | EVENT_JOB_MAX_INSTANCES)

    def every(self, seconds: float, name: str, act: Callable[[], str]) -> None:
        """A step that comes again after so many seconds. ``act`` gives what there is to tell, or nothing."""
        now = datetime.now(UTC)
        # a step of many hours must not begin its wait anew with every start
        due = self._last.get(name)
        coming = now + timedelta(seconds=min(seconds, MAKE_UP_SECONDS))
        # a run noted in the future was noted by a clock that has been set back since
        first = coming if due is None or due > now else max(coming, due + timedelta(seconds=seconds))
        self._add(_Step(name, act, seconds), "interval", first, seconds=seconds)

    def at(self, crontab: str, name: str, act: Callable[[], str]) -> None:
        """A step at set times, in UTC; one that was due while no scheduler ran is made up for.

        Raises:
            ConfigurationError: these times cannot be read, or never come.
        """
        try:
            trigger = CronTrigger.from_crontab(crontab, timezone="UTC")
        except ValueError as error:
            raise ConfigurationError(f"the cron of {name}, {crontab!r}: {error}") from error
        now = datetime.now(UTC)
        coming = trigger.get_next_fire_time(None, now)
        if coming is None:
            raise ConfigurationError(f"the cron of {name}, {crontab!r}, never comes")
        after = trigger.get_next_fire_time(coming, coming + timedelta(seconds=1)) or coming + timedelta(days=365)
        step = _Step(name, act, (after - coming).total_seconds())
        ran = self._last.get(name)
        due = None if ran is None or ran > now else trigger.get_next_fire_time(None, ran)
        if due is not None and due < now:
            coming = min(coming, now + timedelta(seconds=MAKE_UP_SECONDS))
        self._add(step, trigger, coming)

    def seconds_between(self, name: str) -> float:
        """How far apart two runs of a step are."""
        return self._steps[name].seconds

    @property
    def silent_seconds(self) -> float:
        """How long ago the last step was due and was looked at, by whoever leads or not."""
        return time.monotonic() - self._ran_at

    def start(self) -> None:
        """Run the steps in threads of their own."""
        self._engine.start()
        threading.Thread(target=self._watch_clock, name="clock", daemon=True).start()

    def stop(self) -> None:
        """No further run; returns when those under way have ended."""
        with self._asking:
            self._ended.set()
        self._engine.shutdown(wait=True)

    def announce(self) -> None:
        """Make every step visible before its first run."""
        for step in self._steps.values():
            self._write(step, {"interval_seconds": step.seconds, "next_at": self._next_at(step, datetime.now(UTC))}, {})

    def _add(self, step: _Step, trigger: Any, first: datetime, **options: Any) -> None:
        self._steps[step.name] = step
        self._engine.add_job(
            self._run, trigger, args=[step], id=step.name, name=step.name, next_run_time=first, **options
        )

    def _watch_clock(self) -> None:
        """APScheduler plans by the wall clock: when that is set back, every step would wait until it catches up."""
        ahead = time.time() - time.monotonic()
        while not self._ended.wait(_CLOCK_SECONDS):
            before, ahead = ahead, time.time() - time.monotonic()
            if ahead < before - _CLOCK_STEP_SECONDS:
                get_logger().warning("clock_set_back", wait_s=round(before - ahead))
                for job in self._engine.get_jobs():
                    job.modify(next_run_time=datetime.now(UTC))

    def _run(self, step: _Step) -> None:
        self._ran_at = time.monotonic()
        if not self._leads():
            return
        started = datetime.now(UTC)
        outcome = "done"
        try:
            detail = step.act()
        except (Transient, ConfigurationError, Damaged) as error:
            # the next run is the retry; the reason stands where people look
            get_logger().warning("step_failed", kind=step.name, error=type(error).__name__, detail=error.detail)
            outcome, detail = type(error).__name__, error.detail
        self._note(step, started, outcome, detail)

    def _note(self, step: _Step, started: datetime, outcome: str, detail: str) -> None:
        step.runs += 1
        now = datetime.now(UTC)
        told = step.noted_at is not None and now - step.noted_at < timedelta(seconds=_NOTED_EVERY_SECONDS)
        if told and outcome == "done" and not detail:
            return
        values = {
            "interval_seconds": step.seconds,
            "started_at": started,
            "ended_at": now,
            "outcome": outcome,
            "detail": detail or None,
        }
        next_at = self._next_at(step, now)
        if next_at is not None:  # not known any more when the scheduler stops: what was said before stays
            values["next_at"] = next_at
        if self._write(step, values, {"runs": step.runs, "failures": int(outcome != "done")}):
            step.runs, step.noted_at = 0, now

    def _next_at(self, step: _Step, now: datetime) -> datetime | None:
        with self._asking:
            # the engine waits for its steps under a lock that this question needs
            job = None if self._ended.is_set() else self._engine.get_job(step.name)
        if job is None:
            return None
        due: datetime | None = job.next_run_time
        while due is not None and due <= now:
            due = job.trigger.get_next_fire_time(due, now)  # what fell due while the step ran is passed over
        return due

    def _write(self, step: _Step, values: dict[str, Any], more: dict[str, int]) -> bool:
        try:
            self._jobs.note_run(step.name, values=values, more=more)
        except Transient as error:
            get_logger().warning("step_not_noted", kind=step.name, error=type(error).__name__)
            return False
        return True

    def _on_event(self, event: Any) -> None:
        if event.code == EVENT_JOB_ERROR:
            get_logger().error("step_failed", kind=event.job_id, error=type(event.exception).__name__)
            self._count(event.job_id, "failures", type(event.exception).__name__)
        elif event.code == EVENT_JOB_MISSED:
            get_logger().warning("step_missed", kind=event.job_id)
            self._count(event.job_id, "missed", "missed")
        else:
            get_logger().warning("step_still_runs", kind=event.job_id)

    def _count(self, name: str, counter: str, outcome: str) -> None:
        if self._leads():
            step = self._steps[name]
            self._write(step, {"interval_seconds": step.seconds, "outcome": outcome}, {counter: 1})
