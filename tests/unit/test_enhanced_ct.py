"""Multi-frame CT: the same volume, the same rules and the right references as from single images."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.errors import PixelDataUnreadable
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.enhanced import frame_headers, read_frames
from osteo_daemon.imaging.image_kind import named_enhanced
from osteo_daemon.imaging.selection import Candidate, Rejection, other_series, select_series
from osteo_daemon.imaging.slices import ct_slices, read_headers
from osteo_daemon.imaging.study_files import StudyFiles
from tests import validators
from tests.ct_series import column, write_slices
from tests.enhanced_ct import write_enhanced
from tests.report_cases import enhanced_case

COUNT = 40
DESCRIBED = {
    "Manufacturer": "Maker", "ManufacturerModelName": "Scanner", "SoftwareVersions": "1", "SeriesDate": "20260102",
    "SeriesTime": "030405", "ContentDate": "20260102", "ContentTime": "030405", "ReferringPhysicianName": "",
    "PatientPosition": "HFS", "PositionReferenceIndicator": "", "PixelPaddingValue": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def voxels() -> npt.NDArray[np.int64]:
    values = np.random.default_rng(3).integers(-100, 200, (COUNT, 48, 40))
    values[:, 0, 0] = -1024  # declared padding
    return values


@pytest.fixture(scope="module")
def files(voxels: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Single images, caudal first."""
    return write_slices(tmp_path_factory.mktemp("single"), voxels, column(COUNT, 2.5), **DESCRIBED)


def _selected(paths: list[Path]) -> tuple[list[Candidate], list[Rejection]]:
    headers, unreadable = read_headers(paths)
    assert not unreadable
    return select_series(ct_slices(headers))


@pytest.mark.parametrize("sop_class", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless],
    ids=lambda uid: uid.keyword,
)
def test_the_volume_is_that_of_the_single_images(
    files: list[Path], tmp_path: Path, sop_class: UID, syntax: UID
) -> None:
    shuffled = [files[index] for index in np.random.default_rng(1).permutation(COUNT)]
    path = tmp_path / "frames.dcm"
    write_enhanced(path, shuffled, sop_class_uid=sop_class, transfer_syntax_uid=syntax)
    (single,), _ = _selected(files)
    (multiple,), rejections = _selected([path])
    assert not rejections
    assert multiple.quality_flags == single.quality_flags == ()  # the kernel is known
    expected, found = read_volume(single.stack), read_volume(multiple.stack)
    assert np.array_equal(found.voxels, expected.voxels)
    assert np.allclose(found.affine, expected.affine, atol=1e-6)
    assert [item.frame_number for item in multiple.stack.slices] == [shuffled.index(file) + 1 for file in files]
    assert float(multiple.stack.header.KVP) == 120
    assert StudyFiles.read([path]).decode_ahead(2**30).decoded is not None


@pytest.mark.parametrize("sop_class", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage])
def test_the_objects_of_these_tests_are_legal(files: list[Path], tmp_path: Path, sop_class: UID) -> None:
    path = tmp_path / "frames.dcm"
    write_enhanced(path, files, sop_class_uid=sop_class)
    assert validators.dciodvfy(path) == []


def test_a_stack_in_two_objects(files: list[Path], tmp_path: Path) -> None:
    paths = [tmp_path / "1.dcm", tmp_path / "2.dcm"]
    write_enhanced(paths[0], files[:15][::-1])
    write_enhanced(paths[1], files[15:], instance_number=2, transfer_syntax_uid=RLELossless)
    (candidate,), _ = _selected(paths)
    (single,), _ = _selected(files)
    assert np.array_equal(read_volume(candidate.stack).voxels, read_volume(single.stack).voxels)


def _frames(dataset: Dataset) -> Iterator[tuple[int, Dataset]]:
    yield from enumerate(dataset.PerFrameFunctionalGroupsSequence)


