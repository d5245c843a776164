"""The short way of one more slice writes what the general way would, says no in the same words, and goes on after."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import StoreUnavailable
from osteo_daemon.jobs import intake
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.store import JobStore

NOW = datetime(2026, 11, 23, 5, 30, 0, 70, tzinfo=timezone(timedelta(hours=2)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}", busy_timeout_seconds=0.2)
    yield made
    made.close()


def instance(number: int, study: str = "1.2", sha256: str = "0" * 64) -> SopInstance:
    return SopInstance(
        study_instance_uid=study,
        series_instance_uid=f"{study}.3",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"{study}.3.{number}",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=Path(f"/spool/{number}.dcm"),
        size_bytes=5_000_000_000,
        sha256=sha256,
    )


def rows(path: Path, study: str) -> list[tuple[object, ...]]:
    """Every column of a study's rows as SQLite holds it; the study's UID left out."""
    with sqlite3.connect(path) as plain:
        found = [
            *plain.execute("SELECT * FROM instances WHERE study_instance_uid = ? ORDER BY 1", (study,)),
            *plain.execute("SELECT * FROM studies WHERE study_instance_uid = ?", (study,)),
        ]
    return [tuple(str(value).replace(study, "STUDY") for value in row) for row in found]


def test_the_short_way_writes_what_the_general_way_writes(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: list[bool] = []
    honest = intake.record_next_slice

    def watched(*arguments: object) -> bool:
        short.append(honest(*arguments))  # type: ignore[arg-type]
        return short[-1]

    monkeypatch.setattr(intake, "record_next_slice", watched)
    for study, allowed in (("9.81", True), ("9.84", False)):
        if not allowed:
            monkeypatch.setattr(intake, "record_next_slice", lambda *_arguments: False)
        for number in range(3):
            now = NOW + timedelta(seconds=number)
            assert store.record_instance(instance(number, study), "CT1", now=now) is RecordOutcome.STORED
    assert short == [False, True, True]  # the first image is not the next one of anything
    path = tmp_path / "jobs.sqlite"
    assert rows(path, "9.81") == rows(path, "9.84")
    assert rows(path, "9.81")[1][-1] == "2026-11-23 03:30:01.000070"  # UTC


def test_what_is_not_the_next_slice_is_left_to_the_general_way(store: JobStore) -> None:
    store.record_instance(instance(1), "CT1")
    assert store.record_instance(instance(1), "CT1") is RecordOutcome.DUPLICATE
    assert store.record_instance(instance(1, sha256="1" * 64), "CT1") is RecordOutcome.CONFLICT


def test_a_locked_store_says_so_and_goes_on_afterwards(store: JobStore, tmp_path: Path) -> None:
    store.record_instance(instance(1), "CT1")
    store.record_instance(instance(2), "CT1")
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.record_instance(instance(3), "CT1")
    other.execute("ROLLBACK")
    other.close()
    assert store.record_instance(instance(3), "CT1") is RecordOutcome.STORED
    assert store.record_instance(instance(4), "CT1") is RecordOutcome.STORED
    job = store.job("1.2")
    assert job is not None
    assert job.state is JobState.RECEIVING
    assert len(store.instances(job)) == 4


def test_a_failed_slice_leaves_nothing_of_itself(store: JobStore, tmp_path: Path) -> None:
    store.record_instance(instance(1), "CT1", now=NOW.astimezone(UTC))
    with sqlite3.connect(tmp_path / "jobs.sqlite") as plain:
        plain.execute("CREATE TRIGGER no BEFORE INSERT ON instances BEGIN SELECT RAISE(ABORT, 'no'); END")
    before = rows(tmp_path / "jobs.sqlite", "1.2")
    with pytest.raises(sqlite3.IntegrityError):
        store.record_instance(instance(2), "CT1")
    assert rows(tmp_path / "jobs.sqlite", "1.2") == before  # the study's count too
    with sqlite3.connect(tmp_path / "jobs.sqlite") as plain:
        plain.execute("DROP TRIGGER no")
    assert store.record_instance(instance(2), "CT1") is RecordOutcome.STORED
