"""The screener as a process: the second study of a patient shows the first one's value, in the language of the site."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest

from osteo_daemon.dicom.report_reader import parse_report, read_report
from osteo_daemon.dicom.report_text import format_report
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.trend import patient_key
from osteo_daemon.jobs.records import ReportKind
from osteo_daemon.patient_link import LINK_FILE
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from tests.integration.screening import Bench, running_screener

BIRTH_DATE = "19560101"


@pytest.mark.slow
def test_earlier_studies_of_one_patient_and_of_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEO_SITE__LANGUAGE", "de")
    patient = VirtualPatient(seed=11, age_years=70, sex="F", density_mg_cm3=90.0)
    rendered = render_study(patient, coarse_scanner(5.0), top="L3", bottom="S1")

    def screened(bench: Bench, salt: str, patient_id: str, study_date: str) -> tuple[str, np.ndarray]:
        identity = SeriesIdentity(patient_id=patient_id, study_date=study_date, salt=salt)
        files = write_series(rendered, tmp_path / salt, identity)
        for path in files:
            dataset = pydicom.dcmread(path)
            dataset.PatientBirthDate = BIRTH_DATE
            dataset.save_as(path)
        study = bench.receive(files)
        bench.reaches(study, JobState.REPORTED, 200)
        objects = {entry.kind: entry.path for entry in bench.store.report_objects(study)}
        report = read_report(objects[ReportKind.SR])
        assert parse_report(report).vertebrae
        assert "Knochendichte" in format_report(report)
        return study, pydicom.dcmread(objects[ReportKind.SC]).pixel_array

    with running_screener(tmp_path, network_enabled=False) as bench:
        _, first = screened(bench, "first", "P-1", "20260105")
        _, second = screened(bench, "second", "P-1", "20260205")
        _, other = screened(bench, "other", "P-2", "20260105")
        key = patient_key((tmp_path / "state" / LINK_FILE).read_bytes(), "P-1", "", BIRTH_DATE)
        assert key is not None
        values = bench.store.earlier_values(key, date(2027, 1, 1))
        assert [value.study_date for value in values] == [date(2026, 1, 5), date(2026, 2, 5)]
        assert values[0].index_hu == values[1].index_hu
        # the same scan: the pictures differ by the trend alone
        assert np.array_equal(first, other)
        assert not np.array_equal(first, second)
        assert np.array_equal(first[:, :560], second[:, :560])
        assert "P-1" not in bench.log
        assert key not in bench.log
