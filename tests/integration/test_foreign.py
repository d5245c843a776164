"""The node among foreign systems: DCMTK's tools and archive, and Orthanc, in every part that they can play.

Pulling from both: test_pull.py. DICOMweb with Orthanc: test_dicomweb.py. Orthanc asks for commitment: test_promises.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from osteo_daemon.domain.job import Priority
from osteo_daemon.jobs.records import Delivery, DeliveryState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import Settings
from tests.deliveries import PATIENCE_S, built_report, commit, data_set_digest, ended, lanes, settings_for
from tests.fakes import CALLED, CALLING, LOOPBACK, a_free_port, dcmtk, storescu, until
from tests.foreign import DCMQRSCP, Study, running_dcmqrscp, running_storescp, send_to, write_study
from tests.orthanc import AE_TITLE, Orthanc, running_orthanc
from tests.report_cases import STUDY_UID

FIND, MOVE = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2"


@dataclass(frozen=True)
class World:
    """Our node, started once, and its neighbours, who know it."""

    port: int
    state: Path
    store: JobStore
    orthanc: Orthanc
    dcmqrscp_port: int

    def has(self, study: Study) -> bool:
        """Every CT slice of a study is here."""
        return study.ct <= set(self.store.study_here(study.uid).stored)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of them on loopback."""
    folder = tmp_path_factory.mktemp("world")
    port = a_free_port()
    modalities = {"osteo": {"AET": CALLED, "Host": LOOPBACK, "Port": port}}
    with (
        running_orthanc(folder / "orthanc", a_free_port(), a_free_port(), modalities) as orthanc,
        running_dcmqrscp(folder / "dcmqrscp", port) as dcmqrscp_port,
    ):
        settings = Settings.model_validate(
            {
                "state_dir": folder / "state",
                "receiver": {"ae_title": CALLED, "port": port, "minimum_free_bytes": 0},
                "sources": [{"ae_title": title, "addresses": [LOOPBACK]} for title in (CALLING, AE_TITLE, DCMQRSCP)],
            }
        )
        receiver = Receiver(settings)
        receiver.start()
        store = JobStore(settings.database_url)
        yield World(port, settings.state_dir, store, orthanc, dcmqrscp_port)
        store.close()
        receiver.stop(grace_seconds=0.0)


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [dcmtk(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _rest(orthanc: Orthanc, path: str, document: Any) -> Any:
    request = urllib.request.Request(f"{orthanc.url}{path}", json.dumps(document).encode(), method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback http
        return json.loads(answer.read() or b"null")


def _same_pixels(world: World, study: Study) -> bool:
    job = world.store.job(study.uid)
    assert job is not None
    originals = {str(header.SOPInstanceUID): header for header in map(dcmread, study.files)}
    return all(
        dcmread(entry.path).PixelData == originals[entry.sop_instance_uid].PixelData
        for entry in world.store.instances(job)
    )


def test_echoscu(world: World) -> None:
    ours = ("-aet", CALLING, "-aec", CALLED, LOOPBACK, str(world.port))
    assert _tool("echoscu", *ours).returncode == 0
    assert _tool("echoscu", "--repeat", "20", *ours).returncode == 0
    refused = _tool("echoscu", "-aet", "STRANGER", "-aec", CALLED, LOOPBACK, str(world.port))
    assert refused.returncode != 0
    assert "Calling AE Title Not Recognized" in refused.stderr


@pytest.mark.parametrize("syntax", ["-xe", "-xi", "-xb", "-xd", "-xr"])
def test_storescu(world: World, tmp_path: Path, syntax: str) -> None:
    study = write_study(tmp_path, seed=sum(map(ord, syntax)), secondary=True)
    files = list(study.files)
    if syntax == "-xr":
        files = [tmp_path / f"{number}.dcm" for number in range(len(study.files))]
        for before, after in zip(study.files, files, strict=True):
            assert _tool("dcmcrle", str(before), str(after)).returncode == 0
    sent = storescu(world.port, files, syntax)
    assert sent.returncode == 0, sent.stderr
    assert world.has(study)
    assert syntax == "-xr" or _same_pixels(world, study)


def test_findscu_and_getscu_hear_that_we_are_no_archive(world: World) -> None:
    """Nothing is offered that could be asked for: the association ends in order, and the next is served."""
    ours = ("-aet", CALLING, "-aec", CALLED, LOOPBACK, str(world.port))
    for tool in ("findscu", "getscu", "movescu"):
        level = ("-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3")
        asked = _tool(tool, "-S", *level, *(("-aem", CALLED) if tool == "movescu" else ()), *ours)
        assert asked.returncode != 0
        assert re.search(r"No (Acceptable|adequate) Presentation Contexts", asked.stderr), asked.stderr
    assert _tool("echoscu", *ours).returncode == 0


@pytest.mark.parametrize("archive", ["dcmqrscp", "orthanc"])
def test_movescu_has_an_archive_send_to_us(world: World, tmp_path: Path, archive: str) -> None:
    title, port = {"dcmqrscp": (DCMQRSCP, world.dcmqrscp_port), "orthanc": (AE_TITLE, world.orthanc.dicom_port)}[
        archive
    ]
    study = write_study(tmp_path, seed=len(archive), slices=4)
    send_to(title, port, study.files)
    keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study.uid}")
    found = _tool("findscu", "-S", *keys, "-k", "PatientID", "-aet", CALLED, "-aec", title, LOOPBACK, str(port))
    assert "V1" in found.stdout + found.stderr
    moved = _tool("movescu", "-v", "-S", *keys, "-aet", CALLED, "-aem", CALLED, "-aec", title, LOOPBACK, str(port))
    assert moved.returncode == 0, moved.stderr
    assert world.has(study)
    assert _same_pixels(world, study)


def test_a_move_that_somebody_else_asked_for_is_routine(world: World, tmp_path: Path) -> None:
    study = write_study(tmp_path, seed=77)
    send_to(DCMQRSCP, world.dcmqrscp_port, study.files)
    keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study.uid}")
    asked = ("-aet", "WORKSTATION", "-aem", CALLED, "-aec", DCMQRSCP, LOOPBACK, str(world.dcmqrscp_port))
    assert _tool("movescu", "-S", *keys, *asked).returncode == 0
    assert world.has(study)
    job = world.store.job(study.uid)
    assert job is not None
    assert job.priority is Priority.ROUTINE


def test_orthanc_sends(world: World, tmp_path: Path) -> None:
    study = write_study(tmp_path, seed=5, slices=6, secondary=True)
    send_to(AE_TITLE, world.orthanc.dicom_port, study.files)
    assert _rest(world.orthanc, "/modalities/osteo/echo", {}) in ({}, None)
    (resource,) = world.orthanc.find("Study", StudyInstanceUID=study.uid)
    done = _rest(world.orthanc, "/modalities/osteo/store", {"Resources": [resource], "Synchronous": True})
    assert done["FailedInstancesCount"] == 0
    assert done["InstancesCount"] == 7
    assert len(world.store.study_here(study.uid).stored) == 7
    assert world.has(study)
    assert _same_pixels(world, study)
    # the same again, as after a time-out: success, and nothing twice
    files = _received_files(world, study)
    again = _rest(world.orthanc, "/modalities/osteo/store", {"Resources": [resource], "Synchronous": True})
    assert again["FailedInstancesCount"] == 0
    assert _received_files(world, study) == files
    job = world.store.job(study.uid)
    assert job is not None
    assert job.revision == 1


def _received_files(world: World, study: Study) -> Sequence[Path]:
    return Spool(world.state / "spool").received_files(study.uid)


def _deliver(settings: Settings, **destination: Any) -> Delivery:
    changed = settings.destinations[0].model_copy(update=destination)
    settings = settings.model_copy(update={"destinations": (changed,)})
    store = commit(settings, built_report())
    try:
        with lanes(settings, store):
            delivery: Delivery = until(lambda: ended(store), PATIENCE_S)
    finally:
        store.close()
    return delivery


@pytest.mark.parametrize("options", [(), ("+xi",)], ids=["as it comes", "implicit only"])
def test_storescp_gets_results(tmp_path: Path, options: tuple[str, ...]) -> None:
    with running_storescp(tmp_path / "scp", "SCP", "--bit-preserving", *options) as port:
        delivery = _deliver(settings_for(tmp_path, port), ae_title="SCP")
    assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "stored")
    sent = {entry.report.sop_instance_uid: entry.report.path for entry in delivery.objects if entry.status == "0x0000"}
    received = {str(dcmread(path).SOPInstanceUID): path for path in (tmp_path / "scp").iterdir()}
    assert received.keys() == sent.keys()
    assert len(sent) == 3
    for uid, path in received.items():
        if options:
            assert _values(dcmread(path)) == _values(dcmread(sent[uid]))
        else:
            assert data_set_digest(path.read_bytes()) == data_set_digest(sent[uid].read_bytes())


