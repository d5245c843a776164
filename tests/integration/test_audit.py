"""Audit messages on their way: durable, in order, bounded; over TLS to a repository that comes and goes."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import stat
import time
from pathlib import Path
from xml.etree.ElementTree import Element

import pydicom
import pytest
from click.testing import CliRunner
from pydicom.uid import BasicTextSRStorage, generate_uid
from structlog.testing import capture_logs

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import EventType
from osteo_daemon.audit.courier import Courier
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.audit.syslog import TlsTransport, UdpTransport
from osteo_daemon.audit.trail import Trail
from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import PeerTls
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.readiness import Finding, check_node
from osteo_daemon.settings import AuditSettings, Settings, load_settings
from tests.audit_repository import Repository, kind_of, xml_of
from tests.authority import Authority
from tests.fakes import (
    CALLED,
    CALLING,
    LOOPBACK,
    CountingScp,
    RoleProcess,
    a_free_port,
    settings_text,
    storescu,
    until,
    write_ct,
)

ROOM = 10_000_000


def sent(number: int) -> events.AuditMessage:
    return events.security_alert(EventType.NODE_AUTHENTICATION, f"number {number}")


def number_of(message: bytes) -> int:
    (detail,) = xml_of(message).iter("ParticipantObjectDetail")
    return int(base64.b64decode(detail.attrib["value"]).split()[1])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def spool(tmp_path: Path) -> AuditSpool:
    return AuditSpool(tmp_path / "audit", ROOM)


def transport(authority: Authority, port: int, seconds: float = 60.0) -> TlsTransport:
    ours = authority.issue("osteo")
    return TlsTransport(LOOPBACK, port, PeerTls(authority.file, ours.certificate, ours.key), seconds)


def fill(spool: AuditSpool, numbers: range) -> None:
    written = Trail(spool, "osteo-test", "OSTEO")
    for number in numbers:
        written.record(sent(number))


def test_messages_wait_for_the_repository_and_come_in_order(authority: Authority, spool: AuditSpool) -> None:
    port = a_free_port()
    fill(spool, range(30))
    courier = Courier(spool, transport(authority, port), poll_seconds=0.02)
    courier.start()
    fill(spool, range(30, 60))
    assert spool.count() == 60
    with Repository(authority.server(authority.issue("repository")), port=port) as repository:
        until(lambda: len(repository.received) >= 60)
        until(lambda: spool.count() == 0)
    fill(spool, range(60, 70))  # it is gone again
    with Repository(authority.server(authority.issue("repository")), port=port) as again:
        until(lambda: len(again.received) >= 10)
        courier.stop()
    assert [number_of(message) for message in repository.received] == list(range(60))
    assert [number_of(message) for message in again.received] == list(range(60, 70))
    assert spool.count() == 0


def test_what_a_repository_did_not_read_is_sent_again(authority: Authority, spool: AuditSpool) -> None:
    """Syslog acknowledges nothing: only the answer to the end of a connection says that what came before was read."""
    fill(spool, range(250))
    shown = authority.server(authority.issue("repository"))
    with Repository(shown, reset_after=[1, 7, 199]) as repository:
        courier = Courier(spool, transport(authority, repository.port), poll_seconds=0.01)
        courier.start()
        until(lambda: spool.count() == 0)
        courier.stop()
    numbers = [number_of(message) for message in repository.received]
    # at least once, and whoever forgets repetitions has them in order
    assert list(dict.fromkeys(numbers)) == list(range(250))
    assert numbers == [*range(1), *range(7), *range(199), *range(250)]


def test_a_repository_that_just_closes_has_them_too(authority: Authority, spool: AuditSpool) -> None:
    fill(spool, range(5))
    with Repository(authority.server(authority.issue("repository")), answers_end=False) as repository:
        courier = Courier(spool, transport(authority, repository.port))
        courier.stop()
    assert [number_of(message) for message in repository.received] == list(range(5))
    assert spool.count() == 0


def test_nobody_else_gets_them(authority: Authority, spool: AuditSpool, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "Another CA")
    fill(spool, range(3))
    for shown in (stranger.issue("stranger"), authority.issue("elsewhere", names=("10.9.9.9",))):
        with Repository(authority.server(shown)) as repository:
            Courier(spool, transport(authority, repository.port)).stop()
            assert repository.received == []
    assert spool.count() == 3


def test_only_one_courier_works_at_a_time(authority: Authority, spool: AuditSpool) -> None:
    fill(spool, range(100))
    with Repository(authority.server(authority.issue("repository"))) as repository:
        way = transport(authority, repository.port)
        couriers = [Courier(spool, way, poll_seconds=0.01) for _ in range(3)]
        for courier in couriers:
            courier.start()
        until(lambda: spool.count() == 0)
        for courier in couriers:
            courier.stop()
    assert [number_of(message) for message in repository.received] == list(range(100))


def test_datagrams(spool: AuditSpool) -> None:
    fill(spool, range(5))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as repository:
        repository.bind((LOOPBACK, 0))
        repository.settimeout(60)
        Courier(spool, UdpTransport(LOOPBACK, repository.getsockname()[1])).stop()
        assert [number_of(repository.recv(65536)) for _ in range(5)] == list(range(5))
    assert spool.count() == 0


def test_the_spool_is_private_and_a_new_process_goes_on_in_order(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path / "audit", ROOM)
    spool.put(b"first")
    # as if the clock had been set back since: a name far ahead of the present
    ahead = f"{10**19:020d}-1.syslog"
    (spool.folder / ahead).write_bytes(b"second")
    for name, age_s in (("1-1.partial", 7200), ("2-1.partial", 60)):
        (spool.folder / name).write_bytes(b"half")
        os.utime(spool.folder / name, (time.time() - age_s,) * 2)
    again = AuditSpool(tmp_path / "audit", ROOM)
    assert [path.name for path in spool.folder.glob("*.partial")] == ["2-1.partial"]
    again.put(b"third")
    assert [path.read_bytes() for path in again.waiting(10)] == [b"first", b"second", b"third"]
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in again.waiting(10) if path.name != ahead} == {0o600}


def test_a_full_spool_keeps_the_oldest_and_the_gap_is_told(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path / "audit", 100_000)
    fill(spool, range(1))
    (first,) = spool.waiting(1)
    room = 100_000 // first.stat().st_size
    written = Trail(spool, "osteo-test", "OSTEO")
    with capture_logs() as lines:
        for number in range(1, room + 10):
            written.record(sent(number))
    kept = spool.waiting(10**6)
    assert spool.size_bytes() <= 100_000
    assert [number_of(path.read_bytes()) for path in kept] == list(range(len(kept)))
    lost = room + 10 - len(kept)
    assert [(line["event"], line["count"]) for line in lines][:1] == [("audit_not_recorded", 1)]
    assert {line["event"] for line in lines} == {"audit_not_recorded"}
    spool.remove(kept)
    written.record(sent(1000))
    gap, after = (xml_of(path.read_bytes()) for path in spool.waiting(10))
    assert type_of(gap) == "Audit Recording Started"
    assert f"{lost} audit messages were not recorded" in detail_of(gap)
    assert detail_of(after) == "number 1000"


def test_a_disk_that_fails_stops_nothing(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path / "audit", ROOM)
    written = Trail(spool, "osteo-test", "OSTEO")
    spool.folder.rename(tmp_path / "gone")
    with capture_logs() as lines:
        written.record(sent(1))
    assert [line["event"] for line in lines] == ["audit_not_written", "audit_not_recorded"]
    (tmp_path / "gone").rename(spool.folder)
    written.record(sent(2))
    assert [detail_of(xml_of(path.read_bytes())) for path in spool.waiting(9)][-1] == "number 2"
    assert spool.count() == 2


def test_without_settings_nothing_is_kept(tmp_path: Path) -> None:
    trail.open_trail(Settings(state_dir=tmp_path), "test")
    assert not trail.is_open()
    trail.record(sent(1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="ca_file"):
        AuditSettings(enabled=True, host="repository")
    (tmp_path / "audit").write_text("a file")
    with pytest.raises(ConfigurationError, match="audit folder"):
        trail.open_trail(Settings(state_dir=tmp_path, audit=AuditSettings(enabled=True)), "test")


def test_the_trail_of_a_node(authority: Authority, tmp_path: Path) -> None:
    """Received, refused, sent, removed: told to the repository with the patient's name, which stands in no log."""
    port = a_free_port()
    node = authority.issue("osteo")
    repository = Repository(authority.server(authority.issue("repository")))
    with repository, CountingScp() as pacs:
        extra = f"""
[audit]
enabled = true
host = "{LOOPBACK}"
port = {repository.port}
ca_file = "{authority.file}"
certificate_file = "{node.certificate}"
key_file = "{node.key}"
[site]
institution = "Hospital"
[log]
level = "debug"
[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "{LOOPBACK}"
port = {pacs.port}
commitment = "c-find"
"""
        config = tmp_path / "osteo.toml"
        config.write_text(settings_text(tmp_path / "state", port, extra=extra, quiet_seconds=0.5))
        identity = {"PatientName": "Audit^Änne", "PatientID": "MRN-4711", "SpecificCharacterSet": "ISO_IR 192"}
        files = write_ct(tmp_path / "ct", 3, **identity)
        roles = {
            name: RoleProcess(["run", name, "--config", str(config)], tmp_path / f"{name}.log").start()
            for name in ("receiver", "scheduler", "deliverer")
        }
        try:
            roles["receiver"].wait_for("receiver_listening")
            assert storescu(port, files).returncode == 0
            assert storescu(port, files[:1]).returncode == 0  # again, the same
            assert storescu(port, files[:1], calling="STRANGER").returncode != 0
            settings = load_settings(config, {})
            store = JobStore(settings.database_url)
            study = report_on(store, settings, files[0])
            until(lambda: pacs.received)
            until(lambda: store.counts_by_state()[JobState.DELIVERED])
            purged = CliRunner().invoke(
                cli, ["studies", "purge", study, "--reason", "test", "--yes", "--config", str(config)]
            )
            assert purged.exit_code == 0, purged.output
            store.close()
            until(lambda: "DICOM Study Deleted" in repository.kinds())
        finally:
            for name in ("receiver", "deliverer", "scheduler"):
                assert roles[name].stop() == 0
        messages = repository.messages
    told = [(kind_of(message), action_of(message)) for message in messages]
    assert told.count(("Application Activity", "E")) >= 5  # three starts; at least two stops went before the courier's
    assert told.count(("Begin Transferring DICOM Instances", "E")) == 1
    assert told.count(("DICOM Instances Transferred", "C")) == 1
    # the repetition, and the report to the PACS
    assert told.count(("DICOM Instances Transferred", "R")) == 2
    assert told.count(("Query", "E")) >= 1
    assert told.count(("Security Alert", "E")) == 1
    assert told.count(("DICOM Study Deleted", "D")) == 1
    received = next(m for m in messages if (kind_of(m), action_of(m)) == ("DICOM Instances Transferred", "C"))
    sender, receiver = received.findall("ActiveParticipant")
    assert (sender.attrib["UserID"], sender.attrib["NetworkAccessPointID"]) == (CALLING, LOOPBACK)
    assert receiver.attrib["UserID"] == CALLED
    (classes,) = received.iter("SOPClass")
    assert classes.attrib["NumberOfInstances"] == "3"
    about_patients = [m for m in messages if kind_of(m).startswith(("DICOM", "Begin"))]
    for message in about_patients:
        patient = message.findall("ParticipantObjectIdentification")[-1]
        assert patient.attrib["ParticipantObjectID"] == "MRN-4711"
        assert patient.findtext("ParticipantObjectName") == "Audit^Änne"
    alert = next(m for m in messages if kind_of(m) == "Security Alert")
    assert "STRANGER" in [entry.attrib["UserID"] for entry in alert.findall("ActiveParticipant")]
    logs = "".join(role.log.read_text() for role in roles.values())
    assert "instance_received" in logs
    for identity in ("Änne", "MRN-4711", "Audit^"):
        assert identity not in logs
    assert not any("4711" in str(path) for path in (tmp_path / "state").rglob("*"))


