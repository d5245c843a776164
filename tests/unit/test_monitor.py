"""What is counted, what is amiss, and who is told of it when."""

from __future__ import annotations

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from osteo_daemon.control import Mode
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import ConfigurationError, PeerUnavailable
from osteo_daemon.jobs.records import DeliveryState, SchedulerRun
from osteo_daemon.log import _LISTENERS, configure_logging, get_logger, listen
from osteo_daemon.monitor.exposition import exposition
from osteo_daemon.monitor.look import Look
from osteo_daemon.monitor.messages import Message
from osteo_daemon.monitor.notifier import Notifier
from osteo_daemon.monitor.problems import Problem, Severity, is_healthy, is_ready, problems_of
from osteo_daemon.settings import LogSettings, NotificationSettings, Settings
from osteo_daemon.tally import _REASONS, MAXIMUM_SERIES, MEASURES, OTHERS, Tally, read_sums
from osteo_daemon.vitals import Sign, Vitals, read_signs
from tests.conftest import ROOT

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
SETTINGS = Settings.model_validate(
    {"destinations": [{"name": "pacs", "ae_title": "PACS", "host": "localhost", "port": 104}]}
)


def _sign(role: str, *, slot: int = 1, state: str = "ready", silent: float = 1.0, sums: Any = None) -> Sign:
    return Sign(role, slot, state, silent, 60.0, sums)


def _look(**changes: Any) -> Look:
    wanted = {"receiver": 1, "screener": 2}
    values: dict[str, Any] = {
        "at": NOW,
        "store_answers": True,
        "free_bytes": 500 * 10**9,
        "size_bytes": 10**12,
        "mode": Mode.RUN,
        "screeners": [],
        "wanted": wanted,
        "signs": [_sign("receiver"), _sign("screener"), _sign("screener", slot=2)],
        "jobs": dict.fromkeys(JobState, 0),
    }
    return Look(**{**values, **changes})


def _samples(look: Look) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = exposition(look, SETTINGS).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def full_page() -> bytes:
    """Metrics of a node that has all of them."""
    tally = Tally()
    for name, measure in MEASURES.items():
        if measure.buckets:
            tally.observe(name, 1.0, *["all"] * len(measure.labels))
        else:
            tally.count(name, *["new"] * len(measure.labels))
    look = _look(
        signs=[_sign("receiver", sums=tally.to_json()), _sign("screener")],
        oldest={JobState.READY: NOW - timedelta(seconds=90)},
        deliveries={("pacs", DeliveryState.REFUSED): 2},
        breakers={"pacs": Breaker(BreakerState.OPEN, NOW)},
        runs=[SchedulerRun("backup", 86400.0, None, NOW, NOW, "done", None, 5, 1, 0)],
        screeners=[{"state": "idle", "gpu_memory": {"used": 5, "total": 10}}],
    )
    return exposition(look, SETTINGS)


def exported_names() -> set[str]:
    """Names of samples, as a query asks for them."""
    return {sample.name for family in text_string_to_metric_families(full_page().decode()) for sample in family.samples}


def test_what_a_stranger_sends_is_no_label() -> None:
    tally = Tally()
    for number in range(1000):
        for event in ("association_refused", "connection_refused", "object_refused"):
            reason = f"calling AE title STRANGER{number} from 10.0.0.{number}"
            line = {"event": event, "reason": reason, "ae_title": f"DOE{number}", "address": f"10.0.{number}.1"}
            tally.hear({**line, "level": "warning"})
    tally.hear({"event": "association_refused", "reason": "called AE title is not ours", "level": "warning"})
    tally.hear({"event": "object_refused", "reason": "anything at all", "status": "0xA700", "level": "warning"})
    repeated = {"event": "refusals_repeated", "kind": "connection_refused", "reason": "DOE^JOHN", "count": 7}
    tally.hear({**repeated, "level": "warning"})
    sums = {(name, labels): row[0] for name, labels, row in read_sums(tally.to_json())}
    assert sums == {
        ("osteo_refusals_total", ("association_refused", OTHERS)): 1000,
        ("osteo_refusals_total", ("connection_refused", OTHERS)): 1007,
        ("osteo_refusals_total", ("object_refused", OTHERS)): 1000,
        ("osteo_refusals_total", ("association_refused", "called AE title is not ours")): 1,
        ("osteo_refusals_total", ("object_refused", "0xA700")): 1,
        ("osteo_log_lines_total", ("warning",)): 3003,
    }


def test_reasons_are_those_of_the_code() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("dicom", "dicomweb", ".")
        for path in (ROOT / "osteo_daemon" / folder).glob("*.py")
        if path.name != "tally.py"
    )
    assert not [reason for reason in _REASONS if f'"{reason}"' not in code]


