from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    EnhancedCTImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
)

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.errors import Damaged, NotDicom, NotEligible, PixelDataUnreadable
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.image_kind import named_enhanced
from osteo_daemon.imaging.kernel import KernelClass, classify_kernel
from osteo_daemon.imaging.selection import not_preferred, other_series, refusal, select_series
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import ct_slices, one_study, read_header, read_headers
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
    # numbered in pairs: nothing says which of the two belongs to which sweep
    pairs = [position for position in column(40, 2.5) for _ in range(2)]
    write_slices(tmp_path, _ramp(80), pairs)
    with pytest.raises(NotEligible, match="uneven_geometry"):
        _select(tmp_path)


@pytest.mark.parametrize("turn_back", [False, True])
def test_two_sweeps_under_one_series_are_told_apart(tmp_path: Path, turn_back: bool) -> None:
    there = column(40, 2.5)
    back = there[::-1] if turn_back else there
    voxels = _ramp(80)
    write_slices(tmp_path, voxels, there + back)
    stacks, _ = _select_any(tmp_path)
    assert [len(stack.slices) for stack in stacks] == [40, 40]
    volume = read_volume(stacks[0])
    numbers = sorted(int(item.header.InstanceNumber) for item in stacks[0].slices)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # one sweep, not a mixture
    assert volume.spacing_mm[0] == pytest.approx(2.5)


def test_copies_of_an_image_count_once(tmp_path: Path) -> None:
    positions = column(40, 2.5)
    voxels = _ramp(40)
    write_slices(tmp_path, np.concatenate([voxels, voxels]), positions + positions, series_uid="2.25.7")
    for path in sorted(tmp_path.glob("*.dcm")):  # sent twice under new UIDs, with the same numbers
        dataset = pydicom.dcmread(path)
        dataset.InstanceNumber = (int(dataset.InstanceNumber) - 1) % 40 + 1
        dataset.save_as(path, enforce_file_format=True)
    stacks, _ = _select_any(tmp_path)
    assert [len(stack.slices) for stack in stacks] == [40]
    np.testing.assert_array_equal(read_volume(stacks[0]).voxels, voxels)


def test_positions_rounded_to_a_tenth_are_even(tmp_path: Path) -> None:
    positions = [(0.0, 0.0, round(0.625 * index, 1)) for index in range(200)]
    write_slices(tmp_path, _ramp(200), positions, SliceThickness="0.625")
    candidates, _ = _select(tmp_path)
    assert len(candidates[0].stack.slices) == 200
    assert candidates[0].stack.spacing_mm == pytest.approx(0.625, abs=0.001)
    assert not candidates[0].quality_flags


def test_two_kernels_under_one_series_are_two_stacks(tmp_path: Path) -> None:
    positions = column(60, 2.5)
    write_slices(tmp_path, _ramp(60), positions, series_uid="2.25.7", study_uid="2.25.8", ConvolutionKernel="B70f")
    other = write_slices(tmp_path / "soft", _ramp(60), positions, series_uid="2.25.7", study_uid="2.25.8")
    assert len(other) == 60
    stacks, _ = _select_any(tmp_path)
    assert sorted(str(stack.header.ConvolutionKernel) for stack in stacks) == ["B30f", "B70f"]


def test_a_localizer_among_the_slices_is_left_out(tmp_path: Path) -> None:
    common = {"series_uid": "2.25.7", "study_uid": "2.25.8"}
    scout = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    write_slices(
        tmp_path / "0",
        _ramp(1, 8, 8),
        [(0, 0, 0)],
        orientation=scout,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        **common,
    )
    write_slices(tmp_path / "1", _ramp(60), column(60, 2.5), **common)
    candidates, rejections = _select(tmp_path)
    assert len(candidates[0].stack.slices) == 60
    assert not rejections


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"ConvolutionKernel": "LUNG"}, ExclusionCode.UNSUITABLE_KERNEL),
        ({"ConvolutionKernel": ["Br64d", "3"]}, ExclusionCode.UNSUITABLE_KERNEL),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, ExclusionCode.DERIVED_SERIES),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ExclusionCode.DERIVED_SERIES),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "DE_MONO"]}, ExclusionCode.DERIVED_SERIES),
        ({"SliceThickness": "8"}, ExclusionCode.SLICES_TOO_THICK),
        ({"RescaleSlope": None}, ExclusionCode.CALIBRATION_OUT_OF_RANGE),
        ({"RescaleIntercept": ""}, ExclusionCode.CALIBRATION_OUT_OF_RANGE),
        ({"Modality": "CT", "ImagePositionPatient": None}, ExclusionCode.NO_CT_SERIES),
    ],
)
def test_refused_for(tmp_path: Path, attributes: dict[str, object], code: ExclusionCode) -> None:
    write_slices(tmp_path, _ramp(50), column(50, 2.5), **attributes)
    with pytest.raises(NotEligible) as refused:
        _select(tmp_path)
    assert refused.value.code == code


