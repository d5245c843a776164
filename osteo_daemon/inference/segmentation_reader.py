"""Vertebrae out of a DICOM segmentation, with pydicom alone: only the frames that hold a vertebra are decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import SegmentationStorage

from osteo_daemon.domain.findings import Level
from osteo_daemon.errors import PixelDataUnreadable, VertebraeUnusable
from osteo_daemon.imaging.decoder import decode
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.slices import PARSE_ERRORS
from osteo_daemon.inference.segment_codes import level_of_segment

MAXIMUM_FILE_BYTES = 2**30
"""A larger object is passed over: it is read whole, and no segmentation of one CT needs this much."""

MAXIMUM_PLANES = 4096
"""More than any CT has; a broken position must not eat the memory."""

GRID_TOLERANCE_MM = 0.2
"""A frame may lie this far from the even grid of all frames: positions are written rounded."""

_OCCUPIED = 0.5  # of Maximum Fractional Value, for FRACTIONAL segmentations (PS3.3 C.8.20.2.3)
_MALFORMED = (*PARSE_ERRORS, RuntimeError)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentedVertebrae:
    """What one segmentation object says.

    Attributes:
        regions: masks in LPS millimetres by level; body or whole vertebra, as its maker drew it.
        sha256: digest of the file.
    """

    sop_instance_uid: str
    sha256: str
    regions: dict[Level, Region]


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    number: int
    position_mm: npt.NDArray[np.float64]


def is_segmentation(header: Dataset) -> bool:
    """True for an object of Segmentation Storage."""
    return bool(header.get("SOPClassUID") == SegmentationStorage)


def read_segmentation(path: Path) -> SegmentedVertebrae:
    """Read the vertebrae T10 to L5 of a BINARY or FRACTIONAL segmentation.

    Raises:
        VertebraeUnusable: no vertebra in it, two segments for one vertebra, an uneven grid, or a malformed object.
    """
    try:
        if path.stat().st_size > MAXIMUM_FILE_BYTES:
            raise VertebraeUnusable(f"larger than {MAXIMUM_FILE_BYTES // 2**20} MiB")
        dataset = pydicom.dcmread(path)
        numbers = _segment_numbers(dataset)
        if not numbers:
            raise VertebraeUnusable("names no vertebra from T10 to L5")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return SegmentedVertebrae(str(dataset.SOPInstanceUID), digest, _regions(dataset, numbers))
    except _MALFORMED as error:
        # only the class: a library's message may quote a value
        raise VertebraeUnusable(f"cannot be read ({type(error).__name__})") from error


def _segment_numbers(dataset: Dataset) -> dict[int, Level]:
    found: dict[int, Level] = {}
    for segment in dataset.SegmentSequence:
        level = level_of_segment(segment)
        if level is None:
            continue
        if level in found.values():
            raise VertebraeUnusable(f"two segments stand for {level}")
        found[int(segment.SegmentNumber)] = level
    return found


def _regions(dataset: Dataset, numbers: dict[int, Level]) -> dict[Level, Region]:
    shared = dataset.SharedFunctionalGroupsSequence[0]
    groups = dataset.PerFrameFunctionalGroupsSequence
    if len(groups) != int(dataset.NumberOfFrames):
        raise VertebraeUnusable("frames and their descriptions differ in number")
    orientation = _constant(shared, groups, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = _constant(shared, groups, "PixelMeasuresSequence", "PixelSpacing")
    frames: dict[Level, list[_Frame]] = {}
    positions = []
    for number, group in enumerate(groups):
        own = "PlanePositionSequence" in group
        position = np.array((group if own else shared).PlanePositionSequence[0].ImagePositionPatient, dtype=np.float64)
        positions.append(position)
        segment = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        level = numbers.get(int(segment.ReferencedSegmentNumber))
        if level is not None:
            frames.setdefault(level, []).append(_Frame(number, position))
    grid = _Grid.of(np.stack(positions), orientation, spacing)
    regions = {level: grid.region(dataset, frames[level]) for level in sorted(frames, key=list(Level).index)}
    return {level: region for level, region in regions.items() if region.mask.any()}


def _constant(shared: Dataset, groups: Sequence[Dataset], sequence: str, keyword: str) -> npt.NDArray[np.float64]:
    """A value that all frames must share: given once, or by each frame alike."""
    holders = [shared] if sequence in shared else list(groups)
    values = np.array([[float(v) for v in holder[sequence].value[0][keyword].value] for holder in holders])
    if np.abs(values - values[0]).max() > 1e-4:
        raise VertebraeUnusable("its frames do not lie parallel on one grid")
    return np.asarray(values[0], dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """The even grid of all frames: (4, 4) affine of index (d, h, w, 1) to LPS mm, D along the frames' normal."""

    affine: npt.NDArray[np.float64]
    normal: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, positions: npt.NDArray[np.float64], orientation: npt.NDArray[np.float64], spacing: npt.NDArray[np.float64]
    ) -> _Grid:
        normal = np.cross(orientation[:3], orientation[3:])
        if not 0.99 < np.linalg.norm(normal) < 1.01 or not (spacing > 0).all() or not np.isfinite(positions).all():
            raise VertebraeUnusable("its geometry is no geometry")
        heights = positions @ normal
        order = np.argsort(heights)
        steps = np.diff(heights[order])
        steps = steps[steps > GRID_TOLERANCE_MM / 2]
        if not len(steps):
            raise VertebraeUnusable("all its frames lie in one plane")
        # frames are sparse: the smallest step is the grid's, the others are multiples of it
        multiples = np.rint(steps / steps.min())
        step = float((steps.sum()) / multiples.sum())
        low, high = positions[order[0]], positions[order[-1]]
        count = round(float((heights.max() - heights.min()) / step))
        if count > MAXIMUM_PLANES:
            raise VertebraeUnusable(f"a grid of {count} planes")
        affine = np.eye(4)
        affine[:3, 0] = (high - low) / count  # under gantry tilt not parallel to the normal
        affine[:3, 1] = orientation[3:] * spacing[0]
        affine[:3, 2] = orientation[:3] * spacing[1]
        affine[:3, 3] = low
        grid = cls(affine, normal)
        expected = low + grid.indices(positions)[:, None] * affine[:3, 0]
        if np.abs(expected - positions).max() > GRID_TOLERANCE_MM:
            raise VertebraeUnusable("its frames do not lie on an even grid")
        return grid

    def indices(self, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """(n,) plane numbers of (n, 3) frame positions."""
        along = (positions - self.affine[:3, 3]) @ self.normal
        return np.rint(along / (self.affine[:3, 0] @ self.normal)).astype(np.int64)

    def region(self, dataset: Dataset, frames: Sequence[_Frame]) -> Region:
        """The mask of one segment, cut to its extent."""
        planes = self.indices(np.stack([frame.position_mm for frame in frames]))
        if len(set(planes.tolist())) != len(planes):
            raise VertebraeUnusable("a segment has two frames in one plane")
        first = int(planes.min())
        mask = np.zeros((int(planes.max()) - first + 1, int(dataset.Rows), int(dataset.Columns)), dtype=bool)
        for plane, pixels in zip(planes, _pixels(dataset, [frame.number for frame in frames]), strict=True):
            mask[plane - first] = pixels
        filled = np.argwhere(mask)
        begin, end = (filled.min(axis=0), filled.max(axis=0) + 1) if len(filled) else (np.zeros(3, int),) * 2
        affine = self.affine.copy()
        corner = begin + np.array([first, 0, 0])
        affine[:3, 3] += affine[:3, :3] @ corner
        cut = tuple(slice(int(a), int(b)) for a, b in zip(begin, end, strict=True))
        return Region(np.ascontiguousarray(mask[cut]), affine)


def _pixels(dataset: Dataset, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.bool_]]:
    """The frames with these numbers (from 0), in this order, as (rows, columns) masks."""
    shape = (int(dataset.Rows), int(dataset.Columns))
    fractional = str(dataset.SegmentationType) == "FRACTIONAL"
    threshold = _OCCUPIED * float(dataset.MaximumFractionalValue) if fractional else 0.5
    if int(dataset.BitsAllocated) == 1 and not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        size, data = shape[0] * shape[1], np.frombuffer(dataset.PixelData, dtype=np.uint8)
        for number in numbers:
            # frames follow each other without padding: one need not begin at a byte (PS3.5 8.1.1, annex D)
            begin, end = number * size, (number + 1) * size
            bits = np.unpackbits(data[begin // 8 : -(-end // 8)], bitorder="little")[begin % 8 :][:size]
            yield bits.reshape(shape) > threshold
        return
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        for number in numbers:
            (frame,) = iter_pixels(dataset, indices=[number])
            yield np.asarray(frame).reshape(shape) >= threshold
        return
    try:
        for frame in decode([(Path(str(dataset.filename)), [number + 1 for number in numbers])]):
            yield np.asarray(frame).reshape(shape) >= threshold
    except PixelDataUnreadable as error:
        raise VertebraeUnusable(f"its frames cannot be decoded ({error.detail})") from error