def test_series_are_bounded() -> None:
    tally = Tally()
    for number in range(3 * MAXIMUM_SERIES):
        tally.count("osteo_deliveries_ended_total", f"pacs{number}", "delivered")
    document = tally.to_json()
    assert len(document) == MAXIMUM_SERIES + 1
    assert sum(row[0] for _name, _labels, row in read_sums(document)) == 3 * MAXIMUM_SERIES
    with pytest.raises(KeyError):
        tally.count("osteo_patients_total")
    with pytest.raises(KeyError):
        tally.count("osteo_refusals_total", "one label of two")


def test_sums_go_on_in_the_next_process_and_are_added_over_processes(tmp_path: Path) -> None:
    before, after, other = Tally(), Tally(), Tally()
    before.hear({"event": "screening_ended", "outcome": "reported, low", "duration_s": 7.0, "level": "info"})
    after.take_up(json.loads(json.dumps(before.to_json())))
    after.hear({"event": "screening_ended", "outcome": "retry, worker_died", "duration_s": 2000.0, "level": "info"})
    other.observe("osteo_stage_seconds", 0.5, "all")
    broken = [["osteo_stage_seconds", ["all"], [1.0]], ["unknown_total", [], [1]], "x", ["osteo_jobs"]]
    signs = [
        _sign("screener", sums=after.to_json()),
        _sign("screener", slot=2, sums=[*other.to_json(), *broken]),
        _sign("receiver", sums="not a list"),
    ]
    samples = _samples(_look(signs=signs))
    all_of_it = (("stage", "all"),)
    assert samples["osteo_stage_seconds_count", all_of_it] == 3
    assert samples["osteo_stage_seconds_sum", all_of_it] == 2007.5
    for bound, count in (("0.5", 1), ("5.0", 1), ("10.0", 2), ("1800.0", 2), ("+Inf", 3)):
        assert samples["osteo_stage_seconds_bucket", (("le", bound), ("stage", "all"))] == count
    assert samples["osteo_screenings_total", (("outcome", "reported"),)] == 1
    assert samples["osteo_screenings_total", (("outcome", "retry"),)] == 1
    assert samples["osteo_received_bytes_total", ()] == 0  # a rate needs a beginning


def test_every_measure_is_exported_and_none_names_a_patient() -> None:
    look = _look(
        jobs={JobState.READY: 3},
        oldest={JobState.READY: NOW - timedelta(seconds=90)},
        deliveries={("pacs", DeliveryState.REFUSED): 2},
        breakers={"pacs": Breaker(BreakerState.OPEN, NOW)},
        runs=[SchedulerRun("backup", 86400.0, None, NOW, NOW, "done", None, 5, 1, 0)],
        screeners=[{"state": "idle", "gpu_memory": {"used": 5, "total": 10, "name": 3, "x": "y"}}],
        drift_alarms=2,
    )
    samples = _samples(look)
    assert samples["osteo_jobs", (("state", "READY"),)] == 3
    assert samples["osteo_jobs", (("state", "HELD"),)] == 0
    assert samples["osteo_oldest_job_age_seconds", (("state", "READY"),)] == 90
    assert samples["osteo_deliveries", (("destination", "pacs"), ("state", "REFUSED"))] == 2
    assert samples["osteo_circuit_state", (("destination", "pacs"), ("state", "OPEN"))] == 1
    assert samples["osteo_circuit_state", (("destination", "pacs"), ("state", "CLOSED"))] == 0
    assert samples["osteo_step_failures_total", (("step", "backup"),)] == 1
    assert samples["osteo_step_last_run_timestamp_seconds", (("step", "backup"),)] == NOW.timestamp()
    assert samples["osteo_gpu_memory_bytes", (("kind", "used"), ("screener", "1"))] == 5
    assert samples["osteo_drift_alarms", ()] == 2
    assert samples["osteo_role_processes", (("role", "screener"),)] == 2
    labels = {label for _name, pairs in samples for label, _value in pairs}
    allowed = {name for measure in MEASURES.values() for name in measure.labels}
    assert labels <= allowed | {"le", "state", "destination", "role", "step", "screener", "kind", "version"}
    absent = _samples(_look(store_answers=False))
    assert absent["osteo_store_up", ()] == 0
    assert not [name for name, _labels in absent if name.startswith("osteo_jobs")]  # not a false zero


