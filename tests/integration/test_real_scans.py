"""Real scans, good, bad and altered, through the whole screening: what the documents predict is what comes out."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from scipy import ndimage

from osteo_daemon.domain.decision import categorise
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import (
    AVERAGED_LEVELS,
    Category,
    Exclusion,
    Outcome,
    QualityFlag,
    ScreeningResult,
    Severity,
)
from osteo_daemon.domain.references import KVP_TO_120
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.decoding import HIGHEST_PADDING_HU, LOWEST_HU, read_volume
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import ct_slices, read_headers
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.contrast import Phase, measure_enhancement
from osteo_daemon.inference.quality import check_scale
from osteo_daemon.inference.screening import Screening, StudyScreener
from osteo_daemon.inference.surroundings import survey
from osteo_daemon.inference.vertebra import Vertebra
from osteo_daemon.settings import Settings
from tests.conftest import ROOT
from tests.real_scans import Prediction, Torso, altered_copy, departures, predictions, read_torso, write_torso

pytestmark = [pytest.mark.real_ct, pytest.mark.timeout(600)]

Stored = npt.NDArray[np.float64]

NAMES = ("T12", "L1", "L2", "L3", "L4", "L5")

# Reference of the data's readme: the body eroded by 6 mm; means, and for L1, which holds a dense focus, the median
TORSO_HU = {"T12": 102, "L1": 96, "L2": 113, "L3": 108, "L4": 110, "L5": 114}
TORSO_TOLERANCE_HU = 12


@pytest.fixture(scope="module")
def screener() -> StudyScreener:
    return StudyScreener.load(Settings())


@pytest.fixture(scope="module")
def torso(real_data: Path) -> Torso:
    return read_torso(real_data / "totalsegmentator_example")


@pytest.fixture(scope="module")
def files_of(
    real_series: Callable[[str], Path], torso: Torso, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Path]]:
    """Call with a scan's name: its DICOM files."""

    @functools.cache
    def files(name: str) -> tuple[Path, ...]:
        if name == "totalsegmentator_example":
            return tuple(write_torso(torso, torso.voxels, tmp_path_factory.mktemp("torso")))
        return tuple(sorted(real_series(name).iterdir()))

    return lambda name: list(files(name))


@pytest.fixture(scope="module")
def screened(screener: StudyScreener, files_of: Callable[[str], list[Path]]) -> Callable[[str], Screening]:
    """Call with a scan's name: its screening, made once."""
    return functools.cache(lambda name: screener.screen(files_of(name)))


@pytest.mark.parametrize("prediction", predictions(), ids=lambda prediction: prediction.scan)
def test_the_product_does_what_the_page_predicts(prediction: Prediction, screened: Callable[[str], Screening]) -> None:
    assert departures(prediction, screened(prediction.scan).result) == []


def _always_flags(result: ScreeningResult) -> ScreeningResult:
    flag = QualityFlag("calibration_out_of_range", Severity.BLOCKING)
    return dataclasses.replace(
        result,
        outcome=Outcome.REPORTED,
        exclusion=None,
        category=Category.INDETERMINATE,
        quality_flags=(*result.quality_flags, flag),
    )


def _always_excludes(result: ScreeningResult) -> ScreeningResult:
    return dataclasses.replace(
        result,
        outcome=Outcome.EXCLUDED,
        exclusion=result.exclusion or Exclusion(ExclusionCode.INSUFFICIENT_COVERAGE, "always"),
        category=None,
        vertebrae=(),
        quality_flags=(),
    )


def _never_refuses(result: ScreeningResult) -> ScreeningResult:
    return dataclasses.replace(
        result, outcome=Outcome.REPORTED, exclusion=None, category=Category.NOT_FLAGGED, quality_flags=()
    )


def _one_code_for_all(result: ScreeningResult) -> ScreeningResult:
    if result.exclusion is None:
        return result
    return dataclasses.replace(result, exclusion=Exclusion(ExclusionCode.NO_LUMBAR_VERTEBRA, "always the same"))


@pytest.mark.parametrize("mutant", [_always_flags, _always_excludes, _never_refuses, _one_code_for_all])
def test_a_version_that_always_says_the_same_would_fail(
    mutant: Callable[[ScreeningResult], ScreeningResult], screened: Callable[[str], Screening]
) -> None:
    """The same check, on results of a planted fault: at least one prediction must catch it, ACRIN those that refuse."""
    caught = {
        prediction.scan
        for prediction in predictions()
        if departures(prediction, mutant(screened(prediction.scan).result))
    }
    if mutant in (_always_flags, _always_excludes):
        assert "acrin_flt_breast_001_abdomen" in caught
        assert "totalsegmentator_example" in caught
    if mutant is not _always_excludes:
        assert {"cptac_pda_C3L-00189_lungbases", "dcm_qa_ct_ge_tilt_head", "totalsegmentator_dicom_j2k"} <= caught


