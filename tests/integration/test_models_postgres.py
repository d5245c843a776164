"""Versions of models, refits and drift in PostgreSQL: their rows say there what they say in SQLite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osteo_daemon.domain.job import Priority
from osteo_daemon.domain.observation import Scanner
from osteo_daemon.domain.refit import Refit, RefitState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError, LeaseLost
from osteo_daemon.jobs.records import ModelChangeKind, Shadow
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import Settings
from tests.candidates import NETWORK
from tests.postgres import Cluster
from tests.unit.test_registry import WHO, Node

NOW = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)
SCANNER = Scanner("SIEMENS", "FORCE", "soft")


def screened(store: JobStore, number: int, at: datetime, priority: Priority = Priority.ROUTINE) -> int:
    study = f"1.2.{number}"
    instance = SopInstance(study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", Path(f"/nowhere/{number}"), 1, "0" * 64)
    store.record_instance(instance, "CT", priority=priority, now=at)
    store.mark_complete(study, who="test", reason="test", now=at)
    job = store.claim("worker", 60, now=at)
    assert job is not None
    vertebra = {"level": "L1", "attenuation_hu": {"median": 100.5 + number}, "quality_flags": [], "network": None}
    result = {"schema": "osteo-result/1", "outcome": "reported", "category": "reduced", "vertebrae": [vertebra]}
    store.commit_report(job, result, [], [], scanner=SCANNER, now=at)
    return job.job_id


def test_changes_of_models_and_shadows(postgres: Cluster) -> None:
    store = JobStore(url := postgres.new())
    before, after = ("1.0.0", "a" * 64), ("2.0.0", "b" * 64)
    said = {"who": "me", "reason": "the verdict", "now": NOW}
    first = store.begin_model_change(ModelChangeKind.PROMOTED, "osteo-moe", before, after, **said)
    second = store.begin_model_change(ModelChangeKind.SHADOWED, "osteo-moe", None, None, done=True, **said)
    third = store.begin_model_change(ModelChangeKind.REGISTERED, "spine-localizer", None, after, **said)
    assert first < second < third
    assert [change.change_id for change in store.model_changes(begun=True)] == [first, third]
    store.settle_model_change(first, done=False)
    store.settle_model_change(third, done=True)
    assert store.model_changes(begun=True) == []
    changes = store.model_changes("osteo-moe")
    assert [(change.kind, change.done) for change in changes] == [
        (ModelChangeKind.PROMOTED, False),
        (ModelChangeKind.SHADOWED, True),
    ]
    assert (changes[0].from_version, changes[0].to_sha256, changes[0].at) == ("1.0.0", "b" * 64, NOW)

    job_id = screened(store, 1, NOW)
    levels = {"L1": {"bmd_g_cm2": 0.912, "deployed_bmd_g_cm2": None, "class": "osteopenia", "deployed_class": None}}
    for seconds in (2.5, 0.25):  # of one revision the last word counts
        shadow = Shadow(job_id, 1, "b" * 64, "a" * 64, NOW, seconds, None, levels)
        store.save_shadow(shadow)
    assert store.shadows("b" * 64) == [shadow]
    assert store.shadows("a" * 64) == []
    store.close()
    postgres.drop(url)


def test_the_registry_of_a_node(postgres: Cluster, tmp_path: Path) -> None:
    store = JobStore(url := postgres.new())
    settings = Settings(state_dir=tmp_path / "state")
    node = Node(settings, store, Registry(settings, store), tmp_path)
    shipped = node.deployed().version
    node.add("1.0.0")
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    assert node.deployed().version == "1.0.0"
    node.registry.rollback(NETWORK, **WHO)
    assert node.deployed().version == shipped
    kinds = [(change.kind, change.done) for change in store.model_changes()]
    assert kinds == [
        (ModelChangeKind.REGISTERED, True),
        (ModelChangeKind.REGISTERED, True),  # the shipped one, so that there is a way back
        (ModelChangeKind.PROMOTED, True),
        (ModelChangeKind.ROLLED_BACK, True),
    ]
    store.close()
    postgres.drop(url)


def test_refits_are_asked_for_once_claimed_once_and_fenced(postgres: Cluster) -> None:
    store = JobStore(url := postgres.new())

    def ask(number: int) -> Refit | None:
        try:
            return store.request_refit("here", who=f"w{number}", reason="labels", now=NOW)
        except ConfigurationError:
            return None

    with ThreadPoolExecutor(4) as pool:
        asked = [refit for refit in pool.map(ask, range(4)) if refit is not None]
        assert len(asked) == 1  # one is open at a time, however many ask at one moment
        claims = [c for c in pool.map(lambda n: store.claim_refit(f"w{n}", 60, now=NOW), range(4)) if c is not None]
    (first,) = claims
    assert (first.refit_id, first.state, first.attempts, first.progress) == (
        asked[0].refit_id,
        RefitState.RUNNING,
        1,
        {},
    )
    store.refit_goes_on(first, 60, {"stage": "experts", "done": 3}, now=NOW)
    assert store.claim_refit("late", 60, now=NOW + timedelta(seconds=59)) is None
    second = store.claim_refit("late", 60, now=NOW + timedelta(seconds=61))
    assert second is not None
    assert (second.attempts, second.progress) == (2, {"stage": "experts", "done": 3})
    with pytest.raises(LeaseLost):
        store.end_refit(first, RefitState.DONE, verdict="promote", now=NOW)
    store.end_refit(second, RefitState.DONE, verdict="promote", recommended="ridge", versions=["1.1.0"], now=NOW)
    (ended,) = store.refits()
    assert (ended.state, ended.verdict, ended.versions, ended.ended_at) == (RefitState.DONE, "promote", ("1.1.0",), NOW)
    assert store.new_labels("here") == 0
    again = store.request_refit("here", who="me", reason="once more", now=NOW)
    for attempt in range(3):
        claim = store.claim_refit("w", 60, is_gone=lambda _worker: True, now=NOW)
        assert claim is not None
        assert (claim.refit_id, claim.attempts) == (again.refit_id, attempt + 1)
    assert store.claim_refit("w", 60, is_gone=lambda _worker: True, now=NOW) is None
    assert store.refits()[0].state is RefitState.FAILED
    store.close()
    postgres.drop(url)


def test_observations_and_alarms_of_drift(postgres: Cluster) -> None:
    store = JobStore(url := postgres.new())
    for number in range(4):
        screened(store, number, NOW + timedelta(minutes=number))
    screened(store, 9, NOW, Priority.BACKFILL)  # of another time and scanner
    seen = store.observations(NOW, NOW + timedelta(minutes=3), 100)
    assert [entry.levels_hu for entry in seen] == [{"L1": 100.5 + number} for number in range(3)]
    assert {entry.scanner for entry in seen} == {SCANNER}
    assert [entry.at for entry in store.observations(NOW, NOW + timedelta(hours=1), 2)] == [
        NOW + timedelta(minutes=2),
        NOW + timedelta(minutes=3),
    ]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _n: store.note_drift({"a": "is high"}, frozenset(), now=NOW), range(4)))
    assert sorted(raised for raised, _ in told) == [[], [], [], ["a"]]  # an alarm is raised once
    assert store.note_drift({}, frozenset({"a"}), now=NOW) == ([], ["a"])
    assert store.drift_alarms() == []
    assert [(alarm.chart, alarm.cleared_at) for alarm in store.drift_alarms(standing=False)] == [("a", NOW)]
    store.close()
    postgres.drop(url)