def report_on(store: JobStore, settings: Settings, image: Path) -> str:
    """A report on the received study, committed as the screener does it; its Study Instance UID."""
    job = until(lambda: store.claim("test", 60), 20)
    data_set = pydicom.dcmread(image)
    for keyword in ("PixelData", "Rows", "Columns"):
        del data_set[keyword]
    uid = generate_uid()
    data_set.SOPClassUID = data_set.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    data_set.SOPInstanceUID = data_set.file_meta.MediaStorageSOPInstanceUID = uid
    written = io.BytesIO()
    data_set.save_as(written, enforce_file_format=True)
    stored = Spool(settings.spool_dir).store_report(job.study_instance_uid, uid, [written.getvalue()])
    report = ReportObject(ReportKind.SR, BasicTextSRStorage, uid, stored.path, stored.size_bytes, stored.sha256)
    store.commit_report(job, {}, [report], [NewDelivery("pacs", (uid,))])
    return str(job.study_instance_uid)


def type_of(message: Element) -> str:
    kind = message.find("EventIdentification/EventTypeCode")
    assert kind is not None
    return kind.attrib["originalText"]


def action_of(message: Element) -> str:
    event = message.find("EventIdentification")
    assert event is not None
    return event.attrib["EventActionCode"]


def detail_of(message: Element) -> str:
    (detail,) = message.iter("ParticipantObjectDetail")
    return base64.b64decode(detail.attrib["value"]).decode()


