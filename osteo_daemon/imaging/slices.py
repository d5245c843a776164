"""DICOM files to slices: headers, and where each image or frame lies in the patient.

A frame of a multi-frame CT object is a slice like any other, see `osteo_daemon.imaging.enhanced`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, SegmentationStorage

from osteo_daemon.errors import Damaged, NotDicom
from osteo_daemon.imaging.enhanced import MULTI_FRAME_CT, frame_headers, is_multi_frame_ct

MAXIMUM_INFLATED_BYTES = 512 << 20
"""A deflated data set that is longer is refused unread: a thousandth of it may have been sent."""

LARGE_FILE_BYTES = 64 << 20
"""No single CT image is larger (4096 x 4096 take half of it); of other objects only what names them is read then."""

_NAMING = [
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientName", "PatientID"),
    *("IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge"),
]

PARSE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    AttributeError,
    TypeError,
    OverflowError,
    RecursionError,  # sequences nested without end
    BytesLengthException,
    struct.error,
    zlib.error,
)
"""What pydicom raises of bytes that are no object; anything else is an error of ours."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One CT image: its header without pixels and where its bytes lie.

    Attributes:
        position_mm: (3,) Image Position (Patient), LPS.
        frame_number: which frame of a multi-frame object, from 1 on; None for an object of one image.
    """

    header: Dataset
    path: Path
    position_mm: npt.NDArray[np.float64]
    frame_number: int | None = None

    @property
    def place(self) -> tuple[Path, int | None]:
        """File and frame."""
        return self.path, self.frame_number


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Parallel slices of one series on an even grid, ordered along the normal.

    Attributes:
        slices: in the order of the volume's D axis.
        affine: (4, 4) index (d, h, w, 1) to LPS mm; the D column is the step between slice positions, which under
            gantry tilt is not parallel to the normal.
        cut_slices: slices of the same grid that were left out because the spacing changes; 0 for a whole series.
    """

    slices: tuple[Slice, ...]
    affine: npt.NDArray[np.float64]
    cut_slices: int

    @property
    def header(self) -> Dataset:
        """Header of the first slice."""
        return self.slices[0].header

    @property
    def series_instance_uid(self) -> str:
        """UID of the series that the slices belong to."""
        return str(self.header.get("SeriesInstanceUID") or "")

    @property
    def spacing_mm(self) -> float:
        """Distance between neighbouring slice positions."""
        return float(np.linalg.norm(self.affine[:3, 0]))

    @property
    def coverage_mm(self) -> float:
        """Cranio-caudal extent of the stack, from the first slice's centre to the last's."""
        return float(abs(self.affine[2, 0]) * (len(self.slices) - 1))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that's no usable DICOM object, and why, without its content."""

    path: Path
    reason: str


def read_headers(paths: Iterable[Path]) -> tuple[list[tuple[Path, Dataset]], list[Unreadable]]:
    """Headers without pixels of every readable file, and the files that are not.

    A file counts as readable when it's a Part 10 file with the UIDs of its SOP class and instance.
    """
    readable: list[tuple[Path, Dataset]] = []
    unreadable: list[Unreadable] = []
    for path in paths:
        try:
            readable.append((path, read_header(path)))
        except NotDicom as error:
            unreadable.append(Unreadable(path, error.detail))
    return readable, unreadable


def read_header(path: Path) -> Dataset:
    """Header of one file, pixels left on disk.

    Raises:
        NotDicom: not a Part 10 file, cut off in its header, or without UIDs.
    """
    try:
        _check_inflated(path)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_wanted(path))
        header.decode()  # elements are parsed lazily: a broken one must show here, not in the middle of a report
    except InvalidDicomError as error:
        raise NotDicom(f"{path.name} has no DICOM preamble") from error
    except PARSE_ERRORS as error:
        raise NotDicom(f"{path.name} cannot be parsed ({type(error).__name__})") from error
    meta = header.file_meta
    for keyword, fallback in (
        ("SOPInstanceUID", "MediaStorageSOPInstanceUID"),
        ("SOPClassUID", "MediaStorageSOPClassUID"),
    ):
        if not header.get(keyword):  # blanked by some anonymisers; the file meta information repeats it
            if not meta.get(fallback):
                raise NotDicom(f"{path.name} has no {keyword}")
            setattr(header, keyword, meta.get(fallback))
    if header.SOPClassUID == CTImageStorage or is_multi_frame_ct(header):
        if "Rows" not in header:
            raise NotDicom(f"{path.name} is cut off before its pixels")
        if not all(isinstance(header.get(keyword), int) for keyword in ("Rows", "Columns")):
            raise NotDicom(f"{path.name} says no number of rows and columns")
    return header


def _wanted(path: Path) -> list[str] | None:
    """The elements to read: all; of a large object that is no multi-frame CT and no segmentation those that name it."""
    if path.stat().st_size <= LARGE_FILE_BYTES:
        return None
    sop_class = pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID")
    if sop_class == CTImageStorage:
        raise NotDicom(f"{path.name} is larger than a CT image can be")
    return None if sop_class in (*MULTI_FRAME_CT, SegmentationStorage) else _NAMING


def _check_inflated(path: Path) -> None:
    with path.open("rb") as stream:
        if DeflatedExplicitVRLittleEndian.encode() not in stream.read(1024):
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        stream.seek(144 + int(meta.FileMetaInformationGroupLength))
        engine, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not engine.eof and (data := engine.unconsumed_tail or stream.read(1 << 16)):
            length += len(engine.decompress(data, 1 << 20))
            if length > MAXIMUM_INFLATED_BYTES:
                raise NotDicom(f"{path.name} inflates to more than {MAXIMUM_INFLATED_BYTES >> 20} MiB")


def ct_slices(headers: Sequence[tuple[Path, Dataset]]) -> dict[str, list[Slice]]:
    """CT images and frames with a position in the patient, by SeriesInstanceUID, each SOP instance once."""
    series: dict[str, dict[tuple[str, int | None], Slice]] = {}
    for path, header in headers:
        for image, number in _images(header):
            if not _has_geometry(image):
                continue
            position = np.asarray(image.ImagePositionPatient, dtype=np.float64)
            instances = series.setdefault(str(header.get("SeriesInstanceUID") or ""), {})
            instances.setdefault((str(header.SOPInstanceUID), number), Slice(image, path, position, number))
    return {uid: list(instances.values()) for uid, instances in series.items()}


def _images(header: Dataset) -> Iterator[tuple[Dataset, int | None]]:
    if header.SOPClassUID == CTImageStorage:
        yield header, None
    elif is_multi_frame_ct(header):
        for number, frame in enumerate(frame_headers(header), start=1):
            yield frame, number


def _has_geometry(header: Dataset) -> bool:
    try:
        values = [*header.ImagePositionPatient, *header.ImageOrientationPatient, *header.PixelSpacing]
        numbers = np.asarray(values, dtype=np.float64)
    except (AttributeError, TypeError, ValueError):
        return False
    return numbers.shape == (11,) and bool(np.isfinite(numbers).all()) and bool((numbers[9:] > 0).all())


def one_study(headers: Sequence[tuple[Path, Dataset]]) -> str:
    """StudyInstanceUID of all headers; empty where an anonymiser blanked it.

    Raises:
        Damaged: no header, or more than one study.
    """
    uids = {str(header.get("StudyInstanceUID") or "") for _, header in headers}
    if not uids:
        raise Damaged("there is no DICOM object")
    if len(uids) > 1:
        raise Damaged(f"the files belong to {len(uids)} studies; screen one study at a time")
    return uids.pop()
