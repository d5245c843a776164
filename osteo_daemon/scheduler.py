"""The scheduler: timed steps that only move rows, never work on pixels or talk to peers.

APScheduler skips a run silently when it is one second late; here a late run still counts, several late runs count
once, and a missed one is logged.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from osteo_daemon.errors import Transient
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.settings import Settings

_MISFIRE_GRACE_SECONDS = 24 * 3600
_LEASE_SWEEP_SECONDS = 10.0


class Scheduler:
    """The node's timed steps, one leader.

    Args:
        settings: of the node.

    Raises:
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._jobs = JobStore(settings.database_url)
        self._quiet_seconds = settings.completeness.quiet_seconds
        self._engine: Any = BackgroundScheduler(
            timezone="UTC",
            executors={"default": ThreadPoolExecutor(4)},
            job_defaults={"misfire_grace_time": _MISFIRE_GRACE_SECONDS, "coalesce": True, "max_instances": 1},
        )
        self._engine.add_listener(self._on_event, EVENT_JOB_MISSED | EVENT_JOB_ERROR | EVENT_JOB_MAX_INSTANCES)
        self._add("completeness_sweep", self.complete_quiet_studies, settings.completeness.sweep_seconds)
        self._add("lease_sweep", self.take_back_expired, _LEASE_SWEEP_SECONDS)

    def start(self) -> None:
        """Run the steps in threads of their own."""
        self._engine.start()

    def stop(self) -> None:
        """Let running steps finish and close."""
        self._engine.shutdown(wait=True)
        self._jobs.close()

    def complete_quiet_studies(self) -> None:
        """RECEIVING to READY for studies that have gone quiet."""
        for job in self._jobs.complete_quiet_studies(self._quiet_seconds):
            get_logger().info(
                "study_complete",
                job_id=job.job_id,
                study_instance_uid=job.study_instance_uid,
                revision=job.revision,
                quiet_s=self._quiet_seconds,
            )

    def take_back_expired(self) -> None:
        """SCREENING to READY for jobs whose worker is gone."""
        if count := self._jobs.take_back_expired():
            get_logger().warning("leases_expired", count=count)

    def _add(self, name: str, step: Callable[[], None], seconds: float) -> None:
        def run_step() -> None:
            try:
                step()
            except Transient as error:
                # the next run is the retry
                get_logger().warning("step_failed", kind=name, error=type(error).__name__, detail=error.detail)

        self._engine.add_job(run_step, "interval", seconds=seconds, id=name, name=name)

    @staticmethod
    def _on_event(event: Any) -> None:
        if event.code == EVENT_JOB_ERROR:
            get_logger().error("step_failed", kind=event.job_id, error=type(event.exception).__name__)
        else:
            missed = event.code == EVENT_JOB_MISSED
            get_logger().warning("step_missed" if missed else "step_still_runs", kind=event.job_id)


def run(settings: Settings) -> int:
    """Schedule until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, "scheduler")
    ended = threading.Event()

    def end(signum: int, _frame: FrameType | None) -> None:
        get_logger().info("stopping", signal=signal.Signals(signum).name)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    scheduler = Scheduler(settings)
    scheduler.start()
    get_logger().info("scheduler_started", quiet_s=settings.completeness.quiet_seconds)
    ended.wait()
    scheduler.stop()
    get_logger().info("stopped")
    return 0
