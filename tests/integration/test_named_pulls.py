"""Pulls that begin by themselves: the scheduler writes them down once, the puller does them, Orthanc is the archive."""

from __future__ import annotations

import signal
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from osteo_daemon import timetable
from osteo_daemon.domain.archive import Span
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.pull_rows import PulledState, PullState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.pull.schedule import enqueue
from osteo_daemon.pull_runner import PullRunner
from osteo_daemon.roles import roles_of
from osteo_daemon.scheduler import Scheduler
from osteo_daemon.settings import NamedPullSettings, load_settings
from tests.fakes import CALLED, LOOPBACK, RoleProcess, a_free_port, settings_text, until
from tests.foreign import send_to, write_study
from tests.orthanc import AE_TITLE, running_orthanc
from tests.slow_archive import running_slow_archive
from tests.stores import new_sqlite

TODAY = date(2026, 3, 10)


def entry(**changes: Any) -> NamedPullSettings:
    return NamedPullSettings(**{"name": "nightly", "archive": "pacs", "every_hours": 1.0, **changes})


def span_of(store: JobStore) -> Span | None:
    latest = store.latest_pull("nightly")
    assert latest is not None
    return Criteria.of(latest.criteria).span


def test_a_pull_is_written_down_once_and_leaves_no_day_out(tmp_path: Path) -> None:
    store = new_sqlite(tmp_path)
    other = store.create_pull("pacs", Criteria().document())  # a person's
    assert store.latest_pull("nightly") is None
    asked = entry(modalities=("ct",), body_parts=("abdomen",), description="*ABD*", limit=5)
    assert enqueue(asked, store, TODAY) == f"pull {other + 1} from pacs"
    latest = store.latest_pull("nightly")
    assert latest is not None
    criteria = Criteria.of(latest.criteria)
    assert (criteria.wanted.modalities, criteria.wanted.body_parts) == (("CT",), ("ABDOMEN",))
    assert (criteria.wanted.description, criteria.limit, criteria.listed) == ("*ABD*", 5, 0)
    assert criteria.span == Span(date(2026, 3, 8), TODAY)
    # one that is at work is not begun twice, however often its time comes
    assert enqueue(asked, store, TODAY) == enqueue(asked, store, TODAY + timedelta(days=1))
    assert len(store.pulls()) == 2
    # a node that was down for nine days asks for all of them
    store.change_pull(latest.pull_id, PullState.DONE)
    enqueue(asked, store, TODAY + timedelta(days=9))
    assert span_of(store) == Span(TODAY, TODAY + timedelta(days=9))
    # the next one, in time, for its days only; another name has a history of its own
    store.change_pull(latest.pull_id + 1, PullState.CANCELLED)
    enqueue(asked, store, TODAY + timedelta(days=10))
    assert span_of(store) == Span(TODAY + timedelta(days=8), TODAY + timedelta(days=10))
    enqueue(entry(name="weekly"), store, TODAY)
    assert span_of(store) == Span(TODAY + timedelta(days=8), TODAY + timedelta(days=10))
    store.close()