# What makers write (facts of their conformance statements and of PS3.3 C.8.15.2.1.1.5), and what becomes of it
KINDS = {
    "GE axial": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, True),
    "Siemens spiral": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]}, True),
    "Siemens dual energy, mixed": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM7 SPI DUAL"]}, True),
    "Philips helix": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "HELIX"]}, True),
    "Canon volume": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "HELICAL"]}, True),
    "no image type": ({"ImageType": None}, True),
    "empty description": ({"SeriesDescription": ""}, True),
    "thin slices for a reformation": ({"SeriesDescription": "1.25MM THIN FOR 3D"}, True),
    "rescale type HU": ({"RescaleType": "HU"}, True),
    "GE reformation": ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}, False),
    "GE mono-energetic": ({"ImageType": ["DERIVED", "PRIMARY", "GSI MONO", "70"]}, False),
    "GE mono, said to be original": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "GSI", "MONO_70KEV"]}, False),
    "Siemens mono-energetic": ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "DE_MONOE"]}, False),
    "Siemens VNC": ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "VNC"]}, False),
    "Siemens MPR": ({"ImageType": ["DERIVED", "SECONDARY", "MPR", "CSA MPR"]}, False),
    "Siemens topogram": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"]}, False),
    "Philips spectral VNC by description": ({"SeriesDescription": "VNC 1mm"}, False),
    "Philips mono by description": ({"SeriesDescription": "MonoE 70 keV[HU]"}, False),
    "Canon virtual by description": ({"SeriesDescription": "Virtual Non-Contrast Body"}, False),
    "iodine map": ({"SeriesDescription": "Iodine no Water[mg/ml]", "RescaleType": "MGML"}, False),
    "standard VMI": ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "VMI"]}, False),
    "standard material removed": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "MAT_REMOVED"]}, False),
    "effective atomic number": ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "EFF_ATOMIC_NUM"]}, False),
    "electron density": ({"RescaleType": "ED"}, False),
    "modified HU": ({"RescaleType": "HU_MOD"}, False),
    "maximum intensity": ({"SeriesDescription": "AX MIP 10MM"}, False),
    "saved screen": ({"ImageType": ["ORIGINAL", "SECONDARY", "SCREEN SAVE"]}, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_virtual_and_derived_series_are_refused_and_no_others(tmp_path: Path, name: str) -> None:
    attributes, original = KINDS[name]
    write_slices(tmp_path, _ramp(50), column(50, 2.5), **attributes)
    if original:
        candidates, _ = _select(tmp_path)
        assert len(candidates) == 1
    else:
        with pytest.raises(NotEligible) as refused:
            _select(tmp_path)
        assert refused.value.code == ExclusionCode.DERIVED_SERIES


@pytest.mark.parametrize(
    ("attributes", "enhanced"),
    [
        ({}, False),
        ({"ContrastBolusAgent": ""}, False),
        ({"ContrastBolusAgent": "NONE"}, False),
        ({"ContrastBolusAgent": "OMNIPAQUE 350"}, True),
        ({"ContrastBolusAgent": "IODINE", "SeriesDescription": "Abd nativ 3.0"}, False),
        ({"ContrastBolusAgent": "IODINE", "SeriesDescription": "ABDOMEN W/O CONTRAST"}, False),
        ({"SeriesDescription": "Abdomen portal venous"}, True),
        ({"SeriesDescription": "AX C+"}, True),
        ({"SeriesDescription": "AX C-"}, False),
        ({"SeriesDescription": "C-SPINE"}, False),
        ({"SeriesDescription": "delayed 5 min"}, True),
        ({"SeriesDescription": "ABDOMEN WITH CONTRAST"}, True),
        ({"SeriesDescription": "ABDOMEN ROUTINE"}, False),
    ],
)
def test_contrast_that_headers_name(attributes: dict[str, object], enhanced: bool) -> None:
    header = pydicom.Dataset()
    header.update(pydicom.Dataset())
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    assert named_enhanced(header) is enhanced


def test_a_thin_series_that_is_short_comes_after_a_thick_one_that_covers(tmp_path: Path) -> None:
    common = {"study_uid": "2.25.77"}
    write_slices(tmp_path, _ramp(120), column(120, 1.0), series_uid="2.25.11", SliceThickness="1", **common)
    write_slices(tmp_path, _ramp(80), column(80, 5.0), series_uid="2.25.12", SliceThickness="5", **common)
    write_slices(tmp_path, _ramp(130), column(130, 3.0), series_uid="2.25.13", SliceThickness="3", **common)
    candidates, _ = _select(tmp_path)
    assert [candidate.stack.series_instance_uid for candidate in candidates] == ["2.25.13", "2.25.12", "2.25.11"]
    assert not_preferred(candidates[1], candidates[0]).reason == "its slices are thicker; 2.25.13 was screened"
    assert not_preferred(candidates[2], candidates[0]).reason == "it is short; 2.25.13 was screened"


def test_series_without_ct_images_are_named_too(tmp_path: Path) -> None:
    common = {"study_uid": "2.25.77"}
    write_slices(tmp_path / "ct", _ramp(60), column(60, 2.5), series_uid="2.25.1", **common)
    kinds = {
        "2.25.2": {"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"},  # a dose report as a picture
        "2.25.3": {"SOPClassUID": PositronEmissionTomographyImageStorage, "Modality": "PT"},
        "2.25.4": {"SOPClassUID": EnhancedCTImageStorage},
        "2.25.5": {"ImagePositionPatient": None},
    }
    for uid, attributes in kinds.items():
        write_slices(tmp_path / uid, _ramp(3), column(3, 2.5), series_uid=uid, **attributes, **common)
    headers, _ = read_headers(sorted(tmp_path.rglob("*.dcm")))
    others = other_series(headers, ct_slices(headers).keys())
    assert {entry.series_instance_uid: entry.reason for entry in others} == {
        "2.25.2": "no CT images (Secondary Capture Image Storage)",
        "2.25.3": "no CT images (Positron Emission Tomography Image Storage)",
        "2.25.4": "multi-frame CT without a position in the patient for each frame",
        "2.25.5": "CT images without a position in the patient",
    }


@pytest.mark.parametrize(
    ("attributes", "stored", "expected"),
    [
        # signed, GE's undeclared padding
        ({"PixelRepresentation": 1, "RescaleIntercept": "0"}, [-2000, -1000, 40], [-1024, -1000, 40]),
        # unsigned, padding declared by its bits
        ({"PixelPaddingValue": 63536}, [63536, 24, 1064], [-1024, -1000, 40]),
        # a range of padding values
        ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 10}, [0, 10, 1064], [-1024, -1024, 40]),
        # a slope that is not one
        ({"RescaleSlope": "0.5", "RescaleIntercept": "-1000"}, [0, 2080, 4000], [-1000, 40, 1000]),
        # a declared padding value with the sign of other pixels
        ({"PixelRepresentation": 1, "RescaleIntercept": "0", "PixelPaddingValue": -2000}, [-2000, 0, 1], [-1024, 0, 1]),
        # a scale that is a third too large keeps its air
        ({"RescaleSlope": "1.3", "RescaleIntercept": "-1300"}, [0, 1000, 1050], [-1300, 0, 65]),
    ],
)
def test_stored_values_to_hu(
    tmp_path: Path, attributes: dict[str, object], stored: list[int], expected: list[int]
) -> None:
    for path in write_slices(tmp_path, _ramp(3, 1, 3), column(3, 2.5)):
        dataset = pydicom.dcmread(path)
        dataset.BitsStored, dataset.HighBit = 16, 15
        for keyword, value in attributes.items():
            if keyword.startswith("PixelPadding"):
                dataset.add_new(tag_for_keyword(keyword), "SS" if value < 0 else "US", value)
            else:
                setattr(dataset, keyword, value)
        signed = bool(attributes.get("PixelRepresentation"))
        dataset.PixelData = np.array(stored, dtype="<i2" if signed else "<u2").tobytes()
        dataset.save_as(path, enforce_file_format=True)
    stacks, _ = _select_any(tmp_path)
    np.testing.assert_allclose(read_volume(stacks[0]).voxels[1, 0], expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spacing_mm": (300.0, 300.0)}, "field of view of 1800 mm"),
        ({"orientation": (1, 0, 0, 0.5, 0.866, 0)}, "not at right angles"),
        ({"orientation": (2, 0, 0, 0, 1, 0)}, "no unit vectors"),
        ({"step_mm": 60.0}, "mm along the body"),
    ],
)
def test_a_grid_that_no_scanner_makes_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    step_mm = change.pop("step_mm", 2.5)
    write_slices(tmp_path, _ramp(50), column(50, step_mm), **change)
    with pytest.raises(NotEligible, match=f"uneven_geometry: .*{reason}"):
        _select(tmp_path)


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
        (["B_SOFT_B"], KernelClass.SOFT),
        (["B_VSHARP_C"], KernelClass.SHARP),
        (["Body Standard", "AIDR 3D"], KernelClass.SOFT),
        (["BODY SHARP"], KernelClass.SHARP),
        (["Bf37", "2"], KernelClass.SOFT),
        (["Qr40d", "3"], KernelClass.SOFT),
        (["Hr59u"], KernelClass.SHARP),
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
