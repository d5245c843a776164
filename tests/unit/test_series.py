from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.errors import Damaged, NotDicom, NotEligible, PixelDataUnreadable
from osteo_daemon.imaging.kernel import KernelClass, classify_kernel
from osteo_daemon.imaging.selection import refusal, select_series
from osteo_daemon.imaging.series import (
    ct_slices,
    one_study,
    read_header,
    read_headers,
    read_volume,
    split_stacks,
)
from tests.ct_series import column, write_slices


def _ramp(count: int, rows: int = 6, columns: int = 5) -> np.ndarray:
    return np.arange(count * rows * columns, dtype=np.int16).reshape(count, rows, columns)


def _select(folder: Path):
    headers, _ = read_headers(sorted(folder.rglob("*.dcm")))
    candidates, rejections = select_series(ct_slices(headers))
    if not candidates:
        raise refusal(rejections)
    return candidates, rejections


def test_volume_keeps_values_and_places_every_voxel(tmp_path: Path) -> None:
    voxels = _ramp(10)
    write_slices(tmp_path, voxels, column(10, 3.0), spacing_mm=(0.5, 0.8))
    candidates, _ = _select_any(tmp_path)
    volume = read_volume(candidates[0])
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.spacing_mm == pytest.approx((3.0, 0.5, 0.8))
    np.testing.assert_allclose(volume.to_lps((2, 4, 3)), (-10 + 3 * 0.8, -20 + 4 * 0.5, 6.0))
    np.testing.assert_allclose(volume.to_index(volume.to_lps((2.5, 1.25, 3.0))), (2.5, 1.25, 3.0))


def _select_any(folder: Path):
    headers, unreadable = read_headers(sorted(folder.rglob("*.dcm")))
    return [stack for slices in ct_slices(headers).values() for stack in split_stacks(slices)], unreadable


def test_gantry_tilt_is_a_shear(tmp_path: Path) -> None:
    tilt = math.radians(18.5)
    orientation = (1.0, 0.0, 0.0, 0.0, math.cos(tilt), math.sin(tilt))
    write_slices(tmp_path, _ramp(5), column(5, 4.0), orientation=orientation)
    (stack,), _ = _select_any(tmp_path)
    volume = read_volume(stack)
    np.testing.assert_allclose(volume.affine[:3, 0], (0, 0, 4), atol=1e-9)  # the table's step, not the normal
    np.testing.assert_allclose(volume.affine[:3, 1], (0, math.cos(tilt), math.sin(tilt)), atol=1e-9)
    assert volume.voxel_volume_mm3 == pytest.approx(4.0 * math.cos(tilt))


def test_a_missing_slice_is_never_bridged(tmp_path: Path) -> None:
    positions = column(60, 2.5)
    paths = write_slices(tmp_path, _ramp(60), positions)
    paths[40].unlink()
    stacks, _ = _select_any(tmp_path)
    assert [len(stack.slices) for stack in stacks] == [40, 19]
    assert stacks[0].cut_slices == 19
    candidates, _ = _select(tmp_path)
    assert [flag.code for flag in candidates[0].quality_flags] == ["slice_gap"]


def test_uneven_spacing_is_refused(tmp_path: Path) -> None:
    positions = column(40, 2.5) + column(40, 4.0, start_mm=40 * 2.5)
    write_slices(tmp_path, _ramp(80), positions)
    with pytest.raises(NotEligible) as refused:
        _select(tmp_path)
    assert refused.value.code == ExclusionCode.UNEVEN_GEOMETRY
    assert "2.5, 4.0 mm" in refused.value.reason


def test_two_images_at_one_position_are_refused(tmp_path: Path) -> None:
    write_slices(tmp_path, _ramp(80), column(40, 2.5) + column(40, 2.5))
    with pytest.raises(NotEligible, match="uneven_geometry"):
        _select(tmp_path)


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"ConvolutionKernel": "LUNG"}, ExclusionCode.UNSUITABLE_KERNEL),
        ({"ConvolutionKernel": ["Br64d", "3"]}, ExclusionCode.UNSUITABLE_KERNEL),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, ExclusionCode.DERIVED_SERIES),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ExclusionCode.DERIVED_SERIES),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "DE_MONO"]}, ExclusionCode.DERIVED_SERIES),
        ({"SliceThickness": "8"}, ExclusionCode.SLICES_TOO_THICK),
        ({"Modality": "CT", "ImagePositionPatient": None}, ExclusionCode.NO_CT_SERIES),
    ],
)
def test_refused_for(tmp_path: Path, attributes: dict[str, object], code: ExclusionCode) -> None:
    write_slices(tmp_path, _ramp(50), column(50, 2.5), **attributes)
    with pytest.raises(NotEligible) as refused:
        _select(tmp_path)
    assert refused.value.code == code


def test_short_and_sagittal_series_are_refused(tmp_path: Path) -> None:
    write_slices(tmp_path / "short", _ramp(20), column(20, 2.0))
    with pytest.raises(NotEligible, match="insufficient_coverage: covers 38 mm"):
        _select(tmp_path / "short")
    positions = [(2.5 * index, 0.0, 0.0) for index in range(60)]
    write_slices(tmp_path / "sagittal", _ramp(60), positions, orientation=(0, 1, 0, 0, 0, -1))
    with pytest.raises(NotEligible, match="derived_series: not axial"):
        _select(tmp_path / "sagittal")


