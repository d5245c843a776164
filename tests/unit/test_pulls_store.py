"""The list of a pull in the job store: what it forgets (nothing), and who may have it in hand; on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.pull_rows import PulledState, PullState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.roles import roles_of
from osteo_daemon.settings import Settings
from tests.postgres import Cluster
from tests.stores import new_sqlite

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """An empty store of either kind."""
    if request.param == "sqlite":
        store = new_sqlite(tmp_path)
        yield store
        store.close()
        return
    server: Cluster = request.getfixturevalue("postgres")
    store = JobStore(url := server.new())
    yield store
    store.close()
    server.drop(url)


def test_the_list_of_a_pull(store: JobStore) -> None:
    pull_id = store.create_pull("pacs", {"from": None})
    assert store.pull_found(pull_id, ["1.1", "1.2", "1.1"]) == 2
    assert store.pull_found(pull_id, ["1.2", "1.3"]) == 1  # found again after a kill: those noted stay
    assert [study.study_instance_uid for study in store.pulled_studies(pull_id)] == ["1.1", "1.2", "1.3"]
    store.change_pull(pull_id, PullState.FETCHING)

    first = store.next_wanted(pull_id, now=NOW)
    assert first is not None
    assert first.study_instance_uid == "1.1"
    assert store.pull_attempted(pull_id, "1.1", now=NOW) == 1
    later = NOW + timedelta(minutes=1)
    store.pull_settled(pull_id, "1.1", PulledState.WANTED, instances=2, detail="1 of 3", not_before=later, now=NOW)
    second = store.next_wanted(pull_id, now=NOW)
    assert second is not None
    assert second.study_instance_uid == "1.2"  # the one that waits holds up nobody
    store.pull_attempted(pull_id, "1.2", now=NOW)
    store.pull_settled(pull_id, "1.2", PulledState.FETCHED, instances=5, now=NOW)
    store.pull_attempted(pull_id, "1.3", now=NOW)
    store.pull_settled(pull_id, "1.3", PulledState.WANTED, uncharged=True, now=NOW)
    third = store.next_wanted(pull_id, now=NOW)
    assert third is not None
    assert (third.study_instance_uid, third.attempts) == ("1.3", 0)
    store.pull_settled(pull_id, "1.3", PulledState.FAILED, detail="refused", now=NOW)
    assert store.next_wanted(pull_id, now=NOW) is None
    assert store.next_wanted_at(pull_id) == later
    # a clock that was set back holds nothing up for long
    assert store.next_wanted(pull_id, now=NOW - timedelta(days=1)) is not None
    again = store.next_wanted(pull_id, now=later)
    assert again is not None
    assert (again.attempts, again.instances, again.detail) == (1, 2, "1 of 3")
    assert {state.value: count for state, count in store.pull_counts(pull_id).items() if count} == {
        "WANTED": 1,
        "FETCHED": 1,
        "FAILED": 1,
    }


def test_ended_pulls_are_opened_again_by_hand_only(store: JobStore) -> None:
    pull_id = store.create_pull("pacs", {})
    store.pull_found(pull_id, ["1.1"])
    store.change_pull(pull_id, PullState.FETCHING)
    store.pull_attempted(pull_id, "1.1")
    store.pull_settled(pull_id, "1.1", PulledState.FAILED, detail="x")
    store.change_pull(pull_id, PullState.DONE)
    with pytest.raises(IllegalTransition):
        store.change_pull(pull_id, PullState.CANCELLED)
    store.reopen_pull(pull_id, failed_too=True)
    assert store.pull(pull_id).state is PullState.FETCHING
    wanted = store.next_wanted(pull_id)
    assert wanted is not None
    assert wanted.attempts == 0
    store.change_pull(pull_id, PullState.CANCELLED)
    store.reopen_pull(pull_id, failed_too=False)
    assert store.pull(pull_id).state is PullState.SEARCHING  # it may have been cancelled in the middle of its search
    assert [entry.pull_id for entry in store.pulls()] == [pull_id]
    for act in (store.pull, lambda number: store.reopen_pull(number, failed_too=False)):
        with pytest.raises(KeyError):
            act(pull_id + 1)


def test_the_newest_pull_of_a_name(store: JobStore) -> None:
    assert store.latest_pull("nightly") is None
    by_hand = store.create_pull("pacs", Criteria().document())
    store.create_pull("pacs", {})  # as pulls were written down before they had names
    assert store.latest_pull("nightly") is None
    first, other, second = (
        store.create_pull("pacs", Criteria(name=name).document()) for name in ("nightly", "night%", "nightly")
    )
    assert by_hand < first < other < second
    for name, expected in (("nightly", second), ("night%", other), ("night", None), ("NIGHTLY", None)):
        found = store.latest_pull(name)
        assert (None if found is None else found.pull_id) == expected
    store.change_pull(second, PullState.DONE)
    latest = store.latest_pull("nightly")
    assert latest is not None
    assert (latest.state, Criteria.of(latest.criteria).name) == (PullState.DONE, "nightly")


def test_what_is_here_of_a_study(store: JobStore, tmp_path: Path) -> None:
    nothing = store.study_here("1.1")
    assert (nothing.stored, nothing.own, nothing.quarantined, nothing.removed) == ({}, set(), set(), False)
    for number, series in ((1, "2.1"), (2, "2.1"), (3, "2.2")):
        instance = SopInstance(
            study_instance_uid="1.1",
            series_instance_uid=series,
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            sop_instance_uid=f"3.{number}",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path=tmp_path / str(number),
            size_bytes=1,
            sha256=str(number) * 64,
        )
        store.record_instance(instance, "CT1")
    here = store.study_here("1.1")
    assert here.stored == {"3.1": "2.1", "3.2": "2.1", "3.3": "2.2"}
    assert (here.count("2.1"), here.count("2.2"), here.count("2.9")) == (2, 1, 0)


def test_the_web_role_runs_only_where_it_has_a_port() -> None:
    assert "dicomweb" not in roles_of(Settings())
    web = {"port": 8443, "token_file": "token"}
    assert roles_of(Settings.model_validate({"dicomweb": web}))[:2] == ["receiver", "dicomweb"]