def _values(data_set: Dataset) -> dict[Any, Any]:
    """Elements without their VRs: Implicit VR does not tell some of them."""
    return {
        element.tag: [_values(item) for item in element.value] if element.VR == "SQ" else element.value
        for element in data_set
    }


def test_a_storescp_that_aborts_gets_everything_in_the_end(tmp_path: Path) -> None:
    aborting = running_storescp(tmp_path / "scp", "SCP", "--abort-after")
    with aborting as port:
        settings = settings_for(tmp_path, port)
        changed = settings.destinations[0].model_copy(update={"ae_title": "SCP"})
        settings = settings.model_copy(update={"destinations": (changed,)})
        store = commit(settings, built_report())
        with lanes(settings, store):
            until(
                lambda: store.deliveries(limit=1)[0].attempts >= 1 and store.deliveries(limit=1)[0].detail, PATIENCE_S
            )
    assert store.deliveries(limit=1)[0].state in (DeliveryState.PENDING, DeliveryState.SENDING)
    with running_storescp(tmp_path / "scp2", "SCP") as port:
        there = settings.destinations[0].model_copy(update={"port": port})
        settings = settings.model_copy(update={"destinations": (there,)})
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.DELIVERED
        assert len(list((tmp_path / "scp2").iterdir())) == 3
    store.close()


