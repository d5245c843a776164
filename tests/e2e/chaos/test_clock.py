"""A wall clock that is set back does not stop the node until it catches up with what was written before."""

from __future__ import annotations

from pathlib import Path

import pytest

from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings
from tests.e2e.chaos.clock import ShiftedClock
from tests.fakes import RoleProcess, settings_text, until, write_ct
from tests.integration.screening import Bench

pytestmark = [pytest.mark.slow]
_TWO_HOURS = 7200


def test_studies_are_completed_after_the_clock_was_set_back(tmp_path: Path) -> None:
    clock = ShiftedClock(tmp_path)
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 1, quiet_seconds=0.5))
    settings = load_settings(config, {})
    prefix = ["env", *(f"{name}={value}" for name, value in clock.environment.items())]
    role = RoleProcess(["run", "scheduler", "--config", str(config)], tmp_path / "scheduler.log")
    bench = Bench(tmp_path, config, Spool(settings.spool_dir), JobStore(settings.database_url), role)
    clock.shift(_TWO_HOURS)
    role.start(prefix)
    try:
        role.wait_for("scheduler_started", 60)
        until(
            lambda: any(run.step == "completeness_sweep" and run.started_at for run in bench.store.scheduler_runs()), 60
        )
        clock.shift(0)
        role.wait_for("clock_set_back")
        study = bench.receive(write_ct(tmp_path / "one"), complete=False)
        until(lambda: bench.job(study).state is JobState.READY, 20)
        role.process.kill()  # type: ignore[union-attr]
        role.process.wait()  # type: ignore[union-attr]
        role.start(prefix)  # what the last run noted lies in the future
        study = bench.receive(write_ct(tmp_path / "two", seed=1), complete=False)
        until(lambda: bench.job(study).state is JobState.READY, 60)
    finally:
        assert role.stop() == 0
        bench.store.close()
