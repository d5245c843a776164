"""Studies fetched from real archives: DCMTK's dcmqrscp and Orthanc, by C-MOVE, C-GET and DICOMweb."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from osteo_daemon.audit import trail
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.domain.archive import Span, Wanted
from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.errors import ConfigurationError, IllegalTransition
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.pull_rows import PulledState, PullState
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.archive import open_archive, taken_classes
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.pull.puller import Puller, Report
from osteo_daemon.pull.search import Identities
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import AuditSettings, Settings
from tests.audit_repository import kind_of, xml_of
from tests.fakes import CALLED, CALLING, LOOPBACK, a_free_port, storescu
from tests.foreign import (
    DCMQRSCP,
    Study,
    require_dicomweb_plugin,
    running_dcmqrscp,
    send_to,
    write_study,
)
from tests.orthanc import AE_TITLE, Orthanc, running_orthanc

WAYS = ("orthanc c-move", "orthanc c-get", "orthanc dicomweb", "dcmqrscp c-move", "dcmqrscp c-get")
QUERY = "ParticipantObjectQuery"
JANUARY = Span(date(2026, 1, 1), date(2026, 1, 31))


@dataclass(frozen=True)
class Archives:
    """Both archives with the same studies, and the port where they think that our node is."""

    folder: Path
    our_port: int
    orthanc: Orthanc
    dcmqrscp_port: int
    abdomen: Study
    thorax: Study
    late: Study
    other: Study

    @property
    def entries(self) -> list[dict[str, Any]]:
        """[[archives]]"""
        found: list[dict[str, Any]] = []
        for way in WAYS:
            name, retrieve = way.split()
            entry: dict[str, Any] = {"name": way.replace(" ", "-"), "retrieve": retrieve}
            if retrieve == "dicomweb":
                entry["url"] = f"{self.orthanc.url}/dicom-web"
            elif name == "orthanc":
                entry |= {"ae_title": AE_TITLE, "host": LOOPBACK, "port": self.orthanc.dicom_port}
            else:
                entry |= {"ae_title": DCMQRSCP, "host": LOOPBACK, "port": self.dcmqrscp_port}
            found.append(entry)
        return found


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archives]:
    """Started once: each test begins a node of its own, one after the other, on the port that they know."""
    folder = tmp_path_factory.mktemp("archives")
    plugin = require_dicomweb_plugin()
    our_port = a_free_port()
    ours = {"osteo": {"AET": CALLED, "Host": LOOPBACK, "Port": our_port, "AllowGet": True, "AllowMove": True}}
    studies = (
        write_study(folder / "a", secondary=True, seed=1, StudyDescription="CT Abdomen", BodyPartExamined="ABDOMEN"),
        write_study(folder / "b", seed=2, StudyDate="20260103", StudyDescription="CT Thorax", BodyPartExamined="CHEST"),
        write_study(
            folder / "c", slices=5, seed=3, StudyDate="20260120", StudyDescription="CT ABDOMEN", PatientID="V2"
        ),
        write_study(folder / "d", seed=4, StudyDate="20260120", Modality="PT", PatientID="V3"),
    )
    with (
        running_orthanc(folder / "orthanc", a_free_port(), a_free_port(), ours, [plugin]) as orthanc,
        running_dcmqrscp(folder / "dcmqrscp", our_port) as dcmqrscp_port,
    ):
        for study in studies:
            send_to(AE_TITLE, orthanc.dicom_port, study.files)
            send_to(DCMQRSCP, dcmqrscp_port, study.files)
        yield Archives(folder, our_port, orthanc, dcmqrscp_port, *studies)


@dataclass
class Node:
    """Our node, its receiver in this process."""

    settings: Settings
    store: JobStore
    spool: Spool
    room: Room
    reports: list[Report] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    tell: Callable[[Report], None] = lambda _report: None

    def pull(self, way: str, criteria: Criteria, identities: Identities | None = None) -> int:
        """A new pull, run to its end; its number."""
        pull_id = self.store.create_pull(way.replace(" ", "-"), criteria.document())
        self.run(way, pull_id, identities)
        return pull_id

    def run(self, way: str, pull_id: int, identities: Identities | None = None) -> PullState:
        """Run a pull that is there."""
        (entry,) = (entry for entry in self.settings.archives if entry.name == way.replace(" ", "-"))
        archive = open_archive(self.settings, entry, self.stopping)

        def tell(report: Report) -> None:
            self.reports.append(report)
            self.tell(report)

        taken = taken_classes(self.settings.accompanying)
        intake = DurableIntake(self.spool, self.store)
        return Puller(
            self.settings.pull,
            self.store,
            self.room,
            archive,
            intake,
            entry.maximum_matches,
            taken,
            self.stopping,
            tell,
        ).run(pull_id, identities)

    def counts(self, pull_id: int) -> dict[str, int]:
        """Studies of a pull by state, those states that have any."""
        return {state.value: count for state, count in self.store.pull_counts(pull_id).items() if count}

    def stored(self, study: Study) -> set[str]:
        """SOP Instance UIDs that are here."""
        return set(self.store.study_here(study.uid).stored)


@contextmanager
def a_node(
    folder: Path,
    archives: Archives,
    *,
    ae_title: str = CALLED,
    receiver: bool = True,
    maximum_matches: int = 500,
    **pull: Any,
) -> Iterator[Node]:
    """A node where the archives think that ours is."""
    away = {"name": "away", "retrieve": "c-get", "ae_title": "AWAY", "host": LOOPBACK, "port": a_free_port()}
    entries = [{**entry, "maximum_matches": maximum_matches} for entry in (*archives.entries, away)]
    titles = (CALLING, AE_TITLE, DCMQRSCP)
    settings = Settings.model_validate(
        {
            "state_dir": folder / "state",
            "receiver": {"ae_title": ae_title, "port": archives.our_port, "minimum_free_bytes": 0},
            "sources": [{"ae_title": title, "addresses": [LOOPBACK]} for title in titles],
            "archives": entries,
            "pull": {"retry_base_seconds": 0.05, "retry_maximum_seconds": 0.1, "maximum_attempts": 3, **pull},
        }
    )
    listening = Receiver(settings) if receiver else None
    if listening is not None:
        listening.start()
    store = JobStore(settings.database_url)
    try:
        yield Node(settings, store, Spool(settings.spool_dir), Room(settings.spool_dir, 0, 0))
    finally:
        store.close()
        if listening is not None:
            listening.stop(grace_seconds=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_wanted_is_fetched_once_and_as_it_is(archives: Archives, tmp_path: Path, way: str) -> None:
    with a_node(tmp_path, archives) as node:
        pull_id = node.pull(way, Criteria(span=JANUARY))
        assert node.store.pull(pull_id).state is PullState.DONE
        # dcmqrscp does not match on Modalities in Study: its PET study is found, asked for its series, and left
        left = {"SKIPPED": 1} if way.startswith("dcmqrscp") else {}
        assert node.counts(pull_id) == {"FETCHED": 3, **left}
        for study in (archives.abdomen, archives.thorax, archives.late):
            assert node.stored(study) == study.ct  # not the secondary capture: bandwidth
            job = node.store.job(study.uid)
            assert job is not None
            assert job.priority is Priority.BACKFILL
            originals = {str(header.SOPInstanceUID): header for header in map(dcmread, study.files)}
            for instance in node.store.instances(job):
                assert dcmread(instance.path).PixelData == originals[instance.sop_instance_uid].PixelData
                assert hashlib.sha256(instance.path.read_bytes()).hexdigest() == instance.sha256
        assert node.stored(archives.other) == set()
        again = node.pull(way, Criteria(span=JANUARY))
        assert node.counts(again) == {"PRESENT": 3, **left}


def test_filters_and_whole_studies(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives) as node:
        wanted = Wanted(body_parts=("ABDOMEN",), description="*abdomen*", whole_study=True)
        pull_id = node.pull("orthanc c-get", Criteria(wanted, JANUARY))
        assert node.counts(pull_id) == {"FETCHED": 2}
        assert node.stored(archives.abdomen) == archives.abdomen.ct | {
            str(dcmread(archives.abdomen.files[-1]).SOPInstanceUID)  # its secondary capture
        }
        assert node.stored(archives.late) == archives.late.ct  # without a body part: taken
        assert node.stored(archives.thorax) == set()


@pytest.mark.parametrize("way", ["orthanc c-move", "orthanc dicomweb", "dcmqrscp c-get"])
def test_a_list_of_patients_is_never_kept_or_told(
    archives: Archives, tmp_path: Path, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with a_node(tmp_path, archives) as node:
        identities = Identities(("V2", "NOBODY-4711"))
        pull_id = node.pull(way, Criteria(span=JANUARY, listed=2), identities)
        assert node.counts(pull_id) == {"FETCHED": 1}
        assert node.stored(archives.late) == archives.late.ct
    assert "NOBODY-4711" not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"NOBODY-4711" not in path.read_bytes()
    log = (archives.folder / "orthanc" / "orthanc.log").read_text()
    assert way != "orthanc dicomweb" or "NOBODY-4711" not in log


@pytest.mark.parametrize("way", ["orthanc c-get", "orthanc dicomweb"])
def test_what_is_asked_and_fetched_is_audited(archives: Archives, tmp_path: Path, way: str) -> None:
    with a_node(tmp_path, archives) as node:
        trail.open_trail(node.settings.model_copy(update={"audit": AuditSettings(enabled=True)}), "pull")
        try:
            node.pull(way, Criteria(Wanted(description="CT Thorax"), JANUARY, listed=1), Identities(("V1",)))
        finally:
            trail.open_trail(node.settings, "test")
        spooled = AuditSpool(trail.audit_dir(node.settings), 1 << 20).waiting(100)
        messages = [xml_of(path.read_bytes()) for path in spooled]
    kinds = [kind_of(message) for message in messages]
    assert kinds.count("Begin Transferring DICOM Instances") == kinds.count("DICOM Instances Transferred") == 1
    asked = [base64.b64decode(query.text or "") for message in messages for query in message.iter(QUERY)]
    assert len(asked) == kinds.count("Query") >= 3  # for studies, series and images
    # as it was sent: a patient is named to the archive, and never in a URL
    assert any(b"V1" in query for query in asked) == (way == "orthanc c-get")
    (moved,) = [message for message in messages if kind_of(message) == "DICOM Instances Transferred"]
    event = moved.find("EventIdentification")
    assert event is not None
    assert event.attrib["EventActionCode"] == "C"
    told = {entry.attrib["UserID"]: entry.attrib["UserIsRequestor"] for entry in moved.findall("ActiveParticipant")}
    assert told == {AE_TITLE if way == "orthanc c-get" else "ORTHANC-DICOMWEB": "false", CALLED: "true"}
    (counted,) = moved.iter("SOPClass")
    assert int(counted.attrib["NumberOfInstances"]) == len(archives.thorax.ct)
    study, patient = moved.findall("ParticipantObjectIdentification")
    assert (study.attrib["ParticipantObjectID"], patient.attrib["ParticipantObjectID"]) == (archives.thorax.uid, "V1")


@pytest.mark.parametrize("way", ["orthanc c-move", "orthanc c-get", "orthanc dicomweb", "dcmqrscp c-move"])
def test_only_what_is_missing_is_fetched(archives: Archives, tmp_path: Path, way: str) -> None:
    with a_node(tmp_path, archives) as node:
        there = storescu(archives.our_port, archives.late.files[:2])
        assert there.returncode == 0, there.stderr
        before = {entry.sop_instance_uid: entry.path.stat().st_mtime_ns for entry in _instances(node, archives.late)}
        pull_id = node.pull(way, Criteria(Wanted(description="CT ABDOMEN"), Span(date(2026, 1, 20), date(2026, 1, 20))))
        (study,) = [entry for entry in node.store.pulled_studies(pull_id) if entry.state is PulledState.FETCHED]
        assert study.instances == 3
        assert node.stored(archives.late) == archives.late.ct
        after = {entry.sop_instance_uid: entry.path.stat().st_mtime_ns for entry in _instances(node, archives.late)}
        assert {uid: after[uid] for uid in before} == before


@pytest.mark.parametrize("way", ["orthanc c-get", "dcmqrscp c-get", "orthanc dicomweb"])
def test_questions_with_too_many_answers_are_split(archives: Archives, tmp_path: Path, way: str) -> None:
    with a_node(tmp_path, archives, maximum_matches=2) as node:
        pull_id = node.pull(way, Criteria(span=JANUARY, limit=3))
        assert sum(node.counts(pull_id).values()) == 3
        wanted = {archives.abdomen.uid, archives.thorax.uid}
        assert wanted <= {entry.study_instance_uid for entry in node.store.pulled_studies(pull_id)}


def test_what_was_screened_and_removed_is_not_fetched_again(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives) as node:
        criteria = Criteria(Wanted(description="CT Thorax"), JANUARY)
        node.pull("orthanc c-get", criteria)
        node.store.hold_study(archives.thorax.uid, "test", "test")
        node.store.purge_study(archives.thorax.uid, node.spool, "test", "test", force=True)
        assert node.counts(node.pull("orthanc c-get", criteria)) == {"PRESENT": 1}
        assert node.stored(archives.thorax) == set()
        again = replace(criteria, again=True)
        assert node.counts(node.pull("orthanc c-get", again)) == {"FETCHED": 1}
        assert node.stored(archives.thorax) == archives.thorax.ct


def test_another_image_under_a_known_uid_fails_and_is_kept_apart(archives: Archives, tmp_path: Path) -> None:
    changed = dcmread(archives.thorax.files[0])
    changed.PixelData = bytes(len(changed.PixelData))
    changed.StudyInstanceUID = "1.2.3.4.5"
    path = tmp_path / "changed.dcm"
    changed.save_as(path)
    with a_node(tmp_path, archives) as node:
        assert storescu(archives.our_port, [path]).returncode == 0
        pull_id = node.pull("orthanc c-get", Criteria(Wanted(description="CT Thorax"), JANUARY))
        (failed,) = node.store.pulled_studies(pull_id, PulledState.FAILED)
        assert failed.detail == "1 objects conflict with stored ones and are in quarantine"
        assert node.stored(archives.thorax) == archives.thorax.ct - {str(changed.SOPInstanceUID)}


@pytest.mark.parametrize("way", ["orthanc c-move", "dcmqrscp c-move"])
def test_studies_that_do_not_come_are_tried_again_and_then_listed(archives: Archives, tmp_path: Path, way: str) -> None:
    with a_node(tmp_path, archives, receiver=False) as node:
        pull_id = node.pull(way, Criteria(Wanted(description="CT Thorax"), JANUARY))
        assert node.counts(pull_id) == {"FAILED": 1}
        (failed,) = node.store.pulled_studies(pull_id)
        assert failed.attempts == 3
    with a_node(tmp_path, archives) as node:
        node.store.reopen_pull(pull_id, failed_too=True)
        assert node.run(way, pull_id) is PullState.DONE
        assert node.counts(pull_id) == {"FETCHED": 1}


def test_an_archive_that_is_away_is_waited_for_and_costs_no_attempt(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives) as node:
        pull_id = node.store.create_pull("away", Criteria(span=JANUARY).document())
        node.store.pull_found(pull_id, [archives.thorax.uid])
        node.store.change_pull(pull_id, PullState.FETCHING)
        node.tell = lambda report: node.stopping.set() if report.waits else None
        assert node.run("away", pull_id) is PullState.FETCHING
        (study,) = node.store.pulled_studies(pull_id)
        assert (study.state, study.attempts) == (PulledState.WANTED, 0)
        assert "no association" in (study.detail or "")


def test_an_archive_that_does_not_know_us_is_a_matter_of_settings(archives: Archives, tmp_path: Path) -> None:
    criteria = Criteria(Wanted(description="CT Thorax"), JANUARY)
    with a_node(tmp_path, archives, ae_title="UNKNOWN") as node:
        with pytest.raises(ConfigurationError, match="UNKNOWN"):
            node.pull("dcmqrscp c-move", criteria)
        # Orthanc hangs up
        pull_id = node.pull("orthanc c-move", criteria)
        (failed,) = node.store.pulled_studies(pull_id, PulledState.FAILED)
        assert "does it know UNKNOWN as a destination?" in (failed.detail or "")


def test_a_cancellation_by_hand_ends_it_between_objects(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives) as node:
        pull_id = node.store.create_pull("orthanc-c-get", Criteria(span=JANUARY).document())

        def cancel(report: Report) -> None:
            if report.counts.get(PulledState.FETCHED):
                node.tell = lambda _report: None
                node.store.change_pull(pull_id, PullState.CANCELLED)
                node.stopping.wait(20)  # the heartbeat sees it

        node.tell = cancel
        assert node.run("orthanc c-get", pull_id) is PullState.CANCELLED
        assert node.counts(pull_id) == {"FETCHED": 1, "WANTED": 2}
        node.stopping.clear()
        node.store.reopen_pull(pull_id, failed_too=False)
        assert node.run("orthanc c-get", pull_id) is PullState.DONE
        assert node.counts(pull_id) == {"FETCHED": 3}


def test_it_waits_while_enough_studies_wait_for_the_screener(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives, maximum_waiting=1) as node:
        waits: list[str] = []

        def let_one_go(report: Report) -> None:
            if report.waits:
                waits.append(report.waits)
                for study in (archives.abdomen, archives.thorax, archives.late):
                    job = node.store.job(study.uid)
                    if job is not None and job.state is JobState.RECEIVING:
                        node.store.hold_study(study.uid, "test", "out of the way")

        node.tell = let_one_go
        pull_id = node.pull("orthanc c-get", Criteria(span=JANUARY))
        assert node.counts(pull_id) == {"FETCHED": 3}
        assert waits.count("enough studies wait to be screened") == 2


def test_two_processes_never_have_one_pull_in_hand(archives: Archives, tmp_path: Path) -> None:
    with a_node(tmp_path, archives) as node:
        pull_id = node.store.create_pull("orthanc-c-get", Criteria(span=JANUARY).document())
        assert node.store.lead(f"pull-{pull_id}", "pull-elsewhere-1", 60)
        with pytest.raises(IllegalTransition, match="another process"):
            node.run("orthanc c-get", pull_id)


def _instances(node: Node, study: Study) -> list[Any]:
    job = node.store.job(study.uid)
    return [] if job is None else node.store.instances(job)
