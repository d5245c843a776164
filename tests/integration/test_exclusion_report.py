"""Reports of studies that were not screened: every form, for every kind of reason, passes the validators."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from osteo_daemon.dicom.report_reader import parse_report
from osteo_daemon.dicom.report_text import format_report
from osteo_daemon.domain.findings import Outcome
from osteo_daemon.inference.screening import StudyScreener
from osteo_daemon.reporting import build_report
from osteo_daemon.settings import ScreenerSettings, Settings
from tests import validators
from tests.ct_series import column, write_slices

FORMS = ("comprehensive-3d", "comprehensive", "enhanced", "basic-text")


@pytest.fixture(scope="module")
def screener() -> StudyScreener:
    return StudyScreener.load(Settings(screener=ScreenerSettings(network_enabled=False)))


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"ImagePositionPatient": None}, "no_ct_series"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "derived_series"),
        ({"PatientBirthDate": "20000101"}, "age_below_limit"),
        ({"ImagePositionPatient": None, "FrameOfReferenceUID": None, "PatientName": None}, "no_ct_series"),
    ],
)
def test_every_form_of_the_reason(
    screener: StudyScreener, tmp_path: Path, attributes: dict[str, Any], code: str
) -> None:
    files = write_slices(tmp_path / "ct", np.zeros((50, 16, 16), np.int16), column(50, 2.5), **attributes)
    screening = screener.screen(files)
    report = build_report(screening, Settings(), datetime(2026, 11, 22, tzinfo=UTC), variants=FORMS)
    assert [built.kind for built in report.objects] == ["sr"] * len(FORMS)
    assert report.picture_png is None
    for built in report.objects:
        path = tmp_path / f"{built.variant}.dcm"
        path.write_bytes(built.data)
        assert validators.dciodvfy(path) == []
        assert validators.dsrdump(path) == []
        dataset = pydicom.dcmread(path)
        result = parse_report(dataset)
        assert result.outcome is Outcome.EXCLUDED
        assert result.exclusion == screening.result.exclusion
        assert result.exclusion is not None
        assert result.exclusion.code == code
        assert result.exclusion.reason in format_report(dataset)
        assert "0040A300" not in dataset.to_json()  # Measured Value Sequence: no number anywhere