def _changed(files: list[Path], path: Path, change: Any) -> Path:
    dataset = write_enhanced(path, files)
    change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_moments_of_one_object_are_told_apart(files: list[Path], voxels: npt.NDArray[np.int64], tmp_path: Path) -> None:
    """A perfusion-like object: every position twice, the second moment 50 HU brighter."""
    brighter = write_slices(tmp_path / "later", voxels + 50, column(COUNT, 2.5), **DESCRIBED)

    def change(dataset: Dataset) -> None:
        for number, group in _frames(dataset):
            group.FrameContentSequence[0].TemporalPositionIndex = number % 2 + 1

    pairs = [file for pair in zip(files, brighter, strict=True) for file in pair]
    (candidate,), _ = _selected([_changed(pairs, tmp_path / "frames.dcm", change)])
    parities = {item.frame_number % 2 for item in candidate.stack.slices if item.frame_number is not None}
    assert len(candidate.stack.slices) == COUNT
    assert len(parities) == 1


def test_copies_of_frames_count_once(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "frames.dcm"
    write_enhanced(path, [file for file in files for _ in range(2)])
    (candidate,), _ = _selected([path])
    assert len(candidate.stack.slices) == COUNT


@pytest.mark.parametrize(
    ("group", "attribute", "value", "code", "reason"),
    [
        ("CTImageFrameType", "FrameType", ["DERIVED", "PRIMARY"], ExclusionCode.DERIVED_SERIES, "only derived"),
        ("CTImageFrameType", "VolumetricProperties", "SAMPLED", ExclusionCode.DERIVED_SERIES, "from a volume"),
        ("CTImageFrameType", "VolumeBasedCalculationTechnique", "MPR", ExclusionCode.DERIVED_SERIES, "MPR"),
        ("PixelValueTransformation", "RescaleType", "MGML", ExclusionCode.DERIVED_SERIES, "MGML"),
        ("CTReconstruction", "ConvolutionKernel", "B70f", ExclusionCode.UNSUITABLE_KERNEL, "B70f"),
        ("PixelMeasures", "SliceThickness", 7.5, ExclusionCode.SLICES_TOO_THICK, "7.5 mm"),
    ],
)  # fmt: skip
def test_frames_are_refused_for_the_same_reasons_as_slices(
    files: list[Path], tmp_path: Path, group: str, attribute: str, value: Any, code: ExclusionCode, reason: str
) -> None:
    def change(dataset: Dataset) -> None:
        setattr(dataset.SharedFunctionalGroupsSequence[0][f"{group}Sequence"].value[0], attribute, value)

    candidates, (rejection,) = _selected([_changed(files, tmp_path / "frames.dcm", change)])
    assert not candidates
    assert rejection.code == code
    assert reason in rejection.reason


def test_a_gap_among_the_frames_is_seen(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "frames.dcm"
    write_enhanced(path, [*files[:36], *files[37:]])
    (candidate,), _ = _selected([path])
    assert len(candidate.stack.slices) == 36
    assert [flag.code for flag in candidate.quality_flags] == ["slice_gap"]


@pytest.mark.parametrize("said", [0, COUNT - 1, [COUNT, COUNT]])
def test_functional_groups_that_do_not_fit_the_frames(files: list[Path], tmp_path: Path, said: Any) -> None:
    def change(dataset: Dataset) -> None:
        dataset.NumberOfFrames = said

    headers, _ = read_headers([_changed(files, tmp_path / "frames.dcm", change)])
    series = ct_slices(headers)
    (rejection,) = other_series(headers, series.keys())
    assert (rejection.code, rejection.reason) == (
        ExclusionCode.NO_CT_SERIES,
        "multi-frame CT without a position in the patient for each frame",
    )


def test_pixels_that_are_cut_off(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "frames.dcm"
    dataset = write_enhanced(path, files)
    path.write_bytes(path.read_bytes()[: -len(dataset.PixelData) // 2])
    (candidate,), _ = _selected([path])
    with pytest.raises(PixelDataUnreadable, match="frame"):
        read_volume(candidate.stack)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.keyword)
def test_one_frame_is_in_memory_at_a_time(tmp_path: Path, syntax: UID) -> None:
    black = np.zeros((COUNT, 256, 256), dtype=np.int16)
    single = write_slices(tmp_path / "single", black, column(COUNT, 2.5), **DESCRIBED)
    path = tmp_path / "frames.dcm"
    stored_bytes = len(write_enhanced(path, single).PixelData)
    write_enhanced(path, single, transfer_syntax_uid=syntax)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_frames(path, range(COUNT, 0, -1)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == COUNT
    assert peak_bytes < stored_bytes / 4


def test_a_frame_has_values_of_its_own(files: list[Path], tmp_path: Path) -> None:
    """What one frame says must not show in the others, which share the rest of the header."""

    def change(dataset: Dataset) -> None:
        dataset.ContrastBolusAgentSequence = [Dataset()]
        dataset.ContrastBolusAgentSequence[0].CodeMeaning = "Iohexol"
        usage = Dataset()
        usage.ContrastBolusAgentAdministered = "NO"
        dataset.PerFrameFunctionalGroupsSequence[0].ContrastBolusUsageSequence = [usage]
        for number, group in _frames(dataset):
            group.FrameContentSequence[0].FrameAcquisitionNumber = number + 7

    headers, _ = read_headers([_changed(files, tmp_path / "frames.dcm", change)])
    object_header = headers[0][1]
    before = object_header.to_json()
    frames = frame_headers(object_header)
    assert [frame.ReferencedFrameNumber for frame in frames] == list(range(1, COUNT + 1))
    assert [frame.AcquisitionNumber for frame in frames] == list(range(7, COUNT + 7))
    assert [named_enhanced(frame) for frame in frames] == [False] + [True] * (COUNT - 1)
    assert object_header.to_json() == before


def test_reports_refer_to_the_frames() -> None:
    request = enhanced_case()
    frames = {(str(item.SOPInstanceUID), int(item.ReferencedFrameNumber)): item for item in request.source.headers}
    objects = {uid for uid, _ in frames}
    assert len(objects) == 2
    report = build_report_objects(request, ("comprehensive-3d+seg",), frozenset({"seg", "sr", "kos", "pdf"}))
    by_kind = {built.kind: pydicom.dcmread(BytesIO(built.data)) for built in report.objects}

    segmentation = by_kind["seg"]
    seen = set()
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        key = (str(source.ReferencedSOPInstanceUID), int(source.ReferencedFrameNumber))
        assert source.ReferencedSOPClassUID == EnhancedCTImageStorage
        position = frames[key].ImagePositionPatient
        assert np.allclose(group.PlanePositionSequence[0].ImagePositionPatient, position, atol=1e-4)
        seen.add(key)
    assert {uid for uid, _ in seen} == objects  # the vertebra lies in both
    (series,) = segmentation.ReferencedSeriesSequence
    listed = [str(item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence]
    assert sorted(listed) == sorted(objects)

    regions = [_image(item) for item in _walk(by_kind["sr"]) if item.get("ValueType") == "SCOORD"]
    assert regions
    assert set(regions) <= seen
    evidence = by_kind["sr"].CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    instances = [str(item.ReferencedSOPInstanceUID) for entry in evidence for item in entry.ReferencedSOPSequence]
    assert sorted(instances) == sorted([*{uid for uid, _ in regions}, str(segmentation.SOPInstanceUID)])

    selected = set()
    for item in _walk(by_kind["kos"]):
        if item.get("ValueType") == "IMAGE":
            (reference,) = item.ReferencedSOPSequence
            numbers = reference["ReferencedFrameNumber"]
            values = numbers.value if numbers.VM > 1 else [numbers.value]
            selected |= {(str(reference.ReferencedSOPInstanceUID), int(value)) for value in values}
    assert selected == set(regions)
    pages = [str(item.ReferencedSOPInstanceUID) for item in by_kind["pdf"].SourceInstanceSequence]
    assert sorted(pages) == sorted({uid for uid, _ in regions})


def _image(region: Dataset) -> tuple[str, int]:
    (reference,) = region.ContentSequence[0].ReferencedSOPSequence
    return str(reference.ReferencedSOPInstanceUID), int(reference.ReferencedFrameNumber)


def _walk(item: Dataset) -> Iterator[Dataset]:
    yield item
    for child in item.get("ContentSequence", ()):
        yield from _walk(child)
