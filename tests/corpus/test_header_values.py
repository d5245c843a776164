"""Every value that series selection reads, replaced by what no scanner writes: judged, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from osteo_daemon.dicom.contexts import EXPLICIT_VR_LITTLE_ENDIAN
from osteo_daemon.dicom.header import file_header
from osteo_daemon.errors import Damaged, NotEligible
from osteo_daemon.imaging.selection import other_series, refusal, select_series
from osteo_daemon.imaging.slices import ct_slices, one_study, read_headers
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.inference.patient import Patient
from tests.corpus.mutations import Encoded, element, encoded
from tests.fakes import write_ct

_READ = (
    *("ImageType", "StudyDate", "SeriesDescription", "Modality", "PatientBirthDate", "PatientSex", "PatientAge"),
    *("ContrastBolusAgent", "KVP", "SliceThickness", "ConvolutionKernel", "AcquisitionNumber", "InstanceNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "StackID", "TemporalPositionIndex"),
    *("Rows", "Columns", "PixelSpacing", "RescaleType", "VolumetricProperties", "GantryDetectorTilt"),
)
_OF_PIXELS = (
    *("SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "NumberOfFrames"),
)
_TEXTS = (b"1\\2 ", b"1e400 ", b"\xff\xfe\x01\x02")
_NUMBERS = (b"", struct.pack("<HH", 16, 16), struct.pack("<H", 0), struct.pack("<H", 65535))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_ct(tmp_path_factory.mktemp("series"), count=28, size=8)


def _around(dataset: Dataset, keyword: str) -> tuple[Encoded, Encoded]:
    """What stands before an element and behind it."""
    tag = Tag(keyword)
    before, after = (encoded(part, ExplicitVRLittleEndian) for part in (dataset[:tag], dataset[tag + 1 :]))
    return before, after


def _with(around: tuple[Encoded, Encoded], keyword: str, value: bytes) -> bytes:
    """The data set's bytes with one element replaced, whatever pydicom thinks of its value."""
    tag, vr = Tag(keyword), dictionary_VR(keyword).partition(" ")[0]
    before, after = around
    return (
        before.body + element((tag.group, tag.element), vr.encode(), value + bytes(len(value) % 2), before) + after.body
    )


def _judge(paths: list[Path], *, decode: bool) -> str:
    headers, unreadable = read_headers(paths)
    study = StudyFiles(tuple(headers), tuple(unreadable))
    try:
        one_study(study.headers)
        for _, header in study.headers[:2]:
            Patient.of(header).check_age()
        series = ct_slices(study.headers)
        candidates, rejections = select_series(series)
        other_series(study.headers, series.keys())
        if not candidates:
            raise refusal(rejections)
        if decode:
            study.volume(candidates[0].stack)
        return "unreadable" if unreadable else "read"
    except (Damaged, NotEligible) as error:
        return type(error).__name__ if str(error).isprintable() else "says what it was sent"


@pytest.mark.parametrize("keyword", [*_READ, *_OF_PIXELS])
def test_a_value_that_is_none(files: list[Path], tmp_path: Path, keyword: str) -> None:
    values = _NUMBERS if dictionary_VR(keyword) in ("US", "UL", "SS", "US or SS") else _TEXTS
    datasets = [dcmread(path) for path in files]
    changed = range(0, len(files), 1 if keyword in _READ else 10)
    around = {number: _around(datasets[number], keyword) for number in changed}
    for value in values:
        paths = list(files)
        for number in changed:
            dataset = datasets[number]
            paths[number] = tmp_path / files[number].name
            header = file_header(dataset.SOPClassUID, dataset.SOPInstanceUID, EXPLICIT_VR_LITTLE_ENDIAN)
            paths[number].write_bytes(header + _with(around[number], keyword, value))
        # where images share their positions, other attributes are asked
        twice = [*paths[:3], *(_moved(path, tmp_path) for path in paths[:3])] if keyword == "InstanceNumber" else []
        assert _judge([*paths, *twice], decode=keyword in _OF_PIXELS) != "says what it was sent"


def _moved(path: Path, folder: Path) -> Path:
    """A copy under another UID, with other pixels."""
    data = path.read_bytes()
    uid = str(dcmread(path, stop_before_pixels=True).SOPInstanceUID).encode()
    target = folder / f"again-{path.name}"
    target.write_bytes(data.replace(uid, uid[:-1] + (b"1" if uid[-1:] != b"1" else b"2"))[:-2] + b"\x07\x00")
    return target
