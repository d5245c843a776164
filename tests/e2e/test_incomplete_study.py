"""A study that was started without all its images says so in every form of its report, until the late one comes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest

from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.domain.announcement import AnnouncedInstance, Announcement, AnnouncementKind, StepState
from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.records import ReportKind, ReportObject
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from osteo_daemon.settings import load_settings
from tests.e2e.node import destination
from tests.fakes import CALLING, LOOPBACK
from tests.integration.screening import Bench, running_screener

WORDS = "the study was not complete when it was screened"
DESTINATIONS = (
    destination("pacs", "PACS", 104)
    + destination("old", "OLD", 104)
    + 'sr_class = "basic-text"\n'
    + f'[[destinations]]\nname = "his"\nkind = "hl7"\nhost = "{LOOPBACK}"\nport = 104\n'
    + f'[[destinations]]\nname = "fhir"\nkind = "fhir"\nurl = "http://{LOOPBACK}:104/r4"\n'
)


def announced(bench: Bench, files: list[Path]) -> str:
    """A performed procedure step that lists all files; gives the study's UID."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    study = str(headers[0].StudyInstanceUID)
    listed = tuple(
        AnnouncedInstance(str(header.SeriesInstanceUID), str(header.SOPClassUID), str(header.SOPInstanceUID))
        for header in headers
    )
    step = Announcement("9", AnnouncementKind.MPPS, CALLING, StepState.COMPLETED, frozenset({study}), listed)
    bench.store.announce(step)
    return study


def swept(bench: Bench, ahead_seconds: float) -> list[Lacks | None]:
    """What the studies lack that one sweep so long from now lets go on."""
    ahead = timedelta(seconds=ahead_seconds)
    sweep = CompletenessSweep(load_settings(bench.config), bench.store, clock=lambda: datetime.now(UTC) + ahead)
    try:
        return [entry.verdict.lacks for entry in sweep.run()]
    finally:
        sweep.close()


def texts(entries: list[ReportObject]) -> dict[str, str]:
    """The words of every form that has some, by form."""
    found = {}
    for entry in entries:
        if entry.kind is ReportKind.SR:
            elements = pydicom.dcmread(entry.path).iterall()
            found[entry.variant] = " ".join(str(element.value) for element in elements if element.VR != "SQ")
        elif entry.kind in (ReportKind.HL7, ReportKind.FHIR):
            found[entry.variant] = entry.path.read_text(encoding="utf-8")
    return found


@pytest.mark.slow
def test_the_report_says_that_images_are_missing_until_they_come(tmp_path: Path) -> None:
    patient = VirtualPatient(seed=11, age_years=70, sex="F", density_mg_cm3=90.0)
    rendered = render_study(patient, coarse_scanner(5.0), top="L3", bottom="S1")
    files = write_series(rendered, tmp_path / "ct", SeriesIdentity())
    with running_screener(tmp_path, extra=DESTINATIONS, network_enabled=False) as bench:
        study = announced(bench, files)
        bench.receive(files[:-1], complete=False)
        assert swept(bench, 890) == []
        assert swept(bench, 910) == [Lacks.IMAGES]
        bench.reaches(study, JobState.REPORTED, 200)
        first = bench.store.report_objects(study, revision=1)
        assert {"comprehensive-3d", "comprehensive", "enhanced", "basic-text", "his", "fhir"} <= texts(first).keys()
        assert all(WORDS in text for text in texts(first).values())
        document = bench.store.result(study)
        assert document is not None
        assert document["quality_flags"][0] == {"code": "study_incomplete", "severity": "caution"}
        assert document["index_hu"] is not None  # the number stands
        bench.receive(files[-1:], complete=False)
        assert swept(bench, 0) == [None]  # everything that was listed is here
        bench.reaches(study, JobState.REPORTED, 200)
        second = bench.store.report_objects(study, revision=2)
        assert texts(second).keys() == texts(first).keys()
        assert not any(WORDS in text for text in texts(second).values())
        pictures = [
            pydicom.dcmread(entry.path).pixel_array for entry in (*first, *second) if entry.kind is ReportKind.SC
        ]
        assert not np.array_equal(pictures[0], pictures[1])
