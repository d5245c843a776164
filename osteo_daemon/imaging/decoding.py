"""Stored pixels to Hounsfield units, one image or frame at a time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from osteo_daemon.errors import PixelDataUnreadable
from osteo_daemon.imaging.enhanced import read_frames
from osteo_daemon.imaging.slices import Slice, Stack
from osteo_daemon.imaging.volume import CtVolume

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


def pixel_digest(item: Slice) -> bytes:
    """SHA-256 of a slice's pixels: as stored, or as decoded for a frame.

    Raises:
        PixelDataUnreadable: as `read_volume`.
    """
    try:
        if item.frame_number is not None:
            return hashlib.sha256(next(read_frames(item.path, [item.frame_number])).tobytes()).digest()
        pixels = pydicom.dcmread(item.path, specific_tags=["PixelData"]).PixelData
    except _DECODE_ERRORS as error:
        raise _unreadable(item, error) from error
    return hashlib.sha256(pixels).digest()
