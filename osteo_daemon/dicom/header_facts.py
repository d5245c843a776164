"""What the header of a stored CT object says of its place in its series, read without its pixels.

Read by the scheduler, never while an object is received. Only the head of a file is looked at: what is not there, or
is deflated, is unknown, and unknown proves nothing.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from osteo_daemon.dicom.contexts import DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
from osteo_daemon.domain.slice_order import ImageFacts

_HEAD_BYTES = 128 * 1024
_TAGS = [
    "ImageType",
    "AcquisitionNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "ImagesInAcquisition",
    "ConcatenationUID",
    "InConcatenationTotalNumber",
]
_MULTI_FRAME = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
_UNREADABLE = (
    InvalidDicomError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    NotImplementedError,
    AttributeError,
    TypeError,
    LookupError,
    RecursionError,
    OverflowError,  # an infinite number
    BytesLengthException,
    struct.error,
)


def read_facts(path: Path, sop_class_uid: str, series_instance_uid: str, transfer_syntax_uid: str) -> ImageFacts:
    """Facts of one stored object; all unknown where its header cannot be read."""
    unknown = ImageFacts(series_instance_uid, multi_frame=sop_class_uid in _MULTI_FRAME)
    if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        return unknown
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        header = pydicom.dcmread(io.BytesIO(head), stop_before_pixels=True, specific_tags=_TAGS)
        concatenation = header.get("ConcatenationUID")
        return ImageFacts(
            series_instance_uid=series_instance_uid,
            instance_number=_whole(header, "InstanceNumber"),
            acquisition_number=_whole(header, "AcquisitionNumber"),
            images_in_acquisition=_whole(header, "ImagesInAcquisition"),
            position_mm=_numbers(header, "ImagePositionPatient", 3),
            directions=_numbers(header, "ImageOrientationPatient", 6),
            localizer="LOCALIZER" in (header.get("ImageType") or ()),
            multi_frame=unknown.multi_frame,
            concatenation_uid=str(concatenation) if concatenation else None,
            parts=_whole(header, "InConcatenationTotalNumber"),
        )
    except _UNREADABLE:
        return unknown


def _whole(header: Dataset, keyword: str) -> int | None:
    value = header.get(keyword)
    return None if value is None or value == "" else int(value)


def _numbers(header: Dataset, keyword: str, count: int) -> Any:
    values = header.get(keyword)
    if values is None or len(values) != count:
        return None
    numbers = tuple(float(value) for value in values)
    return numbers if all(map(math.isfinite, numbers)) else None