def test_every_refusal_is_documented() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    table = page.partition("## Exclusions")[2].partition("## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]
    assert sorted(row[0].strip("`") for row in rows) == sorted(code.value for code in ExclusionCode)
    assert all(len(row) == 3 and row[1] and row[2] for row in rows)


def test_every_blocking_flag_is_documented() -> None:
    """The flags that docs/report.md calls blocking are those for which this page says what to do."""
    report = (ROOT / "docs" / "report.md").read_text(encoding="utf-8").partition("## Quality flags")[2]
    blocking = set(re.findall(r"^\| `(\w+)` \| [a-z, ]*blocking \|", report.partition("\n## ")[0], re.MULTILINE))
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    table = page.partition("## Blocking flags")[2].partition("\n## ")[0]
    assert len(blocking) > 5
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == blocking


def test_the_labelled_torso(screened: Callable[[str], Screening], torso: Torso) -> None:
    """The localizer was trained on this torso: this shows that geometry and measurement are right, not that it
    generalises."""
    screening = screened("totalsegmentator_example")
    found = {vertebra.level.value: vertebra for vertebra in screening.result.vertebrae}
    assert tuple(found) == NAMES
    for level, reference in TORSO_HU.items():
        attenuation = found[level].attenuation_hu
        assert attenuation is not None
        value = attenuation.median if level == "L1" else attenuation.mean
        assert value == pytest.approx(reference, abs=TORSO_TOLERANCE_HU), level
        assert np.linalg.norm(found[level].centre_lps_mm - torso.centre_lps_mm(level)) < 8.0, level
    codes = {flag.code for flag in screening.result.quality_flags}
    assert {"kvp_unknown", "kernel_unknown"} <= codes
    assert "contrast_enhanced" not in codes
    assert screening.manifest["scan_quality"]["contrast_phase"] == Phase.UNENHANCED


def _deep(mask: np.ndarray, spacing: tuple[float, ...], depth_mm: float) -> np.ndarray:
    """Voxels at least so deep inside a mask."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1] >= depth_mm)


def _darkening(
    voxels: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...], target_hu: float
) -> tuple[np.ndarray, float]:
    """The body without its cortex (3 mm inside), and the factor that brings its core (6 mm inside, the depth of the
    reference) to a median; the texture shrinks with it."""
    return _deep(mask, spacing, 3.0), target_hu / float(np.median(voxels[_deep(mask, spacing, 6.0)]))


TARGETS_HU = (40, 60, 80, 120)


@pytest.mark.parametrize("target_hu", TARGETS_HU)
def test_osteoporotic_copies_of_the_torso(
    target_hu: int, screener: StudyScreener, torso: Torso, tmp_path: Path
) -> None:
    voxels = torso.voxels.copy()
    spacing = tuple(np.linalg.norm(torso.affine[:3, :3], axis=0))
    for level in NAMES:
        core, darker = _darkening(torso.voxels, torso.body(level), spacing, target_hu)
        voxels[core] *= darker
    result = screener.screen(write_torso(torso, voxels, tmp_path)).result
    found = {vertebra.level.value: vertebra for vertebra in result.vertebrae}
    assert tuple(found) == NAMES
    for level, vertebra in found.items():
        assert np.linalg.norm(vertebra.centre_lps_mm - torso.centre_lps_mm(level)) < 8.0, level
        assert vertebra.attenuation_hu is not None
        if level in AVERAGED_LEVELS:
            assert vertebra.attenuation_hu.median == pytest.approx(target_hu, abs=10), level
    assert result.category is categorise(target_hu)


@pytest.mark.slow
@pytest.mark.parametrize("target_hu", TARGETS_HU)
def test_osteoporotic_copies_of_the_acrin_series(
    target_hu: int,
    screener: StudyScreener,
    screened: Callable[[str], Screening],
    files_of: Callable[[str], list[Path]],
    tmp_path: Path,
) -> None:
    before = screened("acrin_flt_breast_001_abdomen")
    assert before.volume is not None
    factor = np.ones(before.volume.voxels.shape, dtype=np.float32)
    for measurement in before.measurements.values():
        body = measurement.body
        corner = np.round(before.volume.to_index(body.affine[:3, 3])).astype(int)
        window = tuple(slice(a, a + n) for a, n in zip(corner, body.mask.shape, strict=True))
        core, darkening = _darkening(before.volume.voxels[window], body.mask, before.volume.spacing_mm, target_hu)
        factor[window][core] = darkening
    order = {header.SOPInstanceUID: index for index, header in enumerate(before.headers)}

    def darker(dataset: pydicom.Dataset, stored: Stored) -> Stored:
        intercept = float(dataset.RescaleIntercept)
        return (stored + intercept) * factor[order[dataset.SOPInstanceUID]] - intercept

    result = screener.screen(altered_copy(files_of("acrin_flt_breast_001_abdomen"), tmp_path, darker)).result
    was = {vertebra.level: vertebra for vertebra in before.result.vertebrae}
    assert [vertebra.level for vertebra in result.vertebrae] == list(was)
    for vertebra in result.vertebrae:
        shift = np.subtract(vertebra.centre_lps_mm, was[vertebra.level].centre_lps_mm)
        assert np.linalg.norm(shift) < 8.0, vertebra.level
        assert vertebra.attenuation_hu is not None
        if vertebra.level in AVERAGED_LEVELS:
            assert vertebra.attenuation_hu.median == pytest.approx(target_hu, abs=10), vertebra.level
    assert not [flag for flag in result.quality_flags if flag.severity is Severity.BLOCKING]
    assert result.category is categorise(target_hu * KVP_TO_120[140])


# How a scale goes wrong on the way: slope and intercept of the copy
SCALES = {
    "60 HU too high": (1.0, -1024.0 + 60),
    "60 HU too low": (1.0, -1024.0 - 60),
    "a third too large": (1.3, -1024.0 * 1.3),
    "a fifth too small": (0.8, -1024.0 * 0.8),
    "intercept lost": (1.0, 0.0),
    "intercept of another scanner": (1.0, -2024.0),
    "stretched about air": (1.1, -1024.0 * 1.1 + 100.0),
}


GOOD = ("acrin_flt_breast_001_abdomen", "totalsegmentator_example")


@pytest.mark.parametrize("scan", GOOD)
def test_every_wrong_scale_is_seen_and_the_right_one_is_not(scan: str, screened: Callable[[str], Screening]) -> None:
    volume = screened(scan).volume
    assert volume is not None
    check_scale(survey(volume))
    for name, (slope, intercept) in SCALES.items():
        voxels = (volume.voxels + 1024.0) * np.float32(slope) + np.float32(intercept)
        voxels[voxels < HIGHEST_PADDING_HU] = LOWEST_HU  # as a reader does
        with pytest.raises(NotEligible) as refused:
            check_scale(survey(CtVolume(voxels.astype(np.float32), volume.affine)))
        assert refused.value.code == ExclusionCode.CALIBRATION_OUT_OF_RANGE, name


@pytest.mark.parametrize("scan", GOOD)
@pytest.mark.parametrize("name", ["60 HU too high", "intercept of another scanner"])
def test_a_wrong_scale_gives_no_number(
    name: str, scan: str, screener: StudyScreener, files_of: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    slope, intercept = SCALES[name]

    def rescaled(dataset: pydicom.Dataset, stored: Stored) -> Stored:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope}", f"{intercept}"
        return stored

    screening = screener.screen(altered_copy(files_of(scan), tmp_path, rescaled))
    assert screening.result.exclusion is not None
    assert screening.result.exclusion.code == ExclusionCode.CALIBRATION_OUT_OF_RANGE
    assert screening.result.vertebrae == ()
    assert screening.result.category is None


def _placed(volume: CtVolume, level: str, index: tuple[float, float, float], half_mm: tuple[float, float]) -> Vertebra:
    """A vertebra where a reader sees it: (d, h, w) of its centre, half depth and half width in mm."""
    z, y, x = np.meshgrid(np.arange(-12, 13.0), np.arange(-25, 26.0), np.arange(-30, 31.0), indexing="ij")
    mask = (y / half_mm[0]) ** 2 + (x / half_mm[1]) ** 2 + 0 * z < 1
    centre = volume.to_lps(index)
    affine = np.array([[0, 0, 1.0, -30], [0, 1.0, 0, -25], [1.0, 0, 0, -12], [0, 0, 0, 1]])
    affine[:3, 3] += centre
    upright = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    return Vertebra(level, centre, upright, 1.0, Region(mask, affine), True, 25.0, None, centre, centre)


def test_enhanced_scans_are_seen_although_their_tags_are_empty(files_of: Callable[[str], list[Path]]) -> None:
    """Both are refused as studies (lung kernel, too short), so the measure is tried by itself; places by a reader."""
    volume = _volume(files_of("cptac_pda_C3L-00189_lungbases"))
    lumbar = [_placed(volume, "L2", (2, 310, 248), (16, 22)), _placed(volume, "L1", (6, 308, 244), (16, 22))]
    found = measure_enhancement(volume, lumbar)
    assert found.phase in (Phase.PORTAL_VENOUS, Phase.LATE), found
    assert found.aorta_hu is not None
    assert found.kidney_hu is not None
    assert found.aorta_hu > 100
    assert found.kidney_hu > 130

    volume = _volume(files_of("totalsegmentator_dicom_j2k"))
    found = measure_enhancement(volume, [_placed(volume, "T12", (10, 328, 249), (17, 20))])
    assert found.enhanced
    assert found.aorta_hu is not None
    assert found.aorta_hu > 130


def _volume(paths: list[Path]) -> CtVolume:
    headers, _ = read_headers(paths)
    stacks = [stack for slices in ct_slices(headers).values() for stack in split_stacks(slices)]
    return read_volume(max(stacks, key=lambda stack: len(stack.slices)))
