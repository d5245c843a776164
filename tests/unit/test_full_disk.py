"""A disk without a byte left, under store and spool: each step says that it may be tried again, and then succeeds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import SpoolFull, StoreUnavailable
from osteo_daemon.jobs.records import NewDelivery, RecordOutcome, ReportKind
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from tests.stores import new_sqlite
from tests.unit.test_jobs_store import RESULT, at, instance, report


class Disk:
    """A small file system that can be filled to its last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb") as ballast:
            if free := shutil.disk_usage(self.folder).free:
                os.posix_fallocate(ballast.fileno(), 0, free)

    def relieve(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield Disk(mount)
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_what_was_said_is_there_and_what_failed_succeeds_when_there_is_room(disk: Disk) -> None:
    store, spool = new_sqlite(disk.folder / "state"), Spool(disk.folder / "state" / "spool")
    large = [os.urandom(600_000)]
    disk.fill()
    with pytest.raises(SpoolFull):
        spool.store_instance("1.1", "1.1.1", "1.1.1.0", large)
    assert spool.received_files("1.1") == []
    disk.relieve()

    # rows: SQLite may have set a little room aside, so some are still taken; each that was, is there
    disk.fill()
    said = _recorded_until_full(store)
    disk.relieve()
    assert sum(job.instances for job in store.recent()) == said
    assert store.record_instance(instance(said + 1, "1.1"), "CT1", now=at(0)) is RecordOutcome.STORED

    store.mark_complete("1.1", who="test", reason="test", now=at(1))
    job = store.claim("w", 60, now=at(2))
    assert job is not None
    assert len(store.instances(job)) == said + 1
    disk.fill()
    with pytest.raises(SpoolFull):
        spool.store_report("1.1", "9.1", large)
    assert spool.report_files("1.1") == []
    disk.relieve()
    made = replace(report(ReportKind.SR, "9.1"), path=spool.store_report("1.1", "9.1", large).path)
    result = {**RESULT, "text": os.urandom(500_000).hex()}
    disk.fill()
    with pytest.raises(StoreUnavailable):
        store.commit_report(job, result, [made], [NewDelivery("pacs", ("9.1",))], now=at(3))
    present = store.job("1.1")
    assert present is not None
    assert (present.state, store.result("1.1"), store.deliveries()) == (JobState.SCREENING, None, [])
    disk.relieve()
    store.heartbeat(job, 60, now=at(4))
    store.commit_report(job, result, [made], [NewDelivery("pacs", ("9.1",))], now=at(5))
    assert store.result("1.1") == result
    assert [delivery.destination for delivery in store.deliveries()] == ["pacs"]
    assert store.damage() == []
    assert store.wrong_counts() == {}
    store.close()


def _recorded_until_full(store: JobStore) -> int:
    """How many objects the store said it has when it could take no more."""
    for number in range(1, 5000):
        try:
            assert store.record_instance(instance(number, "1.1"), "CT1", now=at(0)) is RecordOutcome.STORED
        except StoreUnavailable:
            return number - 1
    raise AssertionError("the disk never was full")
