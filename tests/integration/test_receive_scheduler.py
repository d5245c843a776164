"""The scheduler's steps, in this process and as `osteo run scheduler`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.jobs.transitions import CLOCK_STEP
from tests.fakes import RoleProcess, settings_text, until


def _instance(study: str) -> SopInstance:
    return SopInstance(study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", Path("/x"), 1, "0" * 64)


def test_the_scheduler_completes_quiet_studies_and_takes_back_expired_leases(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
    past = datetime.now(UTC) - timedelta(hours=1)
    store.record_instance(_instance("1.1"), "CT", now=past)
    store.mark_complete("1.1", who="test", reason="test", now=past)
    assert store.claim("gone", 60, now=past) is not None
    store.record_instance(_instance("1.2"), "CT", now=past)
    store.record_instance(_instance("1.3"), "CT", now=datetime.now(UTC) + CLOCK_STEP / 2)

    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 0, quiet_seconds=2))
    role = RoleProcess(["run", "scheduler", "--config", str(config)], tmp_path / "scheduler.log").start()
    try:
        for study in ("1.2", "1.1"):
            until(lambda study=study: (job := store.job(study)) and job.state is JobState.READY)
        job = store.job("1.3")
        assert job is not None
        assert job.state is JobState.RECEIVING
    finally:
        assert role.stop() == 0
    log = role.log.read_text()
    assert "study_complete" in log
    assert "leases_expired" in log
    store.close()
