"""The screener's pen: what a locked store, a lost lease, the wall clock and spent attempts make of an outcome."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.errors import LeaseLost, StoreUnavailable
from osteo_daemon.jobs.claims import WALL_CLOCK_LIMIT
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import LeaseWatch
from osteo_daemon.outcome import OutcomeWriter
from osteo_daemon.settings import ScreenerSettings
from tests.stores import new_sqlite
from tests.unit.test_jobs_store import instance

EXCLUDED: dict[str, Any] = {
    "type": "excluded",
    "code": "no_ct_series",
    "reason": "none",
    "result": {"schema": "osteo-result/1"},
    "scanner": {},
    "objects": [],
    "deliveries": {},
}


@dataclass
class Desk:
    """A writer whose store gives up soon, and a study in hand."""

    store: JobStore
    database: Path
    stopping: threading.Event
    writer: OutcomeWriter

    def claimed(self) -> Job:
        with sqlite3.connect(self.database) as connection:  # it need not wait here
            connection.execute("UPDATE jobs SET not_before = NULL")
        connection.close()
        job = self.store.claim("w", 60, 3)
        assert job is not None
        return job

    def watch(self, wall_clock_seconds: float = 60) -> LeaseWatch:
        return LeaseWatch(60, wall_clock_seconds, 5, self.stopping)

    def lock(self) -> sqlite3.Connection:
        """Another process's lock: a backup tool, an administrator's shell."""
        connection = sqlite3.connect(self.database, isolation_level=None, check_same_thread=False)
        connection.execute("BEGIN EXCLUSIVE")
        return connection

    @property
    def state(self) -> JobState:
        job = self.store.job("1.1")
        assert job is not None
        return job.state


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    new_sqlite(tmp_path).close()
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}", busy_timeout_seconds=0.05)
    store.record_instance(instance(1, "1.1"), "CT1")
    store.mark_complete("1.1", who="test", reason="test")
    stopping = threading.Event()
    writer = OutcomeWriter(store, ScreenerSettings(retry_base_seconds=100), stopping)
    yield Desk(store, tmp_path / "jobs.sqlite", stopping, writer)
    store.close()


def test_a_result_outlasts_a_locked_store(desk: Desk) -> None:
    job, lock = desk.claimed(), desk.lock()

    def relieve() -> None:
        time.sleep(0.3)
        lock.execute("ROLLBACK")
        lock.close()

    thread = threading.Thread(target=relieve)
    thread.start()
    assert desk.writer.commit(job, EXCLUDED, desk.watch()) == "no_ct_series"
    thread.join()
    assert desk.state is JobState.EXCLUDED


def test_it_is_asked_no_longer_than_the_study_has_and_not_when_the_node_stops(desk: Desk) -> None:
    job, lock = desk.claimed(), desk.lock()
    with pytest.raises(StoreUnavailable):
        desk.writer.commit(job, EXCLUDED, desk.watch(wall_clock_seconds=0))
    desk.stopping.set()
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        desk.writer.commit(job, EXCLUDED, desk.watch())
    assert time.monotonic() - start < 30
    # an end without a result is not insisted on: the lease runs out, and the study comes back
    assert desk.writer.commit(job, {"type": "held", "code": "Damaged", "detail": "cut"}, desk.watch()) == "not_written"
    lock.execute("ROLLBACK")
    lock.close()
    assert desk.state is JobState.SCREENING


def test_nothing_is_written_for_another_holder(desk: Desk) -> None:
    job = desk.claimed()
    desk.store.worker_ended("w", "killed")
    other = desk.claimed()
    with pytest.raises(LeaseLost):
        desk.writer.commit(job, EXCLUDED, desk.watch())
    assert desk.writer.retry(job, "worker_died", "SIGKILL") == "not_written"
    assert desk.writer.commit(job, {"type": "cancelled"}, desk.watch()) == "cancelled"
    present = desk.store.job("1.1")
    assert present is not None
    assert (present.state, present.fencing_token) == (JobState.SCREENING, other.fencing_token)


def test_attempts_wait_longer_each_time_and_end(desk: Desk) -> None:
    for attempt, waits_seconds in ((1, 100), (2, 200)):
        job = desk.claimed()
        assert desk.writer.commit(job, {"type": WALL_CLOCK_LIMIT}, desk.watch()) == "retry, wall_clock_limit"
        (summary,) = desk.store.recent()
        assert summary.not_before is not None
        waits = (summary.not_before - datetime.now(UTC)).total_seconds()
        assert 0.8 * waits_seconds - 30 < waits <= 1.2 * waits_seconds
        assert (summary.attempts, summary.detail) == (attempt, "not done within 1800 s")
    assert desk.writer.commit(desk.claimed(), {"type": WALL_CLOCK_LIMIT}, desk.watch()) == "failed, wall_clock_limit"
    assert desk.state is JobState.FAILED
