"""DICOM files to stacks of parallel slices, and a stack to a `CtVolume` with its true geometry.

A frame of a multi-frame CT object is a slice like any other, see `osteo_daemon.imaging.enhanced`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage

from osteo_daemon.errors import Damaged, NotDicom, PixelDataUnreadable
from osteo_daemon.imaging.enhanced import frame_headers, is_multi_frame_ct, read_frames
from osteo_daemon.imaging.volume import CtVolume

SPACING_TOLERANCE_MM = 0.1
"""A slice may lie this far from the even grid: scanners write positions rounded to 0.01 to 0.1 mm."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between direction cosines within one stack."""

MINIMUM_RUN = 3
"""Fewest slices that show an even step."""

LOWEST_HU = -1024.0
"""Padding outside the reconstruction circle is raised to this."""

HIGHEST_PADDING_HU = -1400.0
"""Padding lies below (GE -2000 or -3024, Siemens -8192, declared or not), no measured air does: a scale that is a third
too large still shows as itself."""


_DECODE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    NotImplementedError,
    RuntimeError,
)


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
        header = pydicom.dcmread(path, stop_before_pixels=True)
        header.decode()  # elements are parsed lazily: a broken one must show here, not in the middle of a report
    except InvalidDicomError as error:
        raise NotDicom(f"{path.name} has no DICOM preamble") from error
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        NotImplementedError,
        AttributeError,
        TypeError,
        LookupError,
    ) as error:
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
    if (header.SOPClassUID == CTImageStorage or is_multi_frame_ct(header)) and "Rows" not in header:
        raise NotDicom(f"{path.name} is cut off before its pixels")
    return header


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


def split_stacks(slices: Sequence[Slice]) -> list[Stack]:
    """Slices of one series as even stacks, the longest first.

    Slices are grouped by orientation, matrix, pixel spacing, kernel, tube voltage and acquisition, frames by their
    stack and moment, too; then ordered along the normal and cut wherever the step changes, so that no stack bridges a
    gap. Copies of an image under another UID count once. Where several sweeps lie under one series they are told apart
    by the order of their instance numbers; images that share a position for no visible reason give no stack.
    """
    groups: dict[tuple[object, ...], list[Slice]] = {}
    for item in slices:
        groups.setdefault(_grid_key(item.header), []).append(item)
    if len(groups) > 1 and sum(len(group) == 1 for group in groups.values()) > len(groups) // 2:
        # makers that number every slice as an acquisition of its own
        groups = {}
        for item in slices:
            groups.setdefault(_grid_key(item.header)[:-1], []).append(item)
    stacks = [stack for group in groups.values() for stack in _even_runs(group)]
    return sorted(stacks, key=lambda stack: (-stack.coverage_mm, -len(stack.slices)))


def _grid_key(header: Dataset) -> tuple[object, ...]:
    orientation = tuple(round(float(value) / ORIENTATION_TOLERANCE) for value in header.ImageOrientationPatient)
    spacing = tuple(round(float(value), 4) for value in header.PixelSpacing)
    keywords = ("ConvolutionKernel", "KVP", "StackID", "TemporalPositionIndex", "AcquisitionNumber")
    made = tuple(str(header.get(keyword, "")) for keyword in keywords)
    return (orientation, spacing, header.get("Rows"), header.get("Columns"), *made)


