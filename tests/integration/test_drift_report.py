"""Drift monitoring through the real store and the real scheduler process."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from sqlalchemy import text

from osteo_daemon.cli import cli
from osteo_daemon.domain.job import Priority
from osteo_daemon.domain.observation import Scanner
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.store import JobStore
from tests.fakes import RoleProcess, settings_text, until
from tests.stores import new_sqlite

SCANNER = Scanner("SIEMENS", "FORCE", "soft")
NOW = datetime.now(UTC)


def claimed(store: JobStore, number: int, when: datetime, priority: Priority = Priority.ROUTINE) -> Any:
    study = f"1.2.{number}"
    instance = SopInstance(study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", Path(f"/nowhere/{number}"), 1, "0" * 64)
    store.record_instance(instance, "CT", priority=priority, now=when)
    store.mark_complete(study, who="test", reason="test", now=when)
    job = store.claim("worker", 60, now=when)
    assert job is not None
    return job


def result(hu: float, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "schema": "osteo-result/1",
        "outcome": "reported",
        "exclusion": None,
        "category": "reduced",
        "vertebrae": [{"level": "L1", "attenuation_hu": {"median": hu}, "quality_flags": [], "network": None}],
        "quality_flags": [{"code": code, "severity": "caution"} for code in flags],
        "models": [],
    }


def test_every_end_of_a_study_is_observed_once(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    begin = NOW - timedelta(hours=1)
    first = claimed(store, 1, begin)
    store.commit_report(first, result(120.5, ("tilted",)), [], [], scanner=SCANNER, now=begin)
    store.exclude(claimed(store, 2, begin), "no_ct_series", "none", {}, scanner=SCANNER, now=begin)
    store.hold(claimed(store, 3, begin), "Damaged", "cut off", now=begin)
    store.fail(claimed(store, 4, begin), "worker_died", "again", now=begin)
    store.release(claimed(store, 5, begin), now=begin)
    assert store.claim("worker", 60, now=begin) is not None
    archived = claimed(store, 6, begin, Priority.BACKFILL)
    store.commit_report(archived, result(300.0), [], [], scanner=SCANNER, now=begin)

    seen = store.observations(begin, NOW, 100)
    assert sorted(entry.outcome for entry in seen) == ["Damaged", "no_ct_series", "reported", "worker_died"]
    (reported,) = [entry for entry in seen if entry.outcome == "reported"]
    assert (reported.levels_hu, reported.flags, reported.scanner) == ({"L1": 120.5}, ("tilted",), SCANNER)

    # screened again, by another bundle a day later: the study counts once, at the time when it came
    store.reprocess_study("1.2.1", who="test", reason="test")
    again = store.claim("worker", 60)
    assert again is not None
    store.commit_report(again, result(99.0), [], [], scanner=SCANNER)
    values = [entry.levels_hu["L1"] for entry in store.observations(begin, NOW, 100) if entry.levels_hu]
    assert values == [99.0]
    assert store.observations(begin, begin, 100) == []
    assert len(store.observations(begin, NOW, 2)) == 2
    store.close()


def test_a_window_is_found_by_its_index(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    with store._reading() as connection:
        plan = connection.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT * FROM observations WHERE at >= '2026' AND at < '2027' "
                "ORDER BY at DESC, job_id DESC"
            )
        ).all()
    assert [row.detail for row in plan] == ["SEARCH observations USING INDEX ix_observations_at_job_id (at>? AND at<?)"]
    store.close()


def test_an_alarm_is_told_once_stands_and_ends(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    assert store.note_drift({"a": "is high", "b": "is low"}, frozenset()) == (["a", "b"], [])
    assert store.note_drift({"a": "is higher"}, frozenset()) == ([], [])  # b is neither an alarm nor quiet
    assert {alarm.chart: alarm.detail for alarm in store.drift_alarms()} == {"a": "is high", "b": "is low"}
    assert store.note_drift({"a": "is higher"}, frozenset({"b", "c"})) == ([], ["b"])
    assert [alarm.chart for alarm in store.drift_alarms()] == ["a"]
    assert store.note_drift({"b": "again"}, frozenset({"a"})) == (["b"], ["a"])
    assert [alarm.chart for alarm in store.drift_alarms(standing=False)] == ["b", "b", "a"]
    store.close()


def test_the_scheduler_reports_drift_and_alarms_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store = new_sqlite(state)
    # the store's own rows, at once: what a node would have gathered in four months
    rows = [
        {"job": number + 1, "at": (NOW - timedelta(days=100) + timedelta(hours=4.3 * number)).replace(tzinfo=None),
         "hu": 120 + 40 * ((number * 37) % 101 - 50) / 30 + (30 if number > 450 else 0)}
        for number in range(550)
    ]  # fmt: skip
    with store._writing() as connection:
        for row in rows:
            connection.execute(
                text(
                    "INSERT INTO studies (study_instance_uid, source_ae, first_received_at, last_received_at) "
                    "VALUES (:uid, 'CT', :at, :at)"
                ),
                {"uid": f"1.2.{row['job']}", "at": row["at"]},
            )
            connection.execute(
                text(
                    "INSERT INTO jobs (job_id, kind, study_instance_uid, state, priority, revision, attempts, "
                    "fencing_token, created_at, changed_at) "
                    "VALUES (:job, 'screen', :uid, 'EXCLUDED', 100, 1, 1, 1, :at, :at)"
                ),
                {"job": row["job"], "uid": f"1.2.{row['job']}", "at": row["at"]},
            )
            observed = {"category": None, "levels_hu": {"L1": row["hu"]}, "flags": [], "network": None}
            connection.execute(
                text(
                    "INSERT INTO observations (job_id, at, manufacturer, model, kernel, outcome, observed) "
                    "VALUES (:job, :at, 'SIEMENS', 'FORCE', 'soft', 'reported', :observed)"
                ),
                {
                    "job": row["job"],
                    "at": row["at"],
                    "observed": json.dumps({**observed, "network_class": None, "expert": None}),
                },
            )
    config = tmp_path / "osteo.toml"
    config.write_text(
        f'state_dir = "{state}"\n[completeness]\nsweep_seconds = 5\n[retention]\nimages_days = 0\n'
        '[drift]\ncron = "* * * * *"\ncurrent_days = 18.0\n'
    )

    def runs() -> int:
        return next((run.runs for run in store.scheduler_runs() if run.step == "drift_report"), 0)

    role = RoleProcess(["run", "scheduler", "--config", str(config)], tmp_path / "scheduler.log").start()
    try:
        until(lambda: runs() >= 1, 240, every=0.5)
    finally:
        assert role.stop() == 0
    log = role.log.read_text()
    assert log.count("drift_alarm") == len(store.drift_alarms())
    assert "SIEMENS FORCE soft | mean | hu:L1" in {alarm.chart for alarm in store.drift_alarms()}
    (run,) = [run for run in store.scheduler_runs() if run.step == "drift_report"]
    assert (run.outcome, run.interval_seconds) == ("done", 60)
    assert run.detail is not None
    assert "new alarms, 0 over" in run.detail
    assert run.next_at is not None

    again = CliRunner().invoke(cli, ["drift", "run", "--json", "--config", str(config)])
    document = json.loads(again.stdout)
    assert document["raised"] == []
    assert document["alarms"]
    shown = CliRunner().invoke(cli, ["drift", "show", "--config", str(config)]).output
    assert "stands since" in shown
    assert "ALARM all: hu:L1" in shown
    latest = json.loads(CliRunner().invoke(cli, ["drift", "show", "--json", "--config", str(config)]).output)
    assert latest["report"]["alarms"] == document["alarms"]
    for path in (state / "drift").iterdir():
        content = path.read_text()
        assert "1.2." not in content  # no study is named
    assert len(list((state / "drift").glob("*.html"))) >= 2
    store.close()


def test_before_the_first_report_nothing_is_shown(tmp_path: Path) -> None:
    state = tmp_path / "state"
    new_sqlite(state).close()
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(state, 0))
    assert "no report yet" in CliRunner().invoke(cli, ["drift", "show", "--config", str(config)]).output
    made = CliRunner().invoke(cli, ["drift", "run", "--config", str(config)])
    assert "not enough data" in made.output
    config.write_text(settings_text(state, 0) + "[drift]\nreference_from = 2999-01-01\n")
    refused = CliRunner().invoke(cli, ["drift", "run", "--config", str(config)])
    assert "lies in the future" in str(refused.exception)
