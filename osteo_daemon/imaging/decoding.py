"""Stored pixels to Hounsfield units, one image or frame at a time."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from osteo_daemon.errors import PixelDataUnreadable
from osteo_daemon.imaging.decoder import Wanted, decode
from osteo_daemon.imaging.enhanced import read_frames
from osteo_daemon.imaging.slices import PARSE_ERRORS, Slice, Stack
from osteo_daemon.imaging.volume import CtVolume

LOWEST_HU = -1024.0
"""Padding outside the reconstruction circle is raised to this."""

HIGHEST_PADDING_HU = -1400.0
"""Padding lies below (GE -2000 or -3024, Siemens -8192, declared or not), no measured air does: a scale that is a third
too large still shows as itself."""

MAXIMUM_VOXELS = 1 << 32
"""4096 slices of 1024 x 1024: more is a header's lie, not a scan."""

_NATIVE = frozenset((ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian))
"""Transfer syntaxes whose pixels lie in the file as they are: no decoder, no more memory than bytes were sent."""

_DECODE_ERRORS = (*PARSE_ERRORS, RuntimeError)


def read_volume(stack: Stack) -> CtVolume:
    """Decode a stack's pixels to HU.

    Raises:
        PixelDataUnreadable: a slice's pixel data is cut off, corrupt or in an unsupported transfer syntax.
    """
    header = stack.header
    shape = (len(stack.slices), int(header.Rows), int(header.Columns))
    if math.prod(shape) > MAXIMUM_VOXELS:
        raise PixelDataUnreadable(f"{shape[0]} images of {shape[1]} x {shape[2]} pixels are no scan")
    voxels: npt.NDArray[np.float32] | None = None
    with closing(_stored_values(stack.slices)) as images:
        for index, (item, pixels) in enumerate(images):
            hounsfield = _hounsfield(item, pixels)
            if hounsfield.shape != shape[1:]:
                raise PixelDataUnreadable(f"slice {_number(item)} has other rows and columns than its header says")
            if voxels is None:  # not before the first image proved that there is one of this size
                voxels = np.empty(shape, dtype=np.float32)
            voxels[index] = hounsfield
    if voxels is None:
        raise PixelDataUnreadable("there is no image")
    voxels[voxels < HIGHEST_PADDING_HU] = LOWEST_HU
    return CtVolume(voxels, stack.affine)


def _stored_values(slices: Sequence[Slice]) -> Generator[tuple[Slice, npt.NDArray[Any]]]:
    """Slices with their pixels as stored, one at a time; compressed ones by a process of their own."""
    for native, run in itertools.groupby(slices, key=_is_native):
        files = [(path, list(group)) for path, group in itertools.groupby(run, key=lambda item: item.path)]
        items = [item for _, group in files for item in group]
        wanted = [(path, [item.frame_number for item in group if item.frame_number]) for path, group in files]
        values = _native_values(wanted) if native else decode(wanted)
        with closing(values):
            for item in items:
                try:
                    yield item, next(values)
                except (*_DECODE_ERRORS, StopIteration) as error:
                    raise _unreadable(item, type(error).__name__) from error
                except PixelDataUnreadable as error:
                    raise _unreadable(item, error.detail) from error


def _native_values(wanted: Wanted) -> Generator[npt.NDArray[Any]]:
    for path, numbers in wanted:
        if numbers:
            yield from read_frames(path, numbers)
        else:
            yield pydicom.dcmread(path).pixel_array


def _is_native(item: Slice) -> bool:
    try:
        meta = getattr(item.header, "file_meta", None) or pydicom.filereader.read_file_meta_info(item.path)
        return meta.get("TransferSyntaxUID") in _NATIVE
    except _DECODE_ERRORS as error:
        raise _unreadable(item, type(error).__name__) from error


def _hounsfield(item: Slice, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    header = item.header
    try:
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    except (AttributeError, TypeError, ValueError) as error:
        raise _unreadable(item, type(error).__name__) from error
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu":
        raise PixelDataUnreadable(f"slice {_number(item)} is not a single grey-scale frame")
    hounsfield = pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    hounsfield[_padded(header, pixels)] = LOWEST_HU
    return hounsfield


def _unreadable(item: Slice, why: str) -> PixelDataUnreadable:
    frame = "" if item.frame_number is None else f" frame {item.frame_number}"
    return PixelDataUnreadable(
        f"slice {_number(item)}{frame} ({why}, file {item.path.name}); send or copy the study again"
    )


def _number(item: Slice) -> str:
    number = item.header.get("InstanceNumber")
    return str(number) if isinstance(number, int) else "?"  # never what a sender put in its place


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
    """SHA-256 of a slice's pixels as they lie in the file: nothing is decoded.

    Raises:
        PixelDataUnreadable: there are none.
    """
    try:
        if item.frame_number is None:
            return hashlib.sha256(pydicom.dcmread(item.path, specific_tags=["PixelData"]).PixelData).digest()
        if _is_native(item):
            return hashlib.sha256(next(read_frames(item.path, [item.frame_number])).tobytes()).digest()
        count = int(item.header.NumberOfFrames)
        pixels = pydicom.dcmread(item.path, specific_tags=["PixelData"])
        return hashlib.sha256(_stored_frame(pixels, item.frame_number, count)).digest()
    except _DECODE_ERRORS as error:
        raise _unreadable(item, type(error).__name__) from error


def _stored_frame(dataset: Dataset, number: int, count: int) -> bytes:
    data = dataset.PixelData
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return get_frame(data, number - 1, number_of_frames=count)
    size = len(data) // count  # deflated, and inflated with the rest of the file
    return bytes(data[(number - 1) * size : number * size])
