"""Studies of several series of a virtual patient: what is screened, what is not and why; the tags tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage

from osteo_daemon.domain.findings import Outcome
from osteo_daemon.domain.references import CONTRAST_OFFSET_HU
from osteo_daemon.imaging.selection import NotChosen
from osteo_daemon.inference.screening import Screening, StudyScreener
from osteo_daemon.phantom.dicom_series import SeriesIdentity, write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from osteo_daemon.settings import Settings
from tests.ct_series import write_slices

pytestmark = pytest.mark.timeout(600)

STUDY, FRAME = "2.25.8100", "2.25.8101"
PATIENT = VirtualPatient(seed=8_100_000, age_years=66, density_mg_cm3=115.0, hip_prosthesis="left")


@pytest.fixture(scope="module")
def screener() -> StudyScreener:
    return StudyScreener.load(Settings(screener={"network_enabled": False}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def native() -> PhantomStudy:
    return render_study(PATIENT, coarse_scanner(3.0, noise_hu=12.0, seed=1), top="T12")


@pytest.fixture(scope="module")
def portal(native: PhantomStudy) -> PhantomStudy:
    return render_study(PATIENT, replace(native.scanner, phase="portal", seed=2), top="T12")


def _write(folder: Path, study: PhantomStudy, number: int, **attributes: Any) -> str:
    """A series of the study with nothing in its tags about contrast agent; gives its UID."""
    identity = SeriesIdentity(
        series_number=number,
        series_description=f"ABDOMEN {number}",
        study_instance_uid=STUDY,
        contrast_agent=False,
    )
    uid = ""
    for path in write_series(study, folder / str(number), identity):
        dataset = pydicom.dcmread(path)
        dataset.FrameOfReferenceUID = FRAME
        for keyword, value in attributes.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(path, enforce_file_format=True)
        uid = str(dataset.SeriesInstanceUID)
    return uid


def _screen(screener: StudyScreener, folder: Path) -> Screening:
    return screener.screen(sorted(path for path in folder.rglob("*") if path.is_file()))


def _rejected(screening: Screening) -> dict[str, tuple[str, str]]:
    return {
        entry["series_instance_uid"]: (entry["code"], entry["reason"])
        for entry in screening.manifest["rejected_series"]
    }


def test_the_native_series_is_found_by_its_content(
    screener: StudyScreener, native: PhantomStudy, portal: PhantomStudy, tmp_path: Path
) -> None:
    enhanced = _write(tmp_path, portal, 4)
    thick = _write(tmp_path, native, 5, SliceThickness="5")  # the enhanced series is thinner and comes first
    common = {"study_uid": STUDY, "FrameOfReferenceUID": FRAME}
    flat = np.zeros((1, 64, 64), dtype=np.int16)
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "orientation": (1, 0, 0, 0, 0, -1)}
    write_slices(tmp_path / "scout", flat, [(0, 0, 0)], series_uid="2.25.8110", **scout, **common)
    dose = {"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}
    write_slices(tmp_path / "dose", flat, [(0, 0, 0)], series_uid="2.25.8111", **dose, **common)
    screening = _screen(screener, tmp_path)
    assert screening.result.series_instance_uid == thick
    assert screening.manifest["scan_quality"]["contrast_phase"] == "unenhanced"
    codes = {flag.code for flag in screening.result.quality_flags}
    assert "contrast_enhanced" not in codes
    assert "metal_in_view" in codes  # the hip prosthesis, far from the levels that are measured
    assert not [
        flag for vertebra in screening.result.vertebrae for flag in vertebra.quality_flags if flag.code == "implant"
    ]
    rejected = _rejected(screening)
    assert rejected[enhanced] == (NotChosen.NOT_PREFERRED, f"it holds contrast agent; {thick} was screened")
    assert rejected["2.25.8110"][0] == "derived_series"
    assert rejected["2.25.8111"] == ("no_ct_series", "no CT images (Secondary Capture Image Storage)")


def test_without_a_native_series_the_enhanced_one_is_corrected_and_says_so(
    screener: StudyScreener, portal: PhantomStudy, tmp_path: Path
) -> None:
    first = _write(tmp_path, portal, 4)
    second = _write(tmp_path, portal, 5, SliceThickness="5")
    screening = _screen(screener, tmp_path)
    result = screening.result
    assert result.series_instance_uid == first
    assert _rejected(screening) == {
        second: (NotChosen.NOT_PREFERRED, f"it holds contrast agent, too; {first} was screened")
    }
    codes = {flag.code for flag in result.quality_flags}
    assert "contrast_enhanced" in codes
    assert "contrast_uncorrected" not in codes
    assert screening.manifest["scan_quality"]["contrast_phase"] == "portal_venous"
    for vertebra in result.vertebrae:
        measured, corrected = vertebra.attenuation_hu, vertebra.attenuation_hu_corrected
        assert measured is not None
        assert corrected is not None
        assert corrected.factors == {"contrast_portal_venous_hu": CONTRAST_OFFSET_HU["portal_venous"]}
        assert corrected.mean == pytest.approx(measured.mean - 11.2, abs=0.06)
        assert measured.voxel_count
        assert measured.standard_error
    assert result.index is not None
    assert result.index.corrected == pytest.approx(result.index.measured - 11.2, abs=0.11)
    assert result.index.l1_measured is not None


def test_headers_that_say_next_to_nothing(screener: StudyScreener, native: PhantomStudy, tmp_path: Path) -> None:
    missing = (
        *("PatientAge", "PatientBirthDate", "PatientSex", "KVP", "SliceThickness", "ConvolutionKernel", "ImageType"),
        *("SeriesDescription", "StudyDescription", "BodyPartExamined", "PatientPosition", "AcquisitionNumber"),
        *("RescaleType", "SliceLocation", "GantryDetectorTilt", "AccessionNumber", "StudyID", "InstanceNumber"),
    )
    _write(tmp_path, native, 4, **dict.fromkeys(missing))
    result = _screen(screener, tmp_path).result
    assert result.outcome is Outcome.REPORTED
    assert {flag.code for flag in result.quality_flags} >= {
        "age_missing",
        "sex_missing",
        "kvp_unknown",
        "kernel_unknown",
    }
    assert result.category is not None
    assert all(vertebra.attenuation_hu_corrected is None for vertebra in result.vertebrae)


@pytest.mark.parametrize(
    "change", ["twice the matrix", "feet first, from below", "slope of a half", "padding of -3024"]
)
def test_the_same_patient_in_another_form(
    change: str,
    screener: StudyScreener,
    native: PhantomStudy,
    tmp_path: Path,
    reference: Callable[[], dict[str, float]],
) -> None:
    """Forms that change nothing: the same levels, and medians within 5 HU.

    On 3 mm voxels a region holds some 250 of them: which ones lie on its border turns on fractions of a millimetre, and
    the standard error of their mean is about 4 HU.
    """
    edit = {
        "twice the matrix": _larger_matrix,
        "feet first, from below": _turned,
        "slope of a half": _half_slope,
        "padding of -3024": _padded,
    }[change]
    _write(tmp_path, native, 4)
    for path in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        edit(dataset, dataset.pixel_array.astype(np.int32))
        dataset.save_as(path, enforce_file_format=True)
    found = _medians(_screen(screener, tmp_path))
    assert found.keys() == reference().keys()
    for level, median in reference().items():
        assert found[level] == pytest.approx(median, abs=5.0), level


@pytest.fixture(scope="module")
def reference(
    screener: StudyScreener, native: PhantomStudy, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], dict[str, float]]:
    folder = tmp_path_factory.mktemp("as-it-is")
    _write(folder, native, 4)
    medians = _medians(_screen(screener, folder))
    return lambda: medians


def _medians(screening: Screening) -> dict[str, float]:
    return {v.level.value: v.attenuation_hu.median for v in screening.result.vertebrae if v.attenuation_hu}


def _store(dataset: pydicom.Dataset, stored: np.ndarray) -> None:
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = stored.astype("<i2").tobytes()


def _larger_matrix(dataset: pydicom.Dataset, stored: np.ndarray) -> None:
    # every pixel as four: the field of view stays, its first centre moves out by a quarter of a pixel
    rows, columns = (float(value) for value in dataset.PixelSpacing)
    x, y, z = (float(value) for value in dataset.ImagePositionPatient)
    dataset.ImagePositionPatient = [f"{x - columns / 4:.4f}", f"{y - rows / 4:.4f}", f"{z:.4f}"]
    dataset.PixelSpacing = [f"{rows / 2:.4f}", f"{columns / 2:.4f}"]
    _store(dataset, np.repeat(np.repeat(stored, 2, axis=0), 2, axis=1))


def _turned(dataset: pydicom.Dataset, stored: np.ndarray) -> None:
    # seen from the head, rows from behind: row and column directions both reversed
    rows, columns = (float(value) for value in dataset.PixelSpacing)
    x, y, z = (float(value) for value in dataset.ImagePositionPatient)
    last = [x + columns * (stored.shape[1] - 1), y + rows * (stored.shape[0] - 1), z]
    dataset.ImagePositionPatient = [f"{value:.4f}" for value in last]
    dataset.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    dataset.PatientPosition = "FFP"
    dataset.InstanceNumber = 1000 - int(dataset.InstanceNumber)
    _store(dataset, stored[::-1, ::-1])


def _half_slope(dataset: pydicom.Dataset, stored: np.ndarray) -> None:
    hounsfield = stored + int(dataset.RescaleIntercept)
    dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-1100"
    _store(dataset, (hounsfield + 1100) * 2)


def _padded(dataset: pydicom.Dataset, stored: np.ndarray) -> None:
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    middle, radius = (stored.shape[0] - 1) / 2, stored.shape[0] / 2
    stored[(y - middle) ** 2 + (x - middle) ** 2 > radius**2] = -3024 - int(dataset.RescaleIntercept)
    _store(dataset, stored)
