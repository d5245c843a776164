"""`osteo screen` as a user calls it, with good and bad folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from osteo_daemon.domain.findings import ScreeningResult
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow]


def _osteo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "osteo_daemon.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.real_ct
def test_real_folder(acrin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _osteo("screen", str(acrin), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        "result.json",
        "manifest.json",
        "report.dcm",
        "segmentation.dcm",
        "picture.dcm",
        "picture.png",
    }
    result = ScreeningResult.from_json(json.loads((out / "result.json").read_text()))
    assert result.category == "not_flagged"
    assert {model.bundle for model in result.models} == {"spine-localizer", "osteo-moe"}
    shown = _osteo("report", "show", str(out / "report.dcm"))
    assert shown.returncode == 0
    assert "L1" in shown.stdout
    assert "does not rule out low bone density" in shown.stdout


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cptac_pda_C3L-00189_lungbases", "unsuitable_kernel"),
        ("dcm_qa_ct_ge_tilt_head", "uneven_geometry"),
        ("totalsegmentator_dicom_j2k", "insufficient_coverage"),
    ],
)
def test_unsuitable_study_gets_a_reason_and_no_number(real_series, tmp_path: Path, name: str, code: str) -> None:
    done = _osteo("screen", str(real_series(name)), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert _one_line(done).startswith(f"not screened: {code}: ")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["outcome"], result["exclusion"]["code"], result["category"]) == ("excluded", code, None)
    assert result["vertebrae"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "manifest.json"}


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = _osteo("screen", str(tmp_path / "empty"), "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "holds no file" in _one_line(done)
    assert not (tmp_path / "out").exists()


def test_text_file_named_dcm(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.dcm").write_text("no DICOM here")
    done = _osteo("screen", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "no readable DICOM object: note.dcm has no DICOM preamble" in _one_line(done)


@pytest.mark.real_ct
def test_truncated_slice(acrin: Path, tmp_path: Path) -> None:
    shutil.copytree(acrin, tmp_path / "in")
    victim = sorted((tmp_path / "in").iterdir())[50]
    victim.write_bytes(victim.read_bytes()[:-1000])
    done = _osteo("screen", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "pixel data" in _one_line(done)


@pytest.mark.real_ct
def test_slice_missing_in_the_chest_is_flagged_and_screened(acrin: Path, tmp_path: Path) -> None:
    shutil.copytree(acrin, tmp_path / "in")
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in (tmp_path / "in").iterdir()}
    ordered = sorted(headers, key=lambda path: float(headers[path].ImagePositionPatient[2]))
    ordered[-10].unlink()
    out = tmp_path / "out"
    done = _osteo("screen", str(tmp_path / "in"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert "slice_gap" in {flag["code"] for flag in result["quality_flags"]}
    assert {"L1", "L2", "L3", "L4"} <= {vertebra["level"] for vertebra in result["vertebrae"]}


@pytest.mark.real_ct
def test_slice_missing_in_the_lumbar_spine_bridges_nothing(acrin: Path, tmp_path: Path) -> None:
    shutil.copytree(acrin, tmp_path / "in")
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in (tmp_path / "in").iterdir()}
    ordered = sorted(headers, key=lambda path: float(headers[path].ImagePositionPatient[2]))
    ordered[55].unlink()  # between L2 and L3
    out = tmp_path / "out"
    done = _osteo("screen", str(tmp_path / "in"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert "slice_gap" in {flag["code"] for flag in result["quality_flags"]} or result["outcome"] == "excluded"
    gap_z = float(headers[ordered[55]].ImagePositionPatient[2])
    side = {vertebra["centre_lps_mm"][2] > gap_z for vertebra in result["vertebrae"]}
    assert len(side) <= 1  # vertebrae of one stack only
