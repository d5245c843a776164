"""`osteo deliveries` on a real store: lists, one delivery, dead letters taken up again or settled."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from osteo_daemon.cli import cli
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import Damaged
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.store import JobStore

NOW = datetime.now(UTC)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings of a node with one destination."""
    path = tmp_path / "osteo.toml"
    path.write_text(
        f'state_dir = "{tmp_path / "state"}"\n'
        '[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
    )
    return path


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """Three studies, reported to one destination: refused, unproven, delivered; a fourth to one that has gone."""
    store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
    for number, destination in enumerate(["pacs", "pacs", "pacs", "gone"], start=1):
        study = f"1.2.{number}"
        image = SopInstance(study, f"{study}.1", "1.2.840.10008.5.1.4.1.1.2", f"{study}.1.1", "1.2", tmp_path, 1, "0")
        store.record_instance(image, "CT1")
        store.mark_complete(study, who="test", reason="all sent")
        job = store.claim("test", 60, 3)
        assert job is not None
        sr = ReportObject(ReportKind.SR, "1.2.840.10008.5.1.4.1.1.88.34", f"{study}.9", tmp_path / "sr", 1, "1" * 64)
        store.commit_report(job, {}, [sr], [NewDelivery(destination, (sr.sop_instance_uid,))])
    for outcome in ("refused", "unproven", "stored"):
        claimed = store.claim_delivery("test", 60, destination="pacs")
        assert claimed is not None
        if outcome == "refused":
            store.delivery_refused(claimed, "sr not stored: PACS: status 0x0122")
            continue
        store.delivery_object_sent(claimed, claimed.objects[0].report.sop_instance_uid, "0x0000")
        if outcome == "unproven":
            store.delivery_unproven(claimed, "no proof to be had")
        else:
            store.delivery_done(claimed, "stored")
    return store


def osteo(config: Path, *arguments: str) -> Result:
    """Run a sub-command."""
    return CliRunner().invoke(cli, ["deliveries", *arguments, "--config", str(config)])


def listed(config: Path, *arguments: str) -> list[str]:
    """Studies of a JSON list."""
    result = osteo(config, "list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [row["study_instance_uid"] for row in json.loads(result.stdout)]


def test_lists_are_filtered_and_paged(config: Path, store: JobStore) -> None:
    assert listed(config) == ["1.2.4", "1.2.3", "1.2.2", "1.2.1"]
    assert listed(config, "--dead") == ["1.2.1"]
    assert listed(config, "--unproven") == ["1.2.2"]
    assert listed(config, "--dead", "--unproven") == ["1.2.2", "1.2.1"]
    assert listed(config, "--state", "delivered") == ["1.2.3"]
    assert listed(config, "--destination", "gone") == ["1.2.4"]
    assert listed(config, "--study", "1.2.2") == ["1.2.2"]
    page = osteo(config, "list", "--limit", "3")
    assert "0x0122" not in page.stdout
    assert listed(config, "--limit", "3", "--before", page.stderr.split()[-1]) == ["1.2.1"]
    assert "status 0x0122" in osteo(config, "list", "--dead").stdout
    assert osteo(config, "list", "--destination", "none").stdout == "no deliveries\n"


def test_show_tells_answer_and_proof_of_each_object(config: Path, store: JobStore) -> None:
    delivery = store.deliveries(study_instance_uid="1.2.2")[0]
    shown = json.loads(osteo(config, "show", str(delivery.delivery_id), "--json").stdout)
    assert (shown["state"], shown["objects"][0]["status"], shown["objects"][0]["proof"]) == ("UNPROVEN", "0x0000", None)
    assert shown["commitments"] == []
    assert isinstance(osteo(config, "show", "99").exception, Damaged)


def test_dead_letters_are_taken_up_again(config: Path, store: JobStore) -> None:
    result = osteo(config, "resend", "--dead", "--destination", "pacs")
    assert result.exit_code == 0, result.output
    assert listed(config, "--dead") == []
    delivery = store.deliveries(study_instance_uid="1.2.1")[0]
    assert (delivery.state, delivery.attempts, delivery.outcome) == (DeliveryState.PENDING, 0, None)
    assert store.events("1.2.1")[-1].event == "delivery_resend"
    assert osteo(config, "resend", "--dead").stdout == "nothing to resend\n"
    unproven = store.deliveries(study_instance_uid="1.2.2")[0]
    assert osteo(config, "resend", str(unproven.delivery_id)).exit_code == 0
    assert len(store.delivery(unproven.delivery_id).unsent) == 1


@pytest.mark.parametrize("arguments", [[], ["1", "--dead"], ["1", "--destination", "pacs"]])
def test_resend_is_told_what(config: Path, store: JobStore, arguments: list[str]) -> None:
    assert osteo(config, "resend", *arguments).exit_code == 2


def test_what_was_delivered_or_waits_is_left_alone(config: Path, store: JobStore) -> None:
    for study in ("1.2.3", "1.2.4"):
        delivery = store.deliveries(study_instance_uid=study)[0]
        for command in (["resend"], ["accept", "--reason", "why"]):
            result = osteo(config, command[0], str(delivery.delivery_id), *command[1:])
            assert isinstance(result.exception, Damaged)
            assert delivery.state.value in str(result.exception)
        assert store.delivery(delivery.delivery_id).state is delivery.state


def test_a_person_settles_a_dead_letter(config: Path, store: JobStore) -> None:
    delivery = store.deliveries(study_instance_uid="1.2.1")[0]
    assert osteo(config, "accept", str(delivery.delivery_id), "--reason", " ").exit_code == 2
    assert osteo(config, "accept", str(delivery.delivery_id), "--reason", "printed and filed").exit_code == 0
    job = store.job("1.2.1")
    assert job is not None
    assert job.state is JobState.DELIVERED
    assert store.delivery(delivery.delivery_id).outcome == "accepted by hand, refused"
    assert "printed and filed" in [event.reason.partition(": ")[2] for event in store.events("1.2.1")]


def test_destinations_tell_who_answers_and_what_nobody_sends(config: Path, store: JobStore) -> None:
    probe = NOW + timedelta(seconds=90)
    store.save_breaker("pacs", Breaker(BreakerState.OPEN, NOW, 5, probe, "PeerUnavailable: PACS gave no answer"))
    pacs, gone = json.loads(osteo(config, "destinations", "--json").stdout)
    assert (pacs["breaker"], pacs["failures"], pacs["configured"]) == ("OPEN", 5, True)
    assert pacs["next_probe_at"] == probe.isoformat(timespec="seconds")
    assert pacs["deliveries"] == {"REFUSED": 1, "UNPROVEN": 1, "DELIVERED": 1}
    assert (gone["breaker"], gone["configured"], gone["deliveries"]) == ("CLOSED", False, {"PENDING": 1})
    text = osteo(config, "destinations").stdout
    assert "PeerUnavailable: PACS gave no answer" in text
    assert "nobody sends these" in text
