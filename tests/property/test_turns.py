"""Fairness: whatever arrives, no source waits while another is served twice in the same priority class."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.store import JobStore
from tests.postgres import SHARED_MEMORY
from tests.stores import new_sqlite

START = datetime(2026, 1, 1, tzinfo=UTC)
SOURCES = ("ARCHIVE", "CT1", "CT2")
ARRIVAL = st.tuples(st.sampled_from(SOURCES), st.sampled_from(Priority), st.integers(1, 3))
STEP = st.one_of(ARRIVAL, st.just("claim"), st.just("claim"), st.just("retry"))


def waiting(store: JobStore, now: datetime) -> dict[int, tuple[str, Priority]]:
    """Jobs that may be claimed now: source and class."""
    found = {}
    for summary in store.recent(state=JobState.READY, limit=1000):
        if summary.not_before is None or summary.not_before <= now:
            found[summary.job_id] = (summary.source_ae, summary.priority)
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=8, max_size=20))
def test_sources_take_turns_within_a_class(steps: list[object]) -> None:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        store = new_sqlite(Path(folder))
        now, serial = START, 0
        # for each source and class: who was served since work of it has waited without a break
        served_since: dict[tuple[str, Priority], list[str]] = {}
        for step in steps:
            now += timedelta(seconds=1)
            if isinstance(step, tuple):
                source, priority, count = step
                for _ in range(count):
                    study = f"1.{serial}"
                    serial += 1
                    instance = SopInstance(study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", Path("/x"), 1, "0" * 64)
                    store.record_instance(instance, source, priority=priority, now=now)
                    store.mark_complete(study, who="test", reason="test", now=now)
            else:
                before = waiting(store, now)
                job = store.claim("w", 3600, now=now)
                assert (job is None) == (not before)
                if job is not None:
                    source, priority = before[job.job_id]
                    assert priority == min(of for _, of in before.values())
                    assert job.job_id == min(key for key, value in before.items() if value == (source, priority))
                    for other in {value for value in before.values() if value[1] == priority} - {(source, priority)}:
                        assert source not in served_since.get(other, []), f"{source} twice while {other[0]} waited"
                    for key in served_since:
                        served_since[key].append(source)
                    served_since.pop((source, priority), None)
                    if step == "retry":
                        store.retry_later(job, "Transient", "x", now + timedelta(seconds=3), now=now)
                    else:
                        store.exclude(job, "no_ct_series", "none", {}, now=now)
            present = set(waiting(store, now).values())
            served_since = {key: value for key, value in served_since.items() if key in present}
            for key in present - served_since.keys():
                served_since[key] = []
        store.close()


def test_a_flood_does_not_starve_a_scanner(tmp_path: Path) -> None:
    """Many studies of an archive stand before one of a scanner: it is the second to be taken up."""
    store = new_sqlite(tmp_path)
    for number in range(30):
        study = f"1.{number}"
        source = "CT1" if number == 29 else "ARCHIVE"
        instance = SopInstance(study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", Path("/x"), 1, "0" * 64)
        store.record_instance(instance, source)
        store.mark_complete(study, who="test", reason="test")
    first, second = store.claim("w", 60), store.claim("w", 60)
    assert first is not None
    assert second is not None
    assert {first.study_instance_uid, second.study_instance_uid} == {"1.0", "1.29"}
    store.prioritise_study("1.28", Priority.STAT, "operator", "in theatre")
    third = store.claim("w", 60)
    assert third is not None
    assert (third.study_instance_uid, third.priority) == ("1.28", Priority.STAT)
    store.close()