def test_the_best_series_comes_first_and_every_refusal_is_kept(tmp_path: Path) -> None:
    study = "2.25.77"
    common = {"study_uid": study}
    write_slices(tmp_path, _ramp(40), column(40, 5.0), series_uid="2.25.11", SliceThickness="5", **common)
    write_slices(tmp_path, _ramp(100), column(100, 2.0), series_uid="2.25.12", ConvolutionKernel="STD+", **common)
    write_slices(tmp_path, _ramp(100), column(100, 2.0), series_uid="2.25.13", ContrastBolusAgent="yes", **common)
    write_slices(tmp_path, _ramp(80), column(80, 2.5), series_uid="2.25.14", **common)
    write_slices(tmp_path, _ramp(80), column(80, 2.5), series_uid="2.25.15", ConvolutionKernel="BONE", **common)
    candidates, rejections = _select(tmp_path)
    assert [candidate.stack.series_instance_uid for candidate in candidates] == [
        "2.25.14",  # thinner than 11, native
        "2.25.11",
        "2.25.13",  # enhanced
        "2.25.12",  # unknown kernel
    ]
    assert [(rejection.series_instance_uid, rejection.code) for rejection in rejections] == [
        ("2.25.15", ExclusionCode.UNSUITABLE_KERNEL)
    ]


def test_bad_files_are_named_and_passed_over(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, _ramp(4), column(4, 2.5))
    (tmp_path / "note.dcm").write_text("this is no DICOM file")
    (tmp_path / "empty.dcm").touch()
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(paths[0].read_bytes()[:300])
    headers, unreadable = read_headers(sorted(tmp_path.iterdir()))
    assert len(headers) == 4
    assert {entry.path.name for entry in unreadable} == {"note.dcm", "empty.dcm", "cut.dcm"}
    with pytest.raises(NotDicom, match="no DICOM preamble"):
        read_header(tmp_path / "note.dcm")


def test_a_truncated_slice_is_damage(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, _ramp(50), column(50, 2.5))
    whole = paths[25].read_bytes()
    paths[25].write_bytes(whole[:-20])
    (stack,), _ = _select_any(tmp_path)
    with pytest.raises(PixelDataUnreadable, match="slice 26"):
        read_volume(stack)


def test_studies_are_not_mixed(tmp_path: Path) -> None:
    write_slices(tmp_path, _ramp(3), column(3, 2.5))
    write_slices(tmp_path, _ramp(3), column(3, 2.5))
    headers, _ = read_headers(sorted(tmp_path.iterdir()))
    with pytest.raises(Damaged, match="belong to 2 studies"):
        one_study(headers)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["SOFT"], KernelClass.SOFT),
        (["STANDARD"], KernelClass.SOFT),
        (["LUNG"], KernelClass.SHARP),
        (["B30f"], KernelClass.SOFT),
        (["B70s"], KernelClass.SHARP),
        (["Br38f", "3"], KernelClass.SOFT),
        (["I50f", "2"], KernelClass.SHARP),
        (["FC08"], KernelClass.SOFT),
        (["FC51"], KernelClass.SHARP),
        (["YC"], KernelClass.SHARP),
        (["B"], KernelClass.SOFT),
        (["STD+"], KernelClass.UNKNOWN),
        ([], KernelClass.UNKNOWN),
    ],
)
def test_kernels(values: list[str], expected: KernelClass) -> None:
    assert classify_kernel(values) is expected


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cptac_pda_C3L-00189_lungbases", ExclusionCode.UNSUITABLE_KERNEL),
        ("dcm_qa_ct_ge_tilt_head", ExclusionCode.UNEVEN_GEOMETRY),
        ("totalsegmentator_dicom_j2k", ExclusionCode.INSUFFICIENT_COVERAGE),
    ],
)
def test_real_series_are_refused(real_series, name: str, code: ExclusionCode) -> None:
    headers, unreadable = read_headers(sorted(real_series(name).iterdir()))
    assert not unreadable
    candidates, rejections = select_series(ct_slices(headers))
    assert not candidates
    assert refusal(rejections).code == code


@pytest.mark.real_ct
def test_real_series_read(acrin: Path, real_series) -> None:
    headers, _ = read_headers(sorted(acrin.iterdir()))
    (candidate,), rejections = select_series(ct_slices(headers))
    assert not rejections
    assert not candidate.quality_flags
    volume = read_volume(candidate.stack)
    assert volume.voxels.shape == (99, 512, 512)
    # a vertebral body at the place that the data's readme names
    assert volume.voxels[66:69, 308:318, 236:246].mean() == pytest.approx(178, abs=20)
    headers, _ = read_headers(sorted(real_series("totalsegmentator_dicom_j2k").iterdir()))
    compressed = read_volume(split_stacks(next(iter(ct_slices(headers).values())))[0])
    assert compressed.voxels.shape == (20, 512, 512)
    assert compressed.voxels.min() == -1024