ARCHIVE = f"""
[[archives]]
name = "pacs"
retrieve = "c-get"
ae_title = "{AE_TITLE}"
host = "{LOOPBACK}"
port = 104
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[pulls]]\nname = "a"\narchive = "pacs"\n', "either cron or every_hours"),
        (
            '[[pulls]]\nname = "a"\narchive = "pacs"\nevery_hours = 1\ncron = "0 1 * * *"\n',
            "either cron or every_hours",
        ),
        ('[[pulls]]\nname = "a"\narchive = "elsewhere"\nevery_hours = 1\n', "no archive elsewhere among"),
        ('[[pulls]]\nname = "a"\narchive = "pacs"\ncron = "daily"\n', "minute hour day month weekday"),
        ('[[pulls]]\nname = "a"\narchive = "pacs"\nevery_hours = 1\nbetween = "at night"\n', "pulls.0.between"),
        (2 * '[[pulls]]\nname = "a"\narchive = "pacs"\nevery_hours = 1\n', "two pulls share one name"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "osteo.toml").write_text(ARCHIVE + text)
    with pytest.raises(ConfigurationError, match=message):
        load_settings(tmp_path / "osteo.toml", {})


def test_a_node_without_pulls_runs_no_puller(tmp_path: Path) -> None:
    (tmp_path / "osteo.toml").write_text(ARCHIVE)
    assert "puller" not in roles_of(load_settings(tmp_path / "osteo.toml", {}))
    role = RoleProcess(["run", "puller", "--config", str(tmp_path / "osteo.toml")], tmp_path / "puller.log").start()
    assert role.process is not None
    assert role.process.wait(60) == 2
    assert "there is no [[pulls]] entry" in role.log.read_text()


def test_cron_begins_a_pull_that_keeps_its_hours_and_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetable, "MAKE_UP_SECONDS", 0.1)
    now = datetime.now().astimezone()
    yearly = 'archive = "slow"\ncron = "0 0 1 1 *"\n'
    with running_slow_archive(tmp_path / "archive") as archive:

        def written(**pace: str) -> Path:
            entries = [f'[[pulls]]\nname = "{name}"\n{yearly}{text}\n' for name, text in pace.items()]
            config = tmp_path / "osteo.toml"
            config.write_text(settings_text(tmp_path / "state", 1, extra=archive.text() + "".join(entries)))
            return config

        closed = f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"
        config = written(night=f'between = "{closed}"', gentle="studies_per_hour = 1", unborn="")
        settings = load_settings(config, {})
        store = JobStore(settings.database_url)
        # two steps ran in the year before last, so that they are due; of the third nobody knows
        for name in ("night", "gentle"):
            values = {"interval_seconds": 1.0, "started_at": datetime.now(UTC) - timedelta(days=370)}
            store.note_run(f"pull {name}", values=values, more={"runs": 1})
        scheduler = Scheduler(settings)
        scheduler.start()
        role = RoleProcess(["run", "puller", "--config", str(config)], tmp_path / "puller.log").start()
        try:
            role.wait_for(f"outside {closed}")
            role.wait_for("1 studies an hour")
            night, gentle = store.latest_pull("night"), store.latest_pull("gentle")
            assert night is not None
            assert gentle is not None
            assert store.latest_pull("unborn") is None
            assert [entry.attempts for entry in store.pulled_studies(night.pull_id)] == [0, 0, 0]
            counts = store.pull_counts(gentle.pull_id)
            assert (counts[PulledState.FETCHED], counts[PulledState.WANTED]) == (1, 2)
            assert archive.asked == [("SERIES", 0)]
            until(lambda: len([run for run in store.scheduler_runs() if run.runs == 2]) == 2)
            runs = {run.step: run for run in store.scheduler_runs()}
            for name, pull in (("night", night), ("gentle", gentle)):
                run = runs[f"pull {name}"]
                assert (run.outcome, run.detail) == ("done", f"pull {pull.pull_id} from slow")
                assert run.next_at is not None
                assert (run.next_at.month, run.next_at.day, run.next_at.hour) == (1, 1, 0)
        finally:
            scheduler.stop()
            assert role.stop() == 0
        assert {store.pull(pull.pull_id).state for pull in (night, gentle)} == {PullState.FETCHING}
        # its hour has come, and nobody asks for patience any more
        begun = f"{now - timedelta(hours=1):%H:%M}-{now + timedelta(hours=2):%H:%M}"
        runner = PullRunner(load_settings(written(night=f'between = "{begun}"', gentle=""), {}))
        runner.start()
        until(lambda: all(store.pull(pull.pull_id).state is PullState.DONE for pull in (night, gentle)))
        runner.stop()
        assert {uid for study in archive.studies for uid in store.study_here(study).stored} == archive.images
        assert not store.pull_counts(night.pull_id)[PulledState.FAILED]
        store.close()


def test_orthanc_is_pulled_by_itself_and_a_killed_puller_goes_on(tmp_path: Path) -> None:
    today = date.today().strftime("%Y%m%d")  # noqa: DTZ011 - study dates are those of this place
    studies = [write_study(tmp_path / f"s{seed}", seed=seed, StudyDate=today) for seed in (1, 2)]
    us = {"osteo": {"AET": CALLED, "Host": LOOPBACK, "Port": 104, "AllowGet": True}}
    with running_orthanc(tmp_path / "orthanc", port := a_free_port(), a_free_port(), us) as orthanc:
        for study in studies:
            send_to(AE_TITLE, orthanc.dicom_port, study.files)
        # one study an hour: the second waits, until a new process begins to count anew
        pulls = (
            '[[pulls]]\nname = "nightly"\narchive = "pacs"\nevery_hours = 0.0003\nstudies_per_hour = 1\n'
            '[[pulls]]\nname = "yearly"\narchive = "pacs"\ncron = "0 0 1 1 *"\n'
        )
        config = tmp_path / "osteo.toml"
        archive = ARCHIVE.replace("port = 104", f"port = {port}")
        config.write_text(settings_text(tmp_path / "state", 1, extra=archive + pulls))
        settings = load_settings(config, {})
        assert "puller" in roles_of(settings)
        scheduler = Scheduler(settings)
        scheduler.start()
        role = RoleProcess(["run", "puller", "--config", str(config)], tmp_path / "puller.log").start()
        store = JobStore(settings.database_url)
        try:
            first = until(lambda: store.latest_pull("nightly"))
            until(lambda: store.pull_counts(first.pull_id)[PulledState.FETCHED] == 1)
            assert role.process is not None
            role.process.send_signal(signal.SIGKILL)
            role.process.wait()
            assert store.pull(first.pull_id).state is PullState.FETCHING
            role.start()
            until(lambda: store.pull(first.pull_id).state is PullState.DONE)
            assert {len(store.study_here(study.uid).stored) for study in studies} == {len(studies[0].files)}
            # the next one finds everything here
            second = until(lambda: (found := store.latest_pull("nightly")).pull_id > first.pull_id and found)
            until(lambda: store.pull(second.pull_id).state is PullState.DONE)
            assert store.pull_counts(second.pull_id)[PulledState.PRESENT] == 2
            runs = {run.step: run for run in store.scheduler_runs()}
            nightly, yearly = runs["pull nightly"], runs["pull yearly"]
            assert nightly.outcome == "done"
            assert nightly.started_at is not None
            assert nightly.next_at is not None
            assert (yearly.started_at, yearly.next_at is not None) == (None, True)
            assert store.latest_pull("yearly") is None
        finally:
            scheduler.stop()
            status = role.stop()
            store.close()
    assert status == 0
    log = role.log.read_text()
    assert log.count("pull_started") >= 3  # the first one twice
    assert "pull_interrupted" not in log
