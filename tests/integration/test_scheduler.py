"""The scheduler as a process: one leader, steps that are seen, retention and backups by themselves."""

from __future__ import annotations

import json
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from osteo_daemon.archive.key import make_key
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.scheduler import Scheduler
from osteo_daemon.settings import Settings
from tests.fakes import RoleProcess, settings_text, until
from tests.stores import new_sqlite
from tests.unit.test_voi_archive import identity as voi_identity
from tests.unit.test_voi_archive import study as voi_study

PAST = datetime.now(UTC) - timedelta(days=40)


def excluded(store: JobStore, spool: Spool, study: str, when: datetime) -> SopInstance:
    uid = f"{study}.1.1"
    stored = spool.store_instance(study, f"{study}.1", uid, [b"pixels"])
    instance = SopInstance(study, f"{study}.1", "1.2", uid, "1.2", stored.path, stored.size_bytes, stored.sha256)
    store.record_instance(instance, "CT", now=when)
    store.mark_complete(study, who="test", reason="test", now=when)
    job = store.claim("w", 60, now=when)
    assert job is not None
    store.exclude(job, "no_ct_series", "none", {}, now=when)
    return instance


def test_retention_and_backups_happen_and_are_seen(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    store, spool = JobStore(f"sqlite:///{state / 'jobs.sqlite'}"), Spool(state / "spool")
    old, young = excluded(store, spool, "1.1", PAST), excluded(store, spool, "1.2", datetime.now(UTC))
    config = tmp_path / "osteo.toml"
    config.write_text(
        settings_text(state, 0)
        + "[retention]\nsweep_seconds = 1\n"
        + f'[backup]\nfolder = "{tmp_path / "backups"}"\nevery_hours = 0.0003\nkeep = 2\n'
    )
    role = RoleProcess(["run", "scheduler", "--config", str(config)], tmp_path / "scheduler.log").start()
    try:
        until(lambda: not old.path.exists())
        until(lambda: any(run.step == "backup" and run.runs >= 4 for run in store.scheduler_runs()), 60)
    finally:
        assert role.stop() == 0
    assert young.path.exists()
    assert [job.instances for job in store.recent()] == [1, 0]
    assert len(list((tmp_path / "backups").glob("*/manifest.json"))) == 2

    shown = CliRunner().invoke(cli, ["schedule", "--json", "--config", str(config)])
    runs = {run["step"]: run for run in json.loads(shown.output)}
    assert {"completeness_sweep", "lease_sweep", "delivery_retry", "retention", "backup"} <= runs.keys()
    assert all(run["next_at"] and not run["failures"] for run in runs.values())
    assert runs["retention"]["started_at"] < runs["retention"]["ended_at"] < runs["retention"]["next_at"]
    assert [event.who for event in store.events("1.1") if event.event == "study_purged"] == ["scheduler"]
    text = CliRunner().invoke(cli, ["schedule", "--config", str(config)]).output
    assert all(step in text for step in runs)
    store.close()


def test_a_failed_backup_is_seen_and_nothing_else_stops(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    (tmp_path / "backups").write_text("a file where a folder should be")
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(state, 0) + f'[backup]\nfolder = "{tmp_path / "backups"}"\nevery_hours = 0.0003\n')
    role = RoleProcess(["run", "scheduler", "--config", str(config)], tmp_path / "scheduler.log").start()
    try:
        until(lambda: any(run.step == "backup" and run.failures >= 2 for run in store.scheduler_runs()))
        (run,) = [run for run in store.scheduler_runs() if run.step == "backup"]
        assert run.outcome == "ConfigurationError"
        assert run.detail is not None
        assert "could not be written" in run.detail
    finally:
        assert role.stop() == 0
    assert "step_failed" in role.log.read_text()
    store.close()


def test_one_scheduler_leads_and_another_takes_over(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    store, spool = JobStore(f"sqlite:///{state / 'jobs.sqlite'}"), Spool(state / "spool")
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(state, 0, quiet_seconds=0.1))
    command = ["run", "scheduler", "--config", str(config)]
    first = RoleProcess(command, tmp_path / "first.log").start()
    first.wait_for("leads")
    second = RoleProcess(command, tmp_path / "second.log").start()
    try:
        second.wait_for("scheduler_started")
        assert "leads" not in second.log.read_text()
        first.stop(signal.SIGKILL)
        stored = spool.store_instance("1.3", "1.3.1", "1.3.1.1", [b"pixels"])
        instance = SopInstance("1.3", "1.3.1", "1.2", "1.3.1.1", "1.2", stored.path, stored.size_bytes, stored.sha256)
        store.record_instance(instance, "CT")

        def is_ready() -> bool:
            job = store.job("1.3")
            return job is not None and job.state is JobState.READY

        until(is_ready)
        assert "leads" in second.log.read_text()
    finally:
        assert second.stop() == 0
    store.close()


def test_nothing_is_removed_while_the_clock_is_wrong(tmp_path: Path) -> None:
    store, spool = new_sqlite(tmp_path), Spool(tmp_path / "spool")
    young = excluded(store, spool, "1.1", datetime.now(UTC))
    ahead = [timedelta(0)]
    scheduler = Scheduler(Settings(state_dir=tmp_path), clock=lambda: datetime.now(UTC) + ahead[0])
    ahead[0] = timedelta(days=60)
    with pytest.raises(ConfigurationError, match=r"moved by 1440\.0 h"):
        scheduler.retain()
    assert young.path.exists()
    scheduler = Scheduler(Settings(state_dir=tmp_path), clock=lambda: datetime.now(UTC) + ahead[0])
    assert scheduler.retain() == "1 images"  # it started so: sixty days have really passed
    assert not young.path.exists()
    store.close()


def test_the_archive_has_limits_of_its_own(tmp_path: Path) -> None:
    make_key(tmp_path / "link.key")
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "archive": {"enabled": True, "consent": "vote", "key_file": tmp_path / "link.key", "retention_days": 30},
            "receiver": {"minimum_free_bytes": 0, "low_free_bytes": 1},
            "retention": {"images_days": 0},
        }
    )
    archive = VoiArchive(settings, JobStore(settings.database_url))
    today = datetime.now(UTC).date()
    for number, days in enumerate((31, 29)):
        assert archive.add(voi_study(number), voi_identity(number), 1, today - timedelta(days=days))
    # what is kept has its limits though the archive is off meanwhile
    off = settings.model_copy(update={"archive": settings.archive.model_copy(update={"enabled": False})})
    assert Scheduler(off).retain() == "1 archived studies too old"
    assert [who.study_instance_uid for _, who in archive.identities()] == ["1.2.3.1"]


def test_reports_that_nobody_gets_stay_and_are_told_of(tmp_path: Path) -> None:
    store, spool = new_sqlite(tmp_path), Spool(tmp_path / "spool")
    uid = "1.1.1.1"
    stored = spool.store_instance("1.1", "1.1.1", uid, [b"pixels"])
    image = SopInstance("1.1", "1.1.1", "1.2", uid, "1.2", stored.path, stored.size_bytes, stored.sha256)
    store.record_instance(image, "CT", now=PAST)
    store.mark_complete("1.1", who="test", reason="test", now=PAST)
    job = store.claim("w", 60, now=PAST)
    assert job is not None
    store.commit_report(job, {}, [], [], now=PAST)
    scheduler = Scheduler(Settings(state_dir=tmp_path))
    assert scheduler.retain() == "1 REPORTED ones stay for want of a destination"
    assert image.path.exists()
    store.close()
