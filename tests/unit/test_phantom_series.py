"""A phantom study as DICOM files."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from tests.conftest import require_command

PATIENT = VirtualPatient(seed=21, age_years=70, sex="M")


@pytest.fixture(scope="module")
def study() -> PhantomStudy:
    scanner = coarse_scanner(kvp=100.0, phase="portal", padding_hu=-2000.0)
    return render_study(PATIENT, scanner, top="L3", bottom="L3")


def test_pixels_and_geometry_come_back(study: PhantomStudy, tmp_path: Path) -> None:
    paths = write_series(study, tmp_path)
    images = [pydicom.dcmread(path) for path in paths]
    assert [int(image.InstanceNumber) for image in images] == list(range(1, len(images) + 1))
    images.sort(key=lambda image: float(image.ImagePositionPatient[2]))
    for index, image in enumerate(images):
        hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        assert np.array_equal(hu, study.voxels[index])
        corner = study.affine @ [index, 0, 0, 1]
        assert np.allclose([float(v) for v in image.ImagePositionPatient], corner[:3], atol=1e-4)
        assert image.PixelPaddingValue + int(image.RescaleIntercept) == -2000
    first = images[0]
    assert [float(v) for v in first.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
    assert list(first.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert (first.PatientAge, first.PatientSex, first.KVP, first.ConvolutionKernel) == ("070Y", "M", 100, "SOFT")
    assert first.Manufacturer == "osteo_daemon phantom"
    assert str(first.PatientName).startswith("Phantom^")
    assert first.ContrastBolusAgent == "IOHEXOL"
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert all(str(image.SOPInstanceUID).startswith("2.25.") and len(image.SOPInstanceUID) <= 64 for image in images)
    assert len({image.SeriesInstanceUID for image in images}) == 1


def test_the_same_study_gives_the_same_bytes(study: PhantomStudy, tmp_path: Path) -> None:
    one = [path.read_bytes() for path in write_series(study, tmp_path / "one")]
    two = [path.read_bytes() for path in write_series(study, tmp_path / "two")]
    assert one == two


def test_uids_follow_patient_scanner_and_salt(study: PhantomStudy, tmp_path: Path) -> None:
    def uids(which: PhantomStudy, identity: SeriesIdentity | None, name: str) -> tuple[str, str, str]:
        image = pydicom.dcmread(write_series(which, tmp_path / name, identity)[0], stop_before_pixels=True)
        return str(image.StudyInstanceUID), str(image.SeriesInstanceUID), str(image.SOPInstanceUID)

    plain = uids(study, None, "plain")
    salted = uids(study, SeriesIdentity(salt="again"), "salted")
    other = uids(replace(study, patient=replace(PATIENT, seed=22)), None, "other")
    second = uids(study, SeriesIdentity(series_number=3), "second")
    assert len({plain[0], salted[0], other[0]}) == 3
    assert second[0] == plain[0]
    assert second[1] != plain[1]
    assert len({plain[2], salted[2], other[2], second[2]}) == 4


def test_dciodvfy_finds_nothing(study: PhantomStudy, tmp_path: Path) -> None:
    dciodvfy = require_command("dciodvfy")
    for number, identity in enumerate((None, SeriesIdentity(contrast_agent=False, patient_name="Phantom^Other"))):
        path = write_series(study, tmp_path / str(number), identity)[2]
        check = subprocess.run([dciodvfy, "-new", str(path)], capture_output=True, text=True, check=False)
        complaints = [line for line in check.stderr.splitlines() if line.startswith(("Error", "Warning"))]
        assert check.returncode == 0
        assert complaints == []
