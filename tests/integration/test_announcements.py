"""Performed procedure steps, availability notifications and counts at the source, over real ports, as evidence."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import N_CREATE

from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.dicom.instance_availability import INSTANCE_AVAILABILITY_CLASS_UID
from osteo_daemon.dicom.performed_procedure import PERFORMED_PROCEDURE_STEP_CLASS_UID
from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.completeness import Receiving
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import Settings, load_settings
from tests.fakes import (
    CALLED,
    CALLING,
    LOOPBACK,
    STUDY_ROOT_FIND,
    a_free_port,
    settings_text,
    storescu,
    until,
    write_ct,
)
from tests.orthanc import AE_TITLE, running_orthanc
from tests.peers import rejection

MPPS, IAN = PERFORMED_PROCEDURE_STEP_CLASS_UID, INSTANCE_AVAILABILITY_CLASS_UID


@dataclass
class Node:
    """A receiver and a scheduler's sweep on one store; the sweep's clock stands where a test puts it."""

    settings: Settings
    port: int
    store: JobStore
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    sweep: CompletenessSweep = field(init=False)

    def __post_init__(self) -> None:
        self.sweep = CompletenessSweep(self.settings, self.store, clock=lambda: self.now)

    def swept(self, quiet_seconds: float = 0.0) -> list[str]:
        """Reasons of what one sweep lets go on, so long after the last arrival and the end of its association."""

        def arrivals() -> list[Receiving]:
            return self.store.receiving_studies(0.0, now=datetime.now(UTC) + timedelta(days=1))

        until(lambda: not any(study.open_association for study in arrivals()))
        last = max((study.last_received_at for study in arrivals()), default=datetime.now(UTC))
        self.now = last + timedelta(seconds=quiet_seconds)
        return [entry.verdict.reason for entry in self.sweep.run()]

    def answered(self) -> None:
        """Wait until no question to a source is under way."""
        until(lambda: not any(source.waiting for source in self.sweep._inquiries._sources.values()))

    def history(self, study: str) -> list[str]:
        return [entry.event for entry in self.store.events(study)]


@contextmanager
def running_node(folder: Path, extra: str = "") -> Iterator[Node]:
    config = folder / "osteo.toml"
    config.write_text(settings_text(folder / "state", 0, extra=extra))
    settings = load_settings(config)
    receiver = Receiver(settings)
    receiver.start()
    store = JobStore(settings.database_url)
    node = Node(settings, receiver.port, store)
    try:
        yield node
    finally:
        node.sweep.close()
        store.close()
        receiver.stop(grace_seconds=0.0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


@contextmanager
def scu(port: int, *classes: str, calling: str = CALLING, received: list[Dataset] | None = None) -> Iterator[Any]:
    entity = AE(ae_title=calling)
    entity.requested_contexts = [build_context(uid) for uid in classes]
    heard = [] if received is None else received
    handlers = [(evt.EVT_DIMSE_RECV, lambda event: heard.append(event.message.command_set))]
    link = entity.associate(LOOPBACK, port, ae_title=CALLED, evt_handlers=handlers)
    try:
        yield link
    finally:
        if link.is_established:
            link.release()


def series_item(paths: list[Path]) -> Dataset:
    item = Dataset()
    item.ReferencedImageSequence = []
    for path in paths:
        header = dcmread(path, stop_before_pixels=True)
        item.SeriesInstanceUID = header.SeriesInstanceUID
        item.ReferencedImageSequence.append(reference(header))
    item.ReferencedNonImageCompositeSOPInstanceSequence = []
    return item


def reference(header: Dataset, **more: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


def begun(study: str, status: str = "IN PROGRESS") -> Dataset:
    attributes = Dataset()
    scheduled = Dataset()
    scheduled.StudyInstanceUID = study
    attributes.ScheduledStepAttributesSequence = [scheduled]
    attributes.PatientName, attributes.PatientID = "Secret^Name", "4711"
    attributes.PerformedProcedureStepStatus = status
    attributes.PerformedSeriesSequence = []
    return attributes


def ended(paths: list[Path], status: str = "COMPLETED") -> Dataset:
    changes = Dataset()
    changes.PerformedProcedureStepStatus = status
    changes.PerformedSeriesSequence = [series_item(paths)] if paths else []
    return changes


def study_of(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True).StudyInstanceUID)


def test_a_step_that_ends_starts_the_study_at_once_and_one_that_lists_more_holds_it(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=6)
    study, uid = study_of(files[0]), generate_uid()
    with scu(node.port, MPPS) as link:
        assert link.send_n_create(begun(study), MPPS, uid)[0].Status == 0
        assert storescu(node.port, files[:5]).returncode == 0
        assert node.swept(899) == []  # in progress, however quiet
        assert link.send_n_set(ended(files), MPPS, uid)[0].Status == 0
    assert node.swept(0) == node.swept(61) == []
    assert node.history(study)[-1] == "study_waits"
    assert storescu(node.port, files[5:]).returncode == 0
    assert node.swept(0) == ["all 6 images listed by MPPS are here"]
    # a slice that the list did not name: a revision, which waits for its quiet time
    (late,) = write_ct(tmp_path / "late", count=1, study_uid=study, seed=1)
    assert storescu(node.port, [late]).returncode == 0
    job = node.store.job(study)
    assert job is not None
    assert (job.state, job.revision) == (JobState.RECEIVING, 2)
    assert node.swept(59) == []
    assert node.swept(61) == [f"nothing came for 60 s, the quiet time of {CALLING}"]


def test_what_never_comes_is_waited_for_and_noted(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=6)
    study, uid = study_of(files[0]), generate_uid()
    with scu(node.port, MPPS) as link:
        link.send_n_create(begun(study), MPPS, uid)
        link.send_n_set(ended(files, "DISCONTINUED"), MPPS, uid)
    assert storescu(node.port, files[:4]).returncode == 0
    assert node.swept(895) == []
    reason = "MPPS lists 2 more images of the series that are here"
    assert node.swept(905) == [f"{reason}; nothing came for 900 s"]
    (*_, waits, incomplete) = node.store.events(study)
    assert (waits.event, waits.reason) == ("study_waits", reason)
    assert (incomplete.event, incomplete.to_state) == ("study_incomplete", JobState.READY)


def test_a_listed_series_that_never_begins_is_waited_for_and_told(node: Node, tmp_path: Path) -> None:
    first = write_ct(tmp_path / "first", count=4)
    study, uid = study_of(first[0]), generate_uid()
    second = write_ct(tmp_path / "second", count=3, study_uid=study, series_uid=generate_uid(), seed=1)
    with scu(node.port, MPPS) as link:
        link.send_n_create(begun(study), MPPS, uid)
        changes = ended(first)
        changes.PerformedSeriesSequence.append(series_item(second))
        link.send_n_set(changes, MPPS, uid)
    assert storescu(node.port, first).returncode == 0
    assert node.swept(61) == node.swept(295) == []  # its quiet time is over, and what is listed may come yet
    reason = "MPPS lists 1 more series of which nothing came"
    assert node.store.events(study)[-1].reason == reason
    assert node.swept(301) == [f"{reason}; nothing came for 300 s"]
    job = node.store.job(study)
    assert job is not None
    assert (job.state, job.revision, job.lacks) == (JobState.READY, 1, Lacks.SERIES)
    # it comes after all: a revision that lacks nothing
    assert storescu(node.port, second).returncode == 0
    assert node.swept(0) == ["all 7 images listed by MPPS are here"]
    job = node.store.job(study)
    assert job is not None
    assert (job.revision, job.lacks) == (2, None)


def test_steps_are_answered_as_the_standard_says(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    study, uid = study_of(files[0]), generate_uid()
    bare, unknown, foreign = begun(study), begun(study, "DREAMING"), begun("not a UID")
    del bare.PerformedProcedureStepStatus
    nobody, nothing = begun(study), Dataset()
    nobody.ScheduledStepAttributesSequence = []
    with scu(node.port, MPPS) as link:
        for attributes, status in (
            (begun(study, "COMPLETED"), 0x0106),
            (unknown, 0x0106),
            (foreign, 0x0106),
            (bare, 0x0120),
            (nobody, 0x0120),
            (begun(study), 0x0000),
            (begun(study), 0x0111),
        ):
            assert link.send_n_create(attributes, MPPS, uid)[0].Status == status
        assert link.send_n_create(begun(study), MPPS, None)[0].Status == 0x0117
        assert link.send_n_set(ended(files), MPPS, generate_uid())[0].Status == 0x0112
        nothing.PerformedProcedureStepEndTime = "120000"
        assert link.send_n_set(nothing, MPPS, uid)[0].Status == 0  # a change of what is not kept here
        assert link.send_n_set(ended(files), MPPS, uid)[0].Status == 0
        for changes in (ended(files), ended(files, "IN PROGRESS"), nothing):
            answer, _ = link.send_n_set(changes, MPPS, uid)
            assert (answer.Status, answer.ErrorID) == (0x0110, 0xA710)
    assert rejection(node.port, "STRANGER", abstract_syntax=MPPS) == (1, 1, 3)
    assert "Secret" not in (tmp_path / "state" / "jobs.sqlite").read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    "attributes",
    [
        b"\x40\x00\x70\x02\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 20_000,  # nested without end
        b"\x40\x00\x70\x02\xf0\xff\xff\xff" + b"x" * 64,  # four gigabytes are announced
        bytes(range(256)) * 8,
        b"\x40\x00\x52\x02\x02\x00",  # ends inside an element
        b"\x00" * (33 << 20),
    ],
    ids=["nested", "long", "garbage", "cut", "huge"],
)
def test_attributes_that_cannot_be_read_are_declined_and_cost_nothing(node: Node, attributes: bytes) -> None:
    request = N_CREATE()
    request.MessageID, request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = 1, MPPS, generate_uid()
    request.AttributeList = BytesIO(attributes)
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(MPPS, "1.2.840.10008.1.2")
    answers: list[Dataset] = []
    handlers = [(evt.EVT_DIMSE_RECV, lambda event: answers.append(event.message.command_set))]
    link = entity.associate(LOOPBACK, node.port, ae_title=CALLED, evt_handlers=handlers)
    link.dimse.send_msg(request, link.accepted_contexts[0].context_id)
    until(lambda: answers)
    assert answers[0].Status in (0x0106, 0x0110, 0x0120, 0x0213)
    link.abort()
    with scu(node.port, MPPS) as other:
        assert other.send_n_create(begun("1.2.3"), MPPS, generate_uid())[0].Status == 0


def test_an_availability_notification_is_a_list_too(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=4)
    headers = [dcmread(path, stop_before_pixels=True) for path in files]
    notification, series = Dataset(), Dataset()
    notification.StudyInstanceUID = headers[0].StudyInstanceUID
    series.SeriesInstanceUID = headers[0].SeriesInstanceUID
    series.ReferencedSOPSequence = [reference(header, InstanceAvailability="ONLINE") for header in headers[:3]]
    series.ReferencedSOPSequence.append(reference(headers[3], InstanceAvailability="UNAVAILABLE"))
    notification.ReferencedSeriesSequence = [series]
    assert storescu(node.port, files[:2]).returncode == 0
    answers: list[Dataset] = []
    with scu(node.port, IAN, received=answers) as link:
        assert link.send_n_create(notification, IAN, None)[0].Status == 0
        uid = answers[-1].AffectedSOPInstanceUID
        assert uid.startswith("2.25.")
        assert link.send_n_create(notification, IAN, uid)[0].Status == 0x0111
        assert link.send_n_create(begun("1.2"), IAN, generate_uid())[0].Status == 0x0120  # no study named
        assert node.swept(100) == []
        assert storescu(node.port, files[2:3]).returncode == 0
        assert node.swept(0) == ["all 3 images listed by IAN are here"]


def test_services_that_are_off_are_not_offered(tmp_path: Path) -> None:
    with running_node(tmp_path, extra="") as node, scu(node.port, MPPS, IAN) as link:
        assert {context.abstract_syntax for context in link.accepted_contexts} == {MPPS, IAN}
    text = settings_text(tmp_path / "state", 0).replace("[completeness]", "[completeness]\nmpps = false\nian = false")
    (tmp_path / "off.toml").write_text(text)
    receiver = Receiver(load_settings(tmp_path / "off.toml"))
    receiver.start()
    try:
        with scu(receiver.port, MPPS, IAN, "1.2.840.10008.1.20.1") as link:
            assert not link.is_established
    finally:
        receiver.stop(grace_seconds=0.0)


def test_a_killed_store_is_heard_as_a_failure(node: Node, tmp_path: Path) -> None:
    blocker = JobStore(node.settings.database_url)
    with scu(node.port, MPPS) as link:
        assert link.send_n_create(begun("1.2.3"), MPPS, "1.2.3.4")[0].Status == 0
        blocker.close()
        with node.store._writing() as connection:
            connection.exec_driver_sql("ALTER TABLE announcements RENAME TO gone")
        assert link.send_n_create(begun("1.2.3"), MPPS, "1.2.3.5")[0].Status == 0x0110
        with node.store._writing() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO announcements")
        assert link.send_n_create(begun("1.2.3"), MPPS, "1.2.3.5")[0].Status == 0


@contextmanager
def counting_source(answers: dict[str, int | None], study_count: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """A peer that answers C-FIND at series level with counts, or only at study level; gives its port and its log."""
    asked: list[str] = []

    def find(event: Any) -> Iterator[tuple[int, Dataset | None]]:
        level = event.identifier.QueryRetrieveLevel
        asked.append(level)
        for uid, count in answers.items() if level == "SERIES" else [("", study_count)]:
            match = Dataset()
            match.QueryRetrieveLevel = level
            match.StudyInstanceUID = event.identifier.StudyInstanceUID
            if level == "SERIES":
                match.SeriesInstanceUID, match.Modality, match.NumberOfSeriesRelatedInstances = uid, "CT", count
            else:
                match.NumberOfStudyRelatedInstances = count
            yield 0xFF00, match

    entity = AE(ae_title="SOURCE")
    entity.add_supported_context(STUDY_ROOT_FIND)
    server = entity.start_server((LOOPBACK, 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()


def asking(port: int) -> str:
    """Settings text whose source is asked."""
    return f'query = {{ ae_title = "SOURCE", host = "{LOOPBACK}", port = {port} }}'


@contextmanager
def asking_node(folder: Path, port: int) -> Iterator[Node]:
    config = settings_text(folder / "state", 0).replace("[completeness]", f"{asking(port)}\n\n[completeness]")
    (folder / "asking.toml").write_text(config)
    settings = load_settings(folder / "asking.toml")
    receiver = Receiver(settings)
    receiver.start()
    store = JobStore(settings.database_url)
    node = Node(settings, receiver.port, store)
    try:
        yield node
    finally:
        node.sweep.close()
        store.close()
        receiver.stop(grace_seconds=0.0)


@pytest.mark.parametrize("level", ["SERIES", "STUDY"])
def test_the_source_is_asked_once_it_is_quiet(tmp_path: Path, level: str) -> None:
    files = write_ct(tmp_path / "ct", count=6)
    series = str(dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
    counts: dict[str, int | None] = {series: 6 if level == "SERIES" else None}
    with counting_source(counts, 6) as (port, asked), asking_node(tmp_path, port) as node:
        assert storescu(node.port, files[:5]).returncode == 0
        assert node.swept(9) == []
        assert asked == []
        assert node.swept(11) == []  # asked beside it
        node.answered()
        assert asked[-1] == level
        assert node.swept(61) == []
        assert node.history(study_of(files[0]))[-1] == "study_waits"
        assert storescu(node.port, files[5:]).returncode == 0
        assert node.swept(0) == []
        what = "6 images of 1 series are here" if level == "SERIES" else "6 objects are here"
        reasons = until(lambda: node.swept(11))
        assert reasons == [f"{CALLING} has no more ({what}); nothing came for 10 s"]
        assert asked.count("SERIES") == 2  # once for each quiet
        # the source was wrong: what comes late is a revision
        (late,) = write_ct(tmp_path / "late", count=1, study_uid=study_of(files[0]), seed=1)
        assert storescu(node.port, [late]).returncode == 0
        job = node.store.job(study_of(files[0]))
        assert job is not None
        assert (job.state, job.revision) == (JobState.RECEIVING, 2)


def test_a_source_that_does_not_answer_costs_nothing_but_the_quiet_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as dead, asking_node(tmp_path, a_free_port()) as node:
        dead.bind((LOOPBACK, 0))
        for seed in range(5):
            files = write_ct(tmp_path / f"ct{seed}", count=3, seed=seed)
            assert storescu(node.port, files).returncode == 0
            assert node.swept(11) == []
        node.answered()
        assert len(node.swept(61)) == 5
    out, err = capfd.readouterr()
    assert (out + err).count("source_gives_no_count") == 1


def test_orthanc_is_asked(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=6)
    with running_orthanc(tmp_path / "orthanc", port := a_free_port(), a_free_port()) as orthanc:
        text = settings_text(tmp_path / "state", 0).replace(
            "[completeness]",
            f'query = {{ ae_title = "{AE_TITLE}", host = "{LOOPBACK}", port = {port} }}\n\n[completeness]',
        )
        (tmp_path / "asking.toml").write_text(text)
        settings = load_settings(tmp_path / "asking.toml")
        receiver = Receiver(settings)
        receiver.start()
        node = Node(settings, receiver.port, JobStore(settings.database_url))
        try:
            _store(orthanc.dicom_port, files)
            assert storescu(node.port, files[:4]).returncode == 0
            assert node.swept(11) == []
            node.answered()
            assert node.swept(61) == []
            assert "has 2 more (4 images of 1 series are here)" in node.store.events(study_of(files[0]))[-1].reason
            assert storescu(node.port, files[4:]).returncode == 0
            assert until(lambda: node.swept(11)) == [
                f"{CALLING} has no more (6 images of 1 series are here); nothing came for 10 s"
            ]
        finally:
            node.sweep.close()
            node.store.close()
            receiver.stop(grace_seconds=0.0)


def _store(port: int, files: list[Path]) -> None:
    entity = AE(ae_title=CALLING)
    entity.add_requested_context("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1")
    link = entity.associate(LOOPBACK, port, ae_title=AE_TITLE)
    assert all(link.send_c_store(dcmread(path)).Status == 0 for path in files)
    link.release()


def test_slices_that_leave_nothing_open_start_early_and_a_late_one_is_a_revision(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=80)  # 237 mm
    study = study_of(files[0])
    assert storescu(node.port, files[:75]).returncode == 0
    assert node.swept(9) == []
    (reason,) = node.swept(11)
    assert reason == ("75 images numbered from 1 without a hole, evenly spaced over 222 mm; nothing came for 10 s")
    assert storescu(node.port, files[76:]).returncode == 0  # the tail, and one of it is missing
    assert node.swept(895) == []
    assert node.history(study)[-1] == "study_waits"
    assert storescu(node.port, files[75:76]).returncode == 0
    (reason,) = node.swept(11)
    assert reason.startswith("80 images numbered from 1")
    job = node.store.job(study)
    assert job is not None
    assert (job.state, job.revision) == (JobState.READY, 2)