@pytest.mark.parametrize(
    ("changes", "keys", "healthy", "ready"),
    [
        ({}, [], True, True),
        ({"signs": [_sign("screener"), _sign("screener", slot=2)]}, ["role:receiver"], False, False),
        ({"signs": [_sign("receiver", silent=61.0)]}, ["role:receiver", "role:screener"], False, False),
        (
            {"signs": [_sign("receiver"), _sign("screener"), _sign("screener", slot=2, state="ended")]},
            ["role:screener"],
            False,
            False,
        ),
        (
            {"signs": [_sign("receiver", state="starting"), _sign("screener"), _sign("screener", slot=2)]},
            ["starting:receiver"],
            True,
            False,
        ),
        ({"store_answers": False, "jobs": {}}, ["store"], True, False),
        ({"free_bytes": 0}, ["disk_full"], True, False),
        ({"free_bytes": SETTINGS.receiver.low_watermark_bytes - 1}, ["disk_low"], True, True),
        ({"jobs": {JobState.FAILED: 1, JobState.HELD: 2}}, ["jobs:HELD", "jobs:FAILED"], True, True),
        ({"oldest": {JobState.READY: NOW - timedelta(hours=2)}}, ["waiting"], True, True),
        ({"oldest": {JobState.READY: NOW - timedelta(minutes=2)}}, [], True, True),
        ({"drift_alarms": 1}, ["drift"], True, True),
        ({"breakers": {"pacs": Breaker(BreakerState.OPEN, NOW)}}, ["circuit:pacs"], True, True),
        ({"breakers": {"pacs": Breaker(BreakerState.CLOSED, NOW)}}, [], True, True),
        ({"deliveries": {("pacs", DeliveryState.REFUSED): 1}}, ["refused:pacs"], True, True),
        ({"runs": [SchedulerRun("backup", 1.0, None, NOW, NOW, "Damaged", "", 1, 1, 0)]}, ["steps"], True, True),
        ({"runs": [SchedulerRun("backup", 1.0, None, None, None, None, "", 0, 0, 0)]}, [], True, True),
    ],
)
def test_what_is_amiss(changes: dict[str, Any], keys: list[str], healthy: bool, ready: bool) -> None:
    found = problems_of(_look(**changes), SETTINGS)
    assert sorted(problem.key for problem in found) == sorted(keys)
    assert (is_healthy(found), is_ready(found)) == (healthy, ready)


