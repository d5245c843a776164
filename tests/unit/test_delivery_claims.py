"""Which delivery is next: urgency, age, a destination's own lane, and what waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osteo_daemon.domain.job import Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import Delivery, DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.store import JobStore

NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """An empty store."""
    return JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def reported(store: JobStore, study: str, priority: Priority = Priority.ROUTINE) -> None:
    """A study whose report waits for two destinations."""
    image = SopInstance(study, f"{study}.1", "1.2.840.10008.5.1.4.1.1.2", f"{study}.1.1", "1.2", Path("x"), 1, "0")
    store.record_instance(image, "CT1", now=NOW)
    store.prioritise_study(study, priority, "test", "to try", now=NOW)
    store.mark_complete(study, who="test", reason="all sent", now=NOW)
    job = store.claim("test", 60, 3, now=NOW)
    assert job is not None
    report = ReportObject(ReportKind.SR, "1.2.840.10008.5.1.4.1.1.88.34", f"{study}.9", Path("sr"), 1, "1" * 64)
    deliveries = [NewDelivery(name, (report.sop_instance_uid,)) for name in ("first", "second")]
    store.commit_report(job, {}, [report], deliveries, now=NOW)


def claim(store: JobStore, destination: str | None = "first", after_s: float = 0) -> Delivery | None:
    """The next delivery, so many seconds later."""
    return store.claim_delivery("lane", 60, destination=destination, now=NOW + timedelta(seconds=after_s))


def studies(store: JobStore, destination: str | None = "first") -> list[str]:
    """Claim until nothing is left."""
    found = []
    while (delivery := claim(store, destination)) is not None:
        found.append(delivery.study_instance_uid)
    return found


def test_the_urgent_go_first_and_then_the_oldest(store: JobStore) -> None:
    for study, priority in (
        ("1.1", Priority.BACKFILL),
        ("1.2", Priority.ROUTINE),
        ("1.3", Priority.ROUTINE),
        ("1.4", Priority.STAT),
    ):
        reported(store, study, priority)
    assert studies(store) == ["1.4", "1.2", "1.3", "1.1"]
    assert studies(store, "second") == ["1.4", "1.2", "1.3", "1.1"]
    assert studies(store, None) == []


def test_a_claim_whose_lease_ran_out_comes_back_and_counts(store: JobStore) -> None:
    reported(store, "1.1")
    first = claim(store)
    assert claim(store, after_s=59) is None
    again = claim(store, after_s=61)
    assert first is not None
    assert again is not None
    assert (again.attempts, again.fencing_token) == (2, first.fencing_token + 1)


def test_a_wait_for_proof_is_no_attempt(store: JobStore) -> None:
    reported(store, "1.1")
    first = claim(store)
    assert first is not None
    store.delivery_object_sent(first, first.objects[0].report.sop_instance_uid, "0x0000", now=NOW)
    until = NOW + timedelta(seconds=300)
    assert store.delivery_await(first, until, "waits", now=NOW) is DeliveryState.AWAITING
    assert claim(store, after_s=299) is None
    again = claim(store, after_s=300)
    assert again is not None
    assert again.attempts == 1
    assert not again.unsent
    assert len(again.unproven) == 1


def test_a_failed_attempt_lets_the_others_go_on(store: JobStore) -> None:
    reported(store, "1.1", Priority.STAT)
    reported(store, "1.2")
    first = claim(store)
    assert first is not None
    store.delivery_retry(first, NOW + timedelta(seconds=30), "busy", now=NOW)
    second = claim(store)
    assert second is not None
    assert second.study_instance_uid == "1.2"
    third = claim(store, after_s=30)
    assert third is not None
    assert third.study_instance_uid == "1.1"


def test_a_lease_does_not_last_for_as_long_as_the_clock_was_set_back(store: JobStore) -> None:
    reported(store, "1.1")
    first = claim(store, after_s=5 * 3600)
    assert first is not None
    assert claim(store, after_s=5 * 3600 - 30) is None
    # whoever is alive writes its lease anew by the present clock, and keeps it
    store.heartbeat_delivery(first, 60, now=NOW + timedelta(seconds=10))
    assert claim(store, after_s=20) is None
    assert store.take_back_deliveries(now=NOW + timedelta(seconds=20)) == 0
    store.heartbeat_delivery(first, 60, now=NOW + timedelta(hours=5))
    again = claim(store, after_s=30)
    assert again is not None
    assert again.fencing_token == first.fencing_token + 1
    store.heartbeat_delivery(again, 60, now=NOW + timedelta(hours=5))
    assert store.take_back_deliveries(now=NOW + timedelta(seconds=40)) == 1


def test_a_delivery_does_not_wait_for_a_clock_that_was_set_back(store: JobStore) -> None:
    reported(store, "1.1")
    first = claim(store, after_s=5 * 3600)
    assert first is not None
    hours = NOW + timedelta(hours=5)
    store.delivery_retry(first, hours + timedelta(seconds=600), "no answer", now=hours)
    assert claim(store, after_s=5 * 3600 + 599) is None
    again = claim(store, after_s=60)
    assert again is not None
    store.delivery_object_sent(again, again.objects[0].report.sop_instance_uid, "0x0000", now=hours)
    store.delivery_await(again, hours + timedelta(seconds=600), "waits", now=hours)
    assert claim(store, after_s=5 * 3600 + 599) is None
    assert claim(store, after_s=90) is not None