def test_what_waits_can_be_asked(tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n[audit]\nenabled = true\n')
    runner = CliRunner()
    assert "waiting: 0" in runner.invoke(cli, ["audit", "status", "--config", str(config)]).output
    fill(AuditSpool(tmp_path / "state" / "audit", ROOM), range(3))
    shown = json.loads(runner.invoke(cli, ["audit", "status", "--json", "--config", str(config)]).output)
    assert (shown["waiting"], shown["repository"]) == (3, None)
    assert shown["waiting_since"] is not None
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    assert "off" in runner.invoke(cli, ["audit", "status", "--config", str(config)]).output


def test_a_check_tries_the_repository(authority: Authority, tmp_path: Path) -> None:
    port = a_free_port()
    ours = authority.issue("osteo")
    files = {"ca_file": authority.file, "certificate_file": ours.certificate, "key_file": ours.key}
    wanted = AuditSettings(enabled=True, host=LOOPBACK, port=port, **files)
    settings = Settings(state_dir=tmp_path / "state", audit=wanted)

    def found() -> Finding:
        return next(finding for finding in check_node(settings) if finding.name == "audit repository")

    assert not found().ok
    with Repository(authority.server(authority.issue("repository")), port=port) as repository:
        assert found().ok
    assert repository.received == []