def test_a_process_that_was_killed_leaves_its_place_and_its_sums(tmp_path: Path) -> None:
    now = [1000.0]
    first = Vitals(tmp_path, "screener", clock=lambda: now[0])
    second = Vitals(tmp_path, "screener", clock=lambda: now[0])
    first.ready()
    assert [(sign.slot, sign.state) for sign in read_signs(tmp_path, 1000.0)] == [(1, "ready"), (2, "starting")]
    now[0] += 30
    second.alive()
    assert [sign.silent_seconds for sign in read_signs(tmp_path, 1030.0)] == [30.0, 0.0]
    first.close()
    third = Vitals(tmp_path, "screener", clock=lambda: now[0])
    assert [(sign.slot, sign.state) for sign in read_signs(tmp_path, 1030.0)] == [(1, "starting"), (2, "starting")]
    # the machine was started anew: its clock begins at nothing, and nobody is alive for what he said before
    assert not any(sign.is_well for sign in read_signs(tmp_path, 5.0))
    (tmp_path / "vitals" / "broken-1.json").write_text("{")
    assert len(read_signs(tmp_path, 1030.0)) == 2
    for vitals in (second, third):
        vitals.close()


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_lines_that_are_not_written_are_counted(level: str, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    def hear(event: Any) -> None:
        heard.append(event["event"])

    before = structlog.get_config()
    listen(hear)
    try:
        configure_logging(LogSettings.model_validate({"level": level}), "test")
        for say in (get_logger().debug, get_logger().info, get_logger().warning, get_logger().error):
            say("an_event")
    finally:
        structlog.configure(**before)
        structlog.contextvars.unbind_contextvars("role")
        logging.captureWarnings(capture=False)
        _LISTENERS.remove(hear)
    assert heard == ["an_event"] * 3  # all but debug


class _Channel:
    def __init__(self, name: str = "email") -> None:
        self.name = name
        self.works = True
        self.tried: list[str] = []
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.tried.append(message.identifier)
        if not self.works:
            raise PeerUnavailable("no answer")
        self.sent.append(message)


class _People:
    """A notifier with a clock in hand and two channels."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.now = NOW
        self.folder = folder
        self.settings = NotificationSettings.model_validate({"after_seconds": 300, **settings})
        self.mail, self.hook = _Channel(), _Channel("webhook")
        self.restart()

    def restart(self) -> None:
        self.notifier = Notifier(self.settings, self.folder, [self.mail, self.hook], lambda: self.now)

    def see(self, *problems: Problem, after: float = 0.0) -> None:
        self.now += timedelta(seconds=after)
        self.notifier.tell(problems, threading.Event())


FULL = Problem("disk_full", Severity.CRITICAL, "The disk is full.")
HELD = Problem("jobs:HELD", Severity.WARNING, "2 studies are HELD.")


def test_told_once_and_when_it_is_over(tmp_path: Path) -> None:
    people = _People(tmp_path)
    people.see(FULL)
    people.see(after=100)  # it passed by itself
    people.see(FULL, after=10)
    people.see(FULL, HELD, after=299)
    assert people.mail.sent == []
    people.see(FULL, HELD, after=1)
    for _ in range(50):
        people.see(FULL, HELD, after=5)
    people.restart()  # a new process knows what was told
    people.see(FULL, HELD)
    assert [[problem.key for problem in message.begun] for message in people.mail.sent] == [["disk_full"]]
    people.see(HELD, after=200)
    people.see(HELD, after=100)
    changes = [([p.key for p in m.begun], [p.key for p in m.over]) for m in people.mail.sent]
    assert changes == [(["disk_full"], []), ([], ["disk_full"]), (["jobs:HELD"], [])]
    assert people.mail.sent[1].subject.endswith("over: 1 problem")
    assert "The disk is full." in people.mail.sent[1].text
    assert [message.to_json()["problems"] for message in people.hook.sent][1] == [
        {"problem": "disk_full", "change": "over", "severity": "critical", "text": "The disk is full."}
    ]


def test_what_stands_is_told_again_after_a_day(tmp_path: Path) -> None:
    people = _People(tmp_path, after_seconds=0, repeat_hours=24)
    for _hour in range(49):
        people.see(FULL, after=3600)
    assert len(people.mail.sent) == 3
    once = _People(tmp_path / "once", after_seconds=0, repeat_hours=0)
    for _hour in range(100):
        once.see(FULL, after=3600)
    assert len(once.mail.sent) == 1


def test_at_night_only_what_cannot_wait(tmp_path: Path) -> None:
    people = _People(tmp_path, after_seconds=0, quiet_hours="20:00-07:00")
    people.now = datetime(2026, 3, 4, 21, tzinfo=UTC)
    people.see(HELD)
    assert people.mail.sent == []
    people.see(HELD, FULL, after=3600)
    assert [problem.key for problem in people.mail.sent[0].begun] == ["disk_full"]
    people.see(HELD, after=3600)  # that it is over wakes nobody
    assert len(people.mail.sent) == 1
    people.now = datetime(2026, 3, 5, 7, tzinfo=UTC)
    people.see(HELD)
    (morning,) = people.mail.sent[1:]
    assert ([p.key for p in morning.begun], [p.key for p in morning.over]) == (["jobs:HELD"], ["disk_full"])


def test_a_channel_that_does_not_answer_is_tried_again_and_holds_up_no_other(tmp_path: Path) -> None:
    people = _People(tmp_path, after_seconds=0, retry_base_seconds=30, retry_maximum_seconds=600)
    people.mail.works = False
    for _ in range(360):
        people.see(FULL, after=10)
    assert len(people.hook.sent) == 1
    assert 5 <= len(people.mail.tried) <= 14  # an hour of back-off, not 360 tries
    assert len(set(people.mail.tried)) == 1  # the same letter
    people.restart()
    people.mail.works = True
    people.see(FULL, HELD, after=1200)  # more to tell than before: another letter
    assert [[problem.key for problem in message.begun] for message in people.mail.sent] == [["disk_full", "jobs:HELD"]]
    assert len(people.hook.sent) == 2


def test_templates_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "subject.txt.j2").write_text("Knochendichte\r\nBcc: x@y: {{ begun | length }}")
    people = _People(tmp_path, after_seconds=0, templates_dir=tmp_path)
    people.see(FULL)
    assert people.mail.sent[0].subject == "Knochendichte Bcc: x@y: 1"
    (tmp_path / "message.txt.j2").write_text("{{ patient_name }}")
    with pytest.raises(ConfigurationError, match="templates_dir"):
        people.restart()
    (tmp_path / "message.txt.j2").write_text("{{ begun.__class__.__mro__ }}")
    with pytest.raises(ConfigurationError, match="templates_dir"):
        people.restart()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"email_to": ["a@b"]}, "email_from"),
        ({"email_to": ["a@b\nBcc: c@d"], "email_from": "e@f"}, "addresses"),
        ({"smtp_user": "u"}, "smtp_password_file"),
        ({"smtp_user": "u", "smtp_password_file": "/p"}, "in the clear"),
        ({"webhook_url": "http://example.org/x"}, "https only"),
        ({"webhook_url": "ftp://localhost"}, "begins with"),
        ({"quiet_hours": "8-9"}, "quiet_hours"),
    ],
)
def test_notifications_that_cannot_be_sent_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate({"notifications": section})
