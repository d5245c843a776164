"""A virtual patient sent as multi-frame CT: what is measured is what is measured in the single images."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import EnhancedCTImageStorage, JPEG2000Lossless

from osteo_daemon.dicom.report_objects import ReportRequest, build_report_objects
from osteo_daemon.dicom.report_reader import parse_report
from osteo_daemon.dicom.report_source import ReportSource
from osteo_daemon.dicom.reported_values import as_reported
from osteo_daemon.domain.findings import Outcome
from osteo_daemon.inference.screening import StudyScreener
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from osteo_daemon.settings import Settings, SiteSettings
from tests import validators
from tests.enhanced_ct import write_enhanced

pytestmark = pytest.mark.timeout(600)

HU_TOLERANCE = 0.5


def test_frames_are_screened_like_single_images(tmp_path: Path) -> None:
    screener = StudyScreener.load(Settings(screener={"network_enabled": False}))  # type: ignore[arg-type]
    patient = VirtualPatient(seed=8_100_001, age_years=66, density_mg_cm3=115.0)
    study = render_study(patient, coarse_scanner(3.0, noise_hu=12.0, seed=1), top="T12")
    files = write_series(study, tmp_path / "single")
    path = tmp_path / "frames.dcm"
    enhanced = write_enhanced(path, files, transfer_syntax_uid=JPEG2000Lossless)

    single, multiple = screener.screen(files), screener.screen([path])
    assert single.result.outcome is Outcome.REPORTED
    assert len(single.result.vertebrae) >= 5
    assert [finding.level for finding in multiple.result.vertebrae] == [
        finding.level for finding in single.result.vertebrae
    ]
    for found, expected in zip(multiple.result.vertebrae, single.result.vertebrae, strict=True):
        assert (found.attenuation_hu is None) == (expected.attenuation_hu is None)
        if found.attenuation_hu is not None and expected.attenuation_hu is not None:
            assert found.attenuation_hu.mean == pytest.approx(expected.attenuation_hu.mean, abs=HU_TOLERANCE)
        assert found.centre_lps_mm == pytest.approx(expected.centre_lps_mm, abs=0.5)
    assert multiple.result.category == single.result.category
    assert multiple.result.quality_flags == single.result.quality_flags

    request = ReportRequest(
        result=dataclasses.replace(multiple.result, durations_s={}),
        source=ReportSource(multiple.headers),
        volume=multiple.volume,
        regions=multiple.measurements,
        site=SiteSettings(institution="Test Hospital"),
        software_version="0.1.0",
        created=datetime(2026, 11, 22, tzinfo=UTC),
    )
    report = build_report_objects(request, ("comprehensive-3d+seg",), frozenset({"seg", "sr", "sc", "kos", "pdf"}))
    assert {built.kind for built in report.objects} == {"seg", "sr", "sc", "kos", "pdf"}
    for built in report.objects:
        out = tmp_path / f"{built.kind}.dcm"
        out.write_bytes(built.data)
        assert validators.dciodvfy(out) == []
        dataset = pydicom.dcmread(BytesIO(built.data))
        assert dataset.StudyInstanceUID == enhanced.StudyInstanceUID
        if built.kind == "sr":
            assert parse_report(dataset) == as_reported(request.result)
        if built.kind == "seg":
            source = dataset.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
            assert source.ReferencedSOPClassUID == EnhancedCTImageStorage
            assert source.ReferencedSOPInstanceUID == enhanced.SOPInstanceUID
            assert 1 <= int(source.ReferencedFrameNumber) <= len(files)