def _even_runs(group: Sequence[Slice]) -> list[Stack]:
    if len(group) < MINIMUM_RUN:
        return []
    cosines = np.asarray(group[0].header.ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(cosines[:3], cosines[3:])
    ordered = sorted(group, key=lambda item: float(item.position_mm @ normal))
    if _shared_positions(ordered, normal):
        ordered = _without_copies(ordered, normal)
        if _shared_positions(ordered, normal):
            sweeps = _sweeps(group, normal)
            return [stack for sweep in sweeps for stack in _even_runs(sweep)] if len(sweeps) > 1 else []
    positions = np.stack([item.position_mm for item in ordered])
    steps = np.diff(positions, axis=0)
    runs: list[Stack] = []
    start = 0
    for end in range(1, len(ordered)):
        # the mean step so far: positions rounded to 0.1 mm make single steps differ by as much
        if (
            end == len(ordered) - 1
            or np.abs(steps[end] - steps[start:end].mean(axis=0)).max() > SPACING_TOLERANCE_MM + 1e-6
        ):
            if end - start >= MINIMUM_RUN - 1:
                run = slice(start, end + 1)
                runs.append(_stack(ordered[run], positions[run], cosines, len(ordered)))
            start = end
    return runs


def _shared_positions(ordered: Sequence[Slice], normal: npt.NDArray[np.float64]) -> bool:
    along = np.array([item.position_mm @ normal for item in ordered])
    return bool(np.any(np.diff(along) <= SPACING_TOLERANCE_MM))


def _without_copies(ordered: Sequence[Slice], normal: npt.NDArray[np.float64]) -> list[Slice]:
    """Of neighbours at one position with the same stored pixels only the first."""
    kept: list[Slice] = []
    for item in ordered:
        near = [other for other in kept[-4:] if abs((item.position_mm - other.position_mm) @ normal) <= 1e-3]
        if near and any(_pixel_digest(item) == _pixel_digest(other) for other in near):
            continue
        kept.append(item)
    return kept


def _pixel_digest(item: Slice) -> bytes:
    try:
        if item.frame_number is not None:
            return hashlib.sha256(next(read_frames(item.path, [item.frame_number])).tobytes()).digest()
        pixels = pydicom.dcmread(item.path, specific_tags=["PixelData"]).PixelData
    except _DECODE_ERRORS as error:
        raise _unreadable(item, error) from error
    return hashlib.sha256(pixels).digest()


def _sweeps(group: Sequence[Slice], normal: npt.NDArray[np.float64]) -> list[list[Slice]]:
    """Slices in the order of their instance numbers, cut wherever they turn back; one list when nothing tells."""
    numbers = [(item.header.get("InstanceNumber"), item.frame_number or 0) for item in group]
    if any(number is None for number, _ in numbers) or len(set(numbers)) < len(numbers):
        return [list(group)]
    ordered = sorted(group, key=lambda item: (int(item.header.InstanceNumber), item.frame_number or 0))
    sweeps: list[list[Slice]] = [ordered[:1]]
    direction = 0.0
    for before, item in itertools.pairwise(ordered):
        step = float((item.position_mm - before.position_mm) @ normal)
        turned = abs(step) <= SPACING_TOLERANCE_MM or step * direction < 0
        if turned:
            sweeps.append([])
        direction = 0.0 if turned else step
        sweeps[-1].append(item)
    return sweeps


def _stack(
    slices: Sequence[Slice], positions: npt.NDArray[np.float64], cosines: npt.NDArray[np.float64], of: int
) -> Stack:
    row_spacing, column_spacing = (float(value) for value in slices[0].header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 1] = cosines[3:] * row_spacing  # from one row to the next: along the column direction
    affine[:3, 2] = cosines[:3] * column_spacing
    affine[:3, 3] = positions[0]
    return Stack(tuple(slices), affine, of - len(slices))


def read_volume(stack: Stack) -> CtVolume:
    """Decode a stack's pixels to HU.

    Raises:
        PixelDataUnreadable: a slice's pixel data is cut off, corrupt or in an unsupported transfer syntax.
    """
    header = stack.header
    voxels = np.empty((len(stack.slices), int(header.Rows), int(header.Columns)), dtype=np.float32)
    for index, (item, pixels) in enumerate(_stored_values(stack.slices)):
        voxels[index] = _hounsfield(item, pixels)
    voxels[voxels < HIGHEST_PADDING_HU] = LOWEST_HU
    return CtVolume(voxels, stack.affine)


def _stored_values(slices: Sequence[Slice]) -> Iterator[tuple[Slice, npt.NDArray[np.integer[Any]]]]:
    """Slices with their pixels as stored; the frames of one file are read in one go, one at a time."""
    for path, group in itertools.groupby(slices, key=lambda item: item.path):
        items = list(group)
        numbers = [item.frame_number for item in items if item.frame_number is not None]
        frames = read_frames(path, numbers) if numbers else (pydicom.dcmread(path).pixel_array for _ in items)
        for item in items:
            try:
                pixels = next(frames)
            except (*_DECODE_ERRORS, StopIteration) as error:
                raise _unreadable(item, error) from error
            yield item, pixels


def _hounsfield(item: Slice, pixels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    header = item.header
    try:
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    except (AttributeError, TypeError, ValueError) as error:
        raise _unreadable(item, error) from error
    if pixels.ndim != 2:
        raise PixelDataUnreadable(f"slice {header.get('InstanceNumber', '?')} is not a single grey-scale frame")
    hounsfield = pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    hounsfield[_padded(header, pixels)] = LOWEST_HU
    return hounsfield


def _unreadable(item: Slice, error: Exception) -> PixelDataUnreadable:
    frame = "" if item.frame_number is None else f" frame {item.frame_number}"
    return PixelDataUnreadable(
        f"slice {item.header.get('InstanceNumber', '?')}{frame} ({type(error).__name__}, file {item.path.name}); "
        "send or copy the study again"
    )


def _padded(dataset: Dataset, pixels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Pixels at the Pixel Padding Value (0028,0120), or between it and the range limit (0028,0121)."""
    limits = [dataset.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    # some writers give the value with the sign that the pixels don't have: its bits are meant
    bits = 8 * pixels.dtype.itemsize
    values = [
        int(np.asarray(int(value) % 2**bits, dtype=f"u{pixels.dtype.itemsize}").view(pixels.dtype))
        for value in limits
        if isinstance(value, int)
    ]
    if not values or not isinstance(limits[0], int):
        return np.zeros(pixels.shape, dtype=bool)
    return np.asarray((pixels >= min(values)) & (pixels <= max(values)))


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
