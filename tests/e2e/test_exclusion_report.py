"""A study that is not screened: who wants to know gets a short report with the reason and no number, nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import Comprehensive3DSRStorage

from osteo_daemon.dicom.report_reader import parse_report
from osteo_daemon.domain.findings import Exclusion, Outcome
from osteo_daemon.domain.job import JobState
from tests import validators
from tests.conftest import ROOT
from tests.ct_series import column, write_slices
from tests.e2e.node import destination, running_node
from tests.fakes import CountingScp, a_free_port, storescu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REASON = "edge-enhancing reconstruction kernel LUNG; a soft-tissue kernel is needed"


def _value_types(item: pydicom.Dataset) -> set[str]:
    return {str(item.get("ValueType"))}.union(*(_value_types(child) for child in item.get("ContentSequence", ())))


def test_the_pacs_that_wants_to_know_is_told_why(tmp_path: Path) -> None:
    voxels = np.zeros((50, 16, 16), dtype=np.int16)
    sharp = write_slices(tmp_path / "sharp", voxels, column(50, 2.5), ConvolutionKernel="LUNG")
    nobody = destination("quiet", "QUIET", a_free_port())  # nothing listens there: a delivery to it would stay
    with CountingScp() as pacs:
        wants = destination("pacs", "PACS", pacs.port) + 'commitment = "none"\naccept_unproven = true\n'
        with running_node(tmp_path, wants + "report_exclusions = true\n" + nobody) as node:
            assert storescu(node.port, sharp).returncode == 0
            node.wait_for_state(JobState.DELIVERED, 240)
            (row,) = node.studies()
            shown = node.study(row["study_instance_uid"])
    assert (row["state"], row["code"], row["detail"]) == ("DELIVERED", "unsuitable_kernel", REASON)
    states = [event["to_state"] for event in shown["events"] if event["to_state"]]
    assert states[-4:] == ["SCREENING", "EXCLUDED", "REPORTED", "DELIVERED"]

    ((sop_class, uid, _),) = pacs.received
    assert sop_class == Comprehensive3DSRStorage
    report = pacs.data_sets[uid]
    path = tmp_path / "report.dcm"
    report.save_as(path, enforce_file_format=True)
    assert validators.dciodvfy(path) == []
    assert validators.dsrdump(path) == []
    # PixelMed sees a report of this shape in tests/integration/test_report_validators.py
    result = parse_report(report)
    assert (result.outcome, result.exclusion) == (Outcome.EXCLUDED, Exclusion("unsuitable_kernel", REASON))
    assert (result.vertebrae, result.category) == ((), None)
    assert "NUM" not in _value_types(report)
    assert "SCOORD" not in _value_types(report)
    text = subprocess.run(
        [sys.executable, "-m", "osteo_daemon.cli", "report", "show", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    assert f"Not screened for low bone density: {REASON}" in text
    assert "This says nothing about bone density" in text
    assert "normal" not in text.lower()
