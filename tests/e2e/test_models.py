"""The screener as a process: a candidate in the shadow is compared and never reported, then promoted, rolled back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.jobs.records import ReportKind
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from tests.candidates import NETWORK, full_candidate, tiny_candidate
from tests.fakes import until
from tests.integration.screening import running_screener

VERSION = "7.7.7+here.refit.0a1b2c3d"
SHIFT = 0.05
DESTINATIONS = """
[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = 1
[[destinations]]
name = "his"
kind = "hl7"
host = "127.0.0.1"
port = 1
[[destinations]]
name = "fhir"
kind = "fhir"
url = "http://127.0.0.1:1/fhir"
"""


@pytest.mark.slow
def test_a_candidate_in_the_shadow_is_never_reported_until_it_is_promoted(tmp_path: Path) -> None:
    rendered = render_study(VirtualPatient(seed=11, age_years=70, sex="F"), coarse_scanner(5.0), top="L3", bottom="S1")
    shipped, candidate = find_bundle(NETWORK), full_candidate(tmp_path / "candidate", VERSION, SHIFT)
    broken = tiny_candidate(tmp_path / "broken", "0.0.1")
    names = {VERSION.encode(), candidate.sha256.encode(), b"0.0.1"}

    with running_screener(tmp_path, extra=DESTINATIONS) as bench:

        def osteo(*arguments: str) -> str:
            done = CliRunner().invoke(cli, ["models", *arguments, "--config", str(bench.config)])
            assert done.exit_code == 0, done.output + repr(done.exception)
            return done.output

        def screened(salt: str) -> str:
            identity = SeriesIdentity(patient_id=salt, study_date="20260105", salt=salt)
            study = bench.receive(write_series(rendered, tmp_path / salt, identity))
            bench.reaches(study, JobState.REPORTED, 240)
            return study

        def used(study: str) -> list[str]:
            result = bench.store.result(study)
            assert result is not None
            return [model["sha256"] for model in result["models"]]

        for folder in (candidate.path, broken.path):
            osteo("register", str(folder), "--reason", "a test")
        # one that no network can be built from: the study is reported as ever
        osteo("shadow", "0.0.1", "--reason", "a test")
        alone = screened("broken")
        until(lambda: "shadow_refused" in bench.log, 30)
        osteo("shadow", VERSION, "--reason", "a test")
        beside = screened("beside")
        (row,) = until(lambda: bench.store.shadows(candidate.sha256), 60)
        assert (row.job_id, row.error, row.deployed_sha256) == (bench.job(beside).job_id, None, shipped.sha256)
        pairs = [(level["bmd_g_cm2"], level["deployed_bmd_g_cm2"]) for level in row.levels.values()]
        differences = [said - now for said, now in pairs if said is not None and now is not None]
        assert differences
        # a report gives its BMD to 0.001 g/cm2
        assert differences == pytest.approx([SHIFT] * len(differences), abs=0.00051)
        assert json.loads(osteo("compare", VERSION, "--json"))["shadow"]["studies"] == 1

        for study in (alone, beside):
            assert used(study)[-1] == shipped.sha256
            assert not any(name.decode() in json.dumps(bench.store.result(study)) for name in names)
            for entry in bench.store.report_objects(study):
                content = entry.path.read_bytes()
                assert not any(name in content for name in names), entry.kind
        kinds = {entry.kind for entry in bench.store.report_objects(beside)}
        assert {ReportKind.SR, ReportKind.HL7, ReportKind.FHIR} <= kinds

        osteo("promote", VERSION, "--reason", "the verdict")
        promoted = screened("promoted")
        assert used(promoted)[-1] == candidate.sha256
        # in each of its forms
        reports = [entry.path for entry in bench.store.report_objects(promoted) if entry.kind is ReportKind.SR]
        assert reports
        for path in reports:
            assert VERSION.encode() in path.read_bytes()
        osteo("rollback", "--reason", "the story")
        assert used(screened("back"))[-1] == shipped.sha256
        assert len(bench.store.shadows(candidate.sha256)) == 1  # it was deployed or gone: no more shadow
        assert bench.log.count("screener_ready") == 1  # one process through all of it
        assert "screening_crashed" not in bench.log
