"""The main job against the real thing: DCMTK sends a real CT, Orthanc gets the report."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import Comprehensive3DSRStorage, SecondaryCaptureImageStorage, SegmentationStorage

from osteo_daemon.dicom.report_reader import parse_report
from osteo_daemon.domain.job import JobState
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import ct_slices, read_headers
from tests.e2e.node import destination, running_node
from tests.fakes import CountingScp, a_free_port, storescu, until
from tests.orthanc import AE_TITLE, running_orthanc
from tests.validators import dciodvfy, dsrdump, measured_groups, pixelmed

pytestmark = [pytest.mark.real_ct, pytest.mark.slow, pytest.mark.timeout(600)]

# Reference of one reader (the data's readme): level, (slice from caudal, row, column), HU
REFERENCE = {
    "T12": ((75, 316, 241), 177),
    "L1": ((67, 313, 241), 178),
    "L2": ((59, 309, 241), 177),
    "L3": ((51, 307, 241), 159),
    "L4": ((42, 306, 241), 150),
    "L5": ((34, 310, 241), 167),
}
HU_TOLERANCE = 15
CENTRE_TOLERANCE_MM = 10


def _reference_centres_lps(folder: Path) -> dict[str, np.ndarray]:
    headers, _ = read_headers(sorted(folder.iterdir()))
    (slices,) = ct_slices(headers).values()
    affine = split_stacks(slices)[0].affine
    return {level: affine[:3, :3] @ np.array(index) + affine[:3, 3] for level, (index, _) in REFERENCE.items()}


def test_report_of_a_real_ct_arrives_in_orthanc(acrin: Path, tmp_path: Path) -> None:
    files = sorted(acrin.iterdir())
    study_uid = pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID
    with (
        running_orthanc(tmp_path / "orthanc", a_free_port(), a_free_port()) as orthanc,
        running_node(tmp_path, destination("orthanc", AE_TITLE, orthanc.dicom_port)) as node,
    ):
        sent = storescu(node.port, files)
        assert sent.returncode == 0, sent.stderr
        node.wait_for_state(JobState.DELIVERED, 180)
        (study,) = orthanc.find("Study", StudyInstanceUID=study_uid)
        instances = orthanc.get(f"/studies/{study}/instances")
        kinds = Counter(_download(orthanc, entry["ID"], tmp_path).SOPClassUID for entry in instances)
        assert kinds == {Comprehensive3DSRStorage: 1, SegmentationStorage: 1, SecondaryCaptureImageStorage: 1}
        for path in tmp_path.glob("fetched-*.dcm"):
            assert not dciodvfy(path)
            dataset = pydicom.dcmread(path)
            if dataset.SOPClassUID == Comprehensive3DSRStorage:
                report, report_path = dataset, path
        log = node.log
        shown = node.study(study_uid)
    assert not dsrdump(report_path)
    assert not pixelmed([report_path])[report_path]
    assert len(measured_groups(report_path, tmp_path)) >= len(REFERENCE)
    source = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert report.StudyInstanceUID == study_uid
    assert report.PatientID == source.PatientID
    # PS3.5 6.2.1.1: trailing delimiters do not change a name
    assert str(report.PatientName).rstrip("^") == str(source.PatientName).rstrip("^")
    assert str(source.PatientName) not in log
    assert str(source.PatientID) not in log

    result = parse_report(report)
    centres = _reference_centres_lps(acrin)
    found = {vertebra.level.value: vertebra for vertebra in result.vertebrae}
    assert {"T12", "L1", "L2", "L3", "L4", "L5"} <= found.keys()
    for level, (_, hu) in REFERENCE.items():
        vertebra = found[level]
        assert vertebra.attenuation_hu is not None
        assert vertebra.attenuation_hu.mean == pytest.approx(hu, abs=HU_TOLERANCE), level
        assert np.linalg.norm(np.array(vertebra.centre_lps_mm) - centres[level]) < CENTRE_TOLERANCE_MM, level
        assert vertebra.network is not None
        assert vertebra.network.status == "investigational"
    assert result.category == "not_flagged"
    assert not [flag for flag in result.quality_flags if flag.severity == "blocking"]
    assert [event["to_state"] for event in shown["events"] if event["to_state"]][-1] == "DELIVERED"


def _download(orthanc, identifier: str, folder: Path) -> pydicom.Dataset:
    path = folder / f"fetched-{identifier}.dcm"
    path.write_bytes(orthanc.read(f"/instances/{identifier}/file"))
    return pydicom.dcmread(path, stop_before_pixels=True)


def test_every_role_killed_once_still_one_report(acrin: Path, tmp_path: Path) -> None:
    files = sorted(acrin.iterdir())
    reached = []

    def slow_first(uid: str, count: int) -> int:
        # the first object hangs, so that the deliverer can be killed between the peer's receipt and its answer
        reached.append(uid)
        if len(reached) == 1:
            time.sleep(3)
        return 0x0000

    with CountingScp(answer=slow_first) as pacs, running_node(tmp_path, destination("pacs", "PACS", pacs.port)) as node:
        sender = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.send", str(node.port), str(tmp_path / "ledger"), *map(str, files)],
        )
        ledger = tmp_path / "ledger"
        until(lambda: ledger.exists() and len(ledger.read_text().split()) > 20, 60)
        node.kill("receiver")
        assert sender.wait(120) == 0  # it sends again what was not acknowledged
        node.kill("scheduler")
        node.wait_for_state(JobState.SCREENING, 60)
        node.kill("screener")
        until(lambda: reached, 180)
        node.kill("deliverer")
        node.wait_for_state(JobState.DELIVERED, 120)
        time.sleep(2)  # a second report would come now
        (row,) = node.studies()
        shown = node.study(row["study_instance_uid"])
    acknowledged = set(ledger.read_text().split())
    assert row["instances"] == len(acknowledged) == len(files)
    by_class: dict[str, set[str]] = {}
    for sop_class, uid, _ in pacs.received:
        by_class.setdefault(sop_class, set()).add(uid)
    assert {sop_class: len(uids) for sop_class, uids in by_class.items()} == {
        Comprehensive3DSRStorage: 1,
        SegmentationStorage: 1,
        SecondaryCaptureImageStorage: 1,
    }
    assert all(len(digests) == 1 for digests in pacs.digests.values())
    assert len(pacs.received) > len(by_class)  # the object that hung did come twice
    # committed once: one segmentation, one picture, and each form of the report that a destination may need
    kinds = Counter(entry["kind"] for entry in shown["report_objects"])
    assert (kinds["seg"], kinds["sc"]) == (1, 1)
    assert set(pacs.digests) <= {entry["sop_instance_uid"] for entry in shown["report_objects"]}
