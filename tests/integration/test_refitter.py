"""The refitter with a real child: behind screening, killed and taken up again, candidates in the registry."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from osteo_daemon.cli import cli
from osteo_daemon.domain.refit import MAXIMUM_ATTEMPTS, Refit, RefitState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError, LeaseLost
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.refitter import Refitter
from osteo_daemon.registry.registry import Registry
from osteo_daemon.scheduler import Scheduler
from osteo_daemon.settings import Settings
from tests.fakes import until
from tests.refits import make_parts, refit_process, state_of
from tests.stores import new_sqlite

NOW = datetime(2026, 11, 23, tzinfo=UTC)
QUICK = ("--steps", "20", "--outer-folds", "2", "--inner-folds", "2", "--repeats", "40")


def screening(store: JobStore, spool: Spool) -> object:
    """A study in the hands of a screener."""
    stored = spool.store_instance("1.1", "1.1.1", "1.1.1.1", [b"pixels"])
    instance = SopInstance("1.1", "1.1.1", "1.2", "1.1.1.1", "1.2", stored.path, stored.size_bytes, stored.sha256)
    store.record_instance(instance, "CT")
    store.mark_complete("1.1", who="test", reason="test")
    job = store.claim("screener", 600)
    assert job is not None
    return job


def test_a_refit_waits_for_screening_survives_a_kill_and_registers_its_candidates(tmp_path: Path) -> None:
    parent, replay, site, _ = make_parts(tmp_path / "parts")
    state = tmp_path / "state"
    shutil.copytree(parent.path, state / "models" / "osteo-moe")
    settings = Settings.model_validate(
        {"state_dir": state, "refit": {"enabled": True, "site": "fourth", "replay_file": replay}}
    )
    store = JobStore(settings.database_url)
    asked = store.request_refit("fourth", who="test", reason="a test", data=str(site))
    job = screening(store, Spool(settings.spool_dir))

    refitter = Refitter(settings, QUICK)
    # prctl's death signal follows the thread that starts a child: one thread for both attempts
    worker = threading.Thread(target=lambda: (refitter.step(), refitter.step()))
    worker.start()
    try:
        until(lambda: refit_process(state) is not None, 60)
        first = refit_process(state)
        assert first is not None
        until(lambda: state_of(first) == "T", 60)
        until(lambda: bool(store.refits()[0].progress.get("paused")), 60)
        store.exclude(job, "no_ct_series", "none", {})  # type: ignore[arg-type]
        until(lambda: any(state.glob("refits/*/out/work/fits/*.safetensors")), 300)
        os.kill(first, signal.SIGKILL)
        until(lambda: store.refits()[0].attempts == 2, 60)
        worker.join(300)
        assert not worker.is_alive()
    finally:
        refitter.stop()
        worker.join(60)
        refitter.close()
    done = store.refits()[0]
    assert (done.refit_id, done.state, done.attempts) == (asked.refit_id, RefitState.DONE, 2)
    assert done.verdict in ("better", "equal", "worse", "not_enough_data")
    registry = Registry(settings, store)
    versions = {version.version: version for version in registry.versions("osteo-moe")}
    assert done.versions
    for name in done.versions:
        assert versions[name].compared_with == parent.sha256
        assert versions[name].recommended == done.recommended
    assert registry.deployed("osteo-moe").sha256 == parent.sha256  # nothing is promoted by itself
    left = {path.name for path in state.glob("refits/*/out/*")}
    assert left == {"verdict.json", "verdict.txt", "progress.json", "refit.json"}  # vertebrae stay in the archive alone
    config = tmp_path / "osteo.toml"
    config.write_text(f'state_dir = "{state}"\n')
    shown = CliRunner().invoke(cli, ["refit", "--config", str(config)])
    assert shown.exit_code == 0
    assert f"recommended: {done.recommended}" in shown.output


def test_a_claim_is_lost_to_the_next_and_spent_attempts_fail(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    store.request_refit("here", who="test", reason="a test", now=NOW)
    with pytest.raises(ConfigurationError, match="has not ended"):
        store.request_refit("here", who="test", reason="again", now=NOW)
    first = claimed(store, "a", NOW)
    assert store.claim_refit("b", 60, now=NOW + timedelta(seconds=30)) is None
    second = claimed(store, "b", NOW + timedelta(seconds=61))
    with pytest.raises(LeaseLost):
        store.refit_goes_on(first, 60, {}, now=NOW)
    with pytest.raises(LeaseLost):
        store.end_refit(first, RefitState.DONE, now=NOW)
    store.release_refit(second, None, charged=False)  # stopped in order: not charged
    third = claimed(store, "c", NOW)
    assert third.attempts == second.attempts
    gone = claimed(store, "d", NOW, is_gone=True)
    assert gone.attempts == MAXIMUM_ATTEMPTS
    assert store.claim_refit("e", 60, is_gone=lambda _worker: True, now=NOW) is None
    ended = store.refits()[0]
    assert ended.state is RefitState.FAILED
    assert "ended 3 times" in str(ended.detail)
    store.request_refit("here", who="test", reason="a new one", now=NOW)


def claimed(store: JobStore, worker: str, now: datetime, *, is_gone: bool = False) -> Refit:
    found = store.claim_refit(worker, 60, is_gone=lambda _worker: is_gone, now=now)
    assert found is not None
    return found


def test_the_scheduler_asks_only_when_enough_labels_are_new(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {"state_dir": tmp_path, "refit": {"enabled": True, "site": "here", "minimum_new_labels": 3}}
    )
    scheduler = Scheduler(settings)
    store = JobStore(settings.database_url)
    scheduler.start()
    try:
        until(lambda: any(run.step == "scheduled_refit" and run.next_at for run in store.scheduler_runs()))
        assert scheduler.ask_for_refit().startswith("0 new labels")
        label(settings, 3)
        assert scheduler.ask_for_refit() == "refit 1 of here with 3 new labels"
        label(settings, 3, first=3)
        assert "has not ended" in scheduler.ask_for_refit()
        refit = claimed(store, "a", NOW)
        store.end_refit(refit, RefitState.REFUSED, detail="too few", now=NOW)
        assert scheduler.ask_for_refit() == "refit 2 of here with 3 new labels"
    finally:
        scheduler.stop()


def label(settings: Settings, count: int, first: int = 0) -> None:
    """Labels without the archive around them: only their number is read."""
    assert settings.database_file is not None
    with sqlite3.connect(settings.database_file) as connection:  # foreign keys are off unless asked for
        connection.executemany(
            "INSERT INTO archive_labels (entry, level, bmd_g_cm2, maker, model, days_apart, import_id) "
            "VALUES (?, 'L1', 1.0, 'Hologic', '', 0, 1)",
            [(str(number),) for number in range(first, first + count)],
        )
    connection.close()