def test_dcmqrscp_gets_results_and_a_query_finds_them(world: World, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, world.dcmqrscp_port, commitment="c-find")
    delivery = _deliver(settings, ae_title=DCMQRSCP)
    assert delivery.state is DeliveryState.DELIVERED
    assert re.fullmatch(r"found(, without segmentation)?", delivery.outcome or "")
    keys = ("-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={STUDY_UID}", "-k", "Modality")
    asked = _tool("findscu", "-S", *keys, "-aec", DCMQRSCP, LOOPBACK, str(world.dcmqrscp_port))
    assert "[SR]" in asked.stdout + asked.stderr


def test_orthanc_commits_to_what_we_sent(tmp_path: Path) -> None:
    """Orthanc answers the request on its association and reports on one of its own, to our receiver's port."""
    port = a_free_port()
    modalities = {"osteo": {"AET": CALLED, "Host": LOOPBACK, "Port": port}}
    with running_orthanc(tmp_path / "orthanc", a_free_port(), a_free_port(), modalities) as orthanc:
        settings = settings_for(tmp_path, orthanc.dicom_port, commitment="storage-commitment")
        ours = settings.receiver.model_copy(update={"ae_title": CALLED, "port": port, "minimum_free_bytes": 0})
        destination = settings.destinations[0].model_copy(update={"ae_title": AE_TITLE})
        settings = settings.model_copy(update={"receiver": ours, "destinations": (destination,)})
        receiver = Receiver(settings)
        receiver.start()
        try:
            delivery = _deliver(settings)
        finally:
            receiver.stop(grace_seconds=0.0)
    assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "committed")
    assert {entry.proof for entry in delivery.objects if entry.status == "0x0000"} == {"committed"}
