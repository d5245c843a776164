"""One scheduler leads: the lease is kept from a thread of its own, lost to another, and given back at once."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from osteo_daemon import leadership
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.jobs.transitions import utc_now
from osteo_daemon.leadership import LEASE_SECONDS, Leadership
from tests.fakes import until
from tests.stores import new_sqlite

OTHER = "scheduler-another-machine-1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = new_sqlite(tmp_path)
    yield store
    store.close()


def test_a_lease_is_lost_to_another_and_comes_back(store: JobStore) -> None:
    taken: list[bool] = []
    mine = Leadership(store, lambda: taken.append(True))
    assert not mine.leads
    mine.ask()
    assert mine.leads
    assert not store.lead("scheduler", OTHER, LEASE_SECONDS)
    mine.ask()
    assert len(taken) == 1  # kept, not taken anew
    later = utc_now() + timedelta(seconds=2 * LEASE_SECONDS)  # as if this process had been stopped for that long
    assert store.lead("scheduler", OTHER, LEASE_SECONDS, now=later)
    mine.ask()
    assert not mine.leads
    store.resign("scheduler", OTHER)
    mine.ask()
    assert mine.leads
    assert len(taken) == 2
    mine.resign()
    assert store.lead("scheduler", OTHER, LEASE_SECONDS)  # nobody waits for what was given back


def test_it_is_renewed_whatever_else_goes_on(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership, "LEASE_SECONDS", 0.6)
    mine = Leadership(store, lambda: None)
    mine.start()
    began = mine._until
    until(lambda: mine._until > began + 1.8, 60)  # three leases, though no step of the scheduler runs or ends
    mine.resign()
    ended = mine._until
    time.sleep(0.5)
    assert mine._until == ended  # what was given back is not taken again


def test_a_store_that_is_away_ends_it_only_with_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership, "LEASE_SECONDS", 1.0)
    new_sqlite(tmp_path).close()
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}", busy_timeout_seconds=0.05)
    mine = Leadership(store, lambda: None)
    mine.ask()
    in_hand = mine._until
    lock = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    mine.ask()
    assert mine._until == in_hand > 0  # asked and not answered: the lease in hand holds until it ends
    until(lambda: not mine.leads, 30)
    mine.ask()
    assert not mine.leads
    lock.execute("ROLLBACK")
    lock.close()
    mine.ask()
    assert mine.leads
    mine.resign()
    store.close()
