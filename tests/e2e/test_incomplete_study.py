"""A study that was started without all its images or series says so in every form of its report, until they come."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import Comprehensive3DSRStorage, generate_uid

from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.domain.announcement import AnnouncedInstance, Announcement, AnnouncementKind, StepState
from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.jobs.records import ReportKind, ReportObject
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from osteo_daemon.settings import load_settings
from tests.deliveries import ended, lanes
from tests.e2e.node import destination
from tests.fakes import CALLING, LOOPBACK, CountingScp, until
from tests.integration.screening import Bench, running_screener

WORDS = "the study was not complete when it was screened"
SERIES_WORDS = "series that the sender lists did not arrive"


def destinations(port: int) -> str:
    """A PACS on this port, and one for every other form, of which nobody is there."""
    return (
        destination("pacs", "PACS", port)
        + 'commitment = "none"\n'
        + destination("old", "OLD", 104)
        + 'sr_class = "basic-text"\n'
        + f'[[destinations]]\nname = "his"\nkind = "hl7"\nhost = "{LOOPBACK}"\nport = 104\n'
        + f'[[destinations]]\nname = "fhir"\nkind = "fhir"\nurl = "http://{LOOPBACK}:104/r4"\n'
    )


def announced(bench: Bench, files: list[Path], step_uid: str = "9") -> str:
    """A performed procedure step that lists all files; gives the study's UID."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    study = str(headers[0].StudyInstanceUID)
    listed = tuple(
        AnnouncedInstance(str(header.SeriesInstanceUID), str(header.SOPClassUID), str(header.SOPInstanceUID))
        for header in headers
    )
    step = Announcement(step_uid, AnnouncementKind.MPPS, CALLING, StepState.COMPLETED, frozenset({study}), listed)
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


def forms(entries: list[ReportObject]) -> set[str]:
    """Forms with words, whoever they are for: a PACS that has a report before gets one that refers to it."""
    return {variant.partition("@")[0] for variant in texts(entries)}


def another_series(files: list[Path], folder: Path) -> list[Path]:
    """The same images once more, as a series of its own."""
    folder.mkdir()
    series, copies = generate_uid(), []
    for path in files:
        image = pydicom.dcmread(path)
        image.SeriesInstanceUID, image.SOPInstanceUID = series, generate_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.save_as(folder / path.name)
        copies.append(folder / path.name)
    return copies


def told(pacs: CountingScp) -> str:
    """The words of the newest structured report that the PACS has."""
    reports = [uid for sop_class, uid, _digest in pacs.received if sop_class == Comprehensive3DSRStorage]
    return " ".join(str(element.value) for element in pacs.data_sets[reports[-1]].iterall() if element.VR != "SQ")


@pytest.mark.slow
def test_the_report_says_what_is_missing_until_it_comes(tmp_path: Path) -> None:
    patient = VirtualPatient(seed=11, age_years=70, sex="F", density_mg_cm3=90.0)
    rendered = render_study(patient, coarse_scanner(5.0), top="L3", bottom="S1")
    files = write_series(rendered, tmp_path / "ct", SeriesIdentity())
    more = another_series(files[:2], tmp_path / "more")
    with (
        CountingScp() as pacs,
        running_screener(tmp_path, extra=destinations(pacs.port), network_enabled=False) as bench,
    ):
        settings = load_settings(bench.config)
        settings = settings.model_copy(update={"destinations": settings.destinations[:1]})

        def reported(revision: int) -> list[ReportObject]:
            """The objects of a revision, once the PACS has its own."""
            until(lambda: bench.store.report_objects(study, revision=revision), 200)
            with lanes(settings, bench.store):
                until(
                    lambda: len(bench.store.deliveries(destination="pacs")) == revision and ended(bench.store, "pacs")
                )
            return bench.store.report_objects(study, revision=revision)

        study = announced(bench, files)
        bench.receive(files[:-1], complete=False)
        assert swept(bench, 890) == []
        assert swept(bench, 910) == [Lacks.IMAGES]
        first = reported(1)
        assert {"comprehensive-3d", "comprehensive", "enhanced", "basic-text", "his", "fhir"} <= texts(first).keys()
        assert all(WORDS in text for text in texts(first).values())
        assert WORDS in told(pacs)
        document = bench.store.result(study)
        assert document is not None
        assert document["quality_flags"][0] == {"code": "study_incomplete", "severity": "caution"}
        assert document["index_hu"] is not None  # the number stands
        # the image comes, and now a series is named of which nothing does
        announced(bench, more, "10")
        bench.receive(files[-1:], complete=False)
        assert swept(bench, 290) == []
        assert swept(bench, 310) == [Lacks.SERIES]
        second = reported(2)
        assert forms(second) == forms(first)
        assert all(SERIES_WORDS in text and WORDS not in text for text in texts(second).values())
        assert SERIES_WORDS in told(pacs)
        bench.receive(more, complete=False)
        assert swept(bench, 0) == [None]  # everything that was listed is here
        third = reported(3)
        assert forms(third) == forms(first)
        assert not any(words in text for text in texts(third).values() for words in (WORDS, SERIES_WORDS))
        assert not any(words in told(pacs) for words in (WORDS, SERIES_WORDS))
        pictures = [
            pydicom.dcmread(entry.path).pixel_array
            for entry in (*first, *second, *third)
            if entry.kind is ReportKind.SC
        ]
        assert len(pictures) == 3
        assert not any(np.array_equal(one, pictures[2]) for one in pictures[:2])
