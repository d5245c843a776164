"""`osteo studies`: filters, pages, what a person may do, and what is said when it isn't possible."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import BundleError, ConfigurationError, Damaged, IllegalTransition
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from tests.stores import new_sqlite

START = datetime(2026, 1, 1, tzinfo=UTC)
Run = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """Five studies, a day apart: excluded ones of CT1, received ones of CT0."""
    store, spool = new_sqlite(tmp_path / "state"), Spool(tmp_path / "state" / "spool")
    for number in range(1, 6):
        study, when = f"1.{number}", START + timedelta(days=number)
        stored = spool.store_instance(study, f"{study}.1", f"{study}.1.1", [b"pixels"])
        instance = SopInstance(
            study, f"{study}.1", "1.2", f"{study}.1.1", "1.2", stored.path, stored.size_bytes, stored.sha256
        )
        store.record_instance(instance, f"CT{number % 2}", now=when)
        if number % 2:
            store.mark_complete(study, who="test", reason="test", now=when)
            job = store.claim("w", 60, now=when)
            assert job is not None
            store.exclude(job, "no_ct_series", "none", {"schema": "osteo-result/1"}, now=when)
    yield store
    store.close()


@pytest.fixture
def run(tmp_path: Path, store: JobStore) -> Run:
    config = tmp_path / "osteo.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')

    def invoke(*arguments: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(cli, ["studies", *arguments, "--config", str(config)], input=answer)

    return invoke


def listed(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [row["study_instance_uid"] for row in json.loads(result.stdout)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["1.5", "1.4", "1.3", "1.2", "1.1"]),
        (["--state", "excluded"], ["1.5", "1.3", "1.1"]),
        (["--source", "CT0"], ["1.4", "1.2"]),
        (["--code", "no_ct_series", "--until", "2026-01-04"], ["1.1"]),
        (["--since", "2026-01-04"], ["1.5", "1.4", "1.3"]),
        (["--since", "2026-01-03", "--until", "2026-01-05T00:00:00"], ["1.3", "1.2"]),
        (["--state", "HELD"], []),
        (["--limit", "2"], ["1.5", "1.4"]),
        (["--limit", "2", "--before", "4"], ["1.3", "1.2"]),
        (["--state", "EXCLUDED", "--limit", "2", "--before", "3"], ["1.1"]),
        (["--before", "999"], []),
    ],
)
def test_filters_and_pages(run: Run, options: list[str], expected: list[str]) -> None:
    assert listed(run("list", "--json", *options)) == expected


def test_the_list_for_people_says_how_to_go_on(run: Run) -> None:
    shown = run("list", "--limit", "2")
    assert "EXCLUDED   r1     1 images  2026-01-06T00:00:00+00:00  1.5  no_ct_series: none" in shown.stdout
    assert "more: --before 4" in shown.stderr
    assert "no studies" in run("list", "--state", "FAILED").output
    assert "is not one of" in run("list", "--state", "NOWHERE").output
    assert run("list", "--limit", "0").exit_code == 2


def test_hold_release_retry_prioritise(run: Run, store: JobStore) -> None:
    def state() -> JobState:
        job = store.job("1.2")
        assert job is not None
        return job.state

    assert run("hold", "1.2", "--reason", "wrong patient").exit_code == 0
    assert state() is JobState.HELD
    assert run("release", "1.2", "--reason", "was right").exit_code == 0
    assert state() is JobState.RECEIVING
    again = run("release", "1.2", "--reason", "x")
    assert isinstance(again.exception, IllegalTransition)
    assert "release is not possible for 1.2 now" in str(again.exception)
    assert "osteo studies show 1.2" in str(again.exception)
    run("hold", "1.2", "--reason", "again")
    assert run("retry", "1.2", "--reason", "now").exit_code == 0
    assert state() is JobState.READY
    assert run("prioritise", "1.2", "--priority", "STAT", "--reason", "in theatre").exit_code == 0
    job = store.job("1.2")
    assert job is not None
    assert job.priority is Priority.STAT
    text = run("show", "1.2").stdout
    assert "state           READY" in text
    assert "operator  study_prioritised: routine to stat: in theatre" in text
    document = json.loads(run("show", "1.2", "--json").stdout)
    assert (document["state"], document["priority"]) == ("READY", "stat")
    assert document["events"][-1]["reason"] == "routine to stat: in theatre"
    assert {event["who"] for event in document["events"]} == {"CT0", "operator"}


def test_acts_told_to_programs(run: Run) -> None:
    done = run("hold", "1.2", "--reason", "x", "--json")
    told = [{"study_instance_uid": "1.2", "done": "hold", "refused": None}]
    assert (done.exit_code, json.loads(done.stdout)) == (0, told)
    ended = run("hold", "1.4", "9.9", "--reason", "x", "--json")
    assert ended.exit_code == 1  # here the error itself; what was done before it is told all the same
    assert [row["study_instance_uid"] for row in json.loads(ended.stdout)] == ["1.4"]
    many = run("release", "--state", "held", "--reason", "x", "--json", answer="y\n")
    assert [row["done"] for row in json.loads(many.stdout)] == ["release"] * 2
    assert "2 of 2 studies" in many.stderr
    passed_by = run("release", "--source", "CT0", "--reason", "x", "--json", "--yes")
    assert {row["done"] for row in json.loads(passed_by.stdout)} == {None}


def test_every_act_wants_a_reason_and_a_study(run: Run) -> None:
    for command in ("hold", "release", "retry", "reprocess", "purge"):
        assert run(command, "1.2").exit_code == 2
        assert "say why" in run(command, "1.2", "--reason", "  ").output
        unknown = run(command, "9.9", "--reason", "x")
        assert isinstance(unknown.exception, Damaged)
        assert "no study 9.9" in str(unknown.exception)


def test_reprocess_with_another_bundle(run: Run, store: JobStore) -> None:
    wrong = run("reprocess", "1.1", "--reason", "x", "--network", "no-such-bundle")
    assert isinstance(wrong.exception, BundleError | ConfigurationError)
    assert run("reprocess", "1.1", "--reason", "better", "--localizer", "spine-localizer").exit_code == 0
    job = store.claim("w", 60)
    assert job is not None
    assert (job.study_instance_uid, job.revision) == ("1.1", 2)
    assert (job.localizer_bundle, job.network_bundle) == ("spine-localizer", None)
    store.exclude(job, "no_ct_series", "none", {})
    # the wish was for that revision: a late slice is screened as the settings say
    store.record_instance(SopInstance("1.1", "1.1.1", "1.2", "1.1.1.9", "1.2", Path("/x"), 1, "1" * 64), "CT1")
    late = store.job("1.1")
    assert late is not None
    assert (late.revision, late.localizer_bundle) == (3, None)


def test_purge_asks_refuses_and_leaves_its_trace(run: Run, store: JobStore, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "state" / "spool")
    asked = run("purge", "1.1", "--reason", "room", answer="n\n")
    assert asked.exit_code == 1
    assert "1 images of a study in state EXCLUDED" in asked.output
    assert len(spool.received_files("1.1")) == 1
    assert run("purge", "1.1", "--reason", "room", answer="y\n").exit_code == 0
    assert spool.received_files("1.1") == []
    assert json.loads(run("show", "1.1", "--json").stdout)["events"][-1]["event"] == "study_purged"

    refused = run("purge", "1.2", "--reason", "room", "--yes")
    assert isinstance(refused.exception, IllegalTransition)
    assert len(spool.received_files("1.2")) == 1
    assert run("purge", "1.2", "--reason", "room", "--yes", "--force").exit_code == 0
    assert spool.received_files("1.2") == []
    held = json.loads(run("show", "1.2", "--json").stdout)
    assert (held["state"], held["code"]) == ("HELD", "purged_by_hand")
    gone = run("reprocess", "1.2", "--reason", "x")
    assert "images were removed" in str(gone.exception)


def test_many_at_once_by_what_they_have_in_common(run: Run, store: JobStore) -> None:
    for arguments in ([], ["1.1", "--state", "EXCLUDED"]):
        result = run("retry", *arguments, "--reason", "x")
        assert result.exit_code == 2
        assert "name studies, or tell by --state" in result.output

    def states() -> list[str]:
        return [job.state.value for job in store.recent()][::-1]  # of 1.1 to 1.5

    asked = run("retry", "--code", "no_ct_series", "--until", "2026-01-05", "--reason", "now", answer="n\n")
    assert asked.exit_code == 1
    assert "retry: 2 studies?" in asked.output
    assert states() == ["EXCLUDED", "RECEIVING", "EXCLUDED", "RECEIVING", "EXCLUDED"]
    done = run("retry", "--code", "no_ct_series", "--until", "2026-01-05", "--reason", "now", answer="y\n")
    assert done.exit_code == 0
    assert done.stdout.endswith("retry: 1.1\nretry: 1.3\n")  # the oldest first
    assert states() == ["READY", "RECEIVING", "READY", "RECEIVING", "EXCLUDED"]

    # of many, those that cannot be acted on are told and passed by; of those that are named, the first ends it
    held = run("hold", "--since", "2026-01-01", "--reason", "wrong scanner", "--yes")
    assert held.exit_code == 0
    assert "hold is not possible for 1.5 now" in held.stderr
    assert held.stderr.endswith("hold: 4 of 5 studies\n")
    assert states() == ["HELD"] * 4 + ["EXCLUDED"]
    assert run("hold", "--state", "DELIVERED", "--reason", "x").stderr == "hold: 0 of 0 studies\n"
    named = run("release", "1.1", "1.5", "1.3", "--reason", "was right")
    assert isinstance(named.exception, IllegalTransition)
    assert states() == ["RECEIVING", "HELD", "HELD", "HELD", "EXCLUDED"]
    assert run("retry", "1.2", "1.3", "--reason", "both").exit_code == 0
    assert states() == ["RECEIVING", "READY", "READY", "HELD", "EXCLUDED"]
    assert store.events("1.3")[-1].reason == "both"


def test_many_reprocessed_stand_behind_all_that_is_new(run: Run, store: JobStore) -> None:
    assert run("reprocess", "--state", "EXCLUDED", "--reason", "rules", "--yes").exit_code == 0
    waiting = {job.study_instance_uid: (job.revision, job.priority) for job in store.recent(state=JobState.READY)}
    assert waiting == dict.fromkeys(("1.1", "1.3", "1.5"), (2, Priority.BACKFILL))
    store.mark_complete("1.4", who="test", reason="test")
    following = store.claim("w", 60)
    assert following is not None
    assert following.study_instance_uid == "1.4"


def test_a_page_ends_no_filter(run: Run, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osteo_daemon.commands.study_choice.MOST_ROWS", 2)
    done = run("prioritise", "--since", "2026-01-01", "--priority", "stat", "--reason", "x", "--yes")
    assert done.stdout.splitlines() == ["prioritise: 1.2", "prioritise: 1.4"]  # the others are finished
    assert done.stderr.endswith("prioritise: 2 of 5 studies\n")
