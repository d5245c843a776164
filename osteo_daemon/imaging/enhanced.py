"""Multi-frame CT: each frame as the header of a single image, and its pixels one frame at a time.

Enhanced CT (PS3.3 A.38) and Legacy Converted Enhanced CT (A.70) keep a frame's geometry, scale and acquisition in
functional groups (C.7.6.16), shared by all frames or of one frame. A frame's header made here has them where a CT image
has them, so that every rule for slices holds for frames as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

MULTI_FRAME_CT: Final = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

_GROUPS: Final = (
    "UnassignedSharedConvertedAttributesSequence",  # of legacy converted images: tube voltage, kernel and the like
    "UnassignedPerFrameConvertedAttributesSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "CTImageFrameTypeSequence",
    "CTAcquisitionTypeSequence",
    "CTAcquisitionDetailsSequence",
    "CTReconstructionSequence",
    "CTXRayDetailsSequence",
    "ContrastBolusUsageSequence",
)
_RENAMED: Final = {"FrameType": "ImageType", "FrameAcquisitionNumber": "AcquisitionNumber"}


def is_multi_frame_ct(header: Dataset) -> bool:
    """Whether an object holds CT images as frames."""
    return header.SOPClassUID in MULTI_FRAME_CT


def frame_headers(header: Dataset) -> tuple[Dataset, ...]:
    """One header per frame, in the order of the frames; none when the functional groups don't fit the frames.

    Each shares the object's elements and has its own values of the functional groups. ReferencedFrameNumber
    (0008,1160) says which frame of the object it is, from 1 on, as a reference to the frame does.
    """
    groups: Sequence[Dataset] = header.get("PerFrameFunctionalGroupsSequence") or ()
    try:
        count = int(header.get("NumberOfFrames") or 0)
    except (TypeError, ValueError):  # several values
        return ()
    if not groups or len(groups) != count:
        return ()
    base = Dataset()
    base.update(header)
    base.pop("PerFrameFunctionalGroupsSequence", None)
    base.pop("SharedFunctionalGroupsSequence", None)
    for item in header.get("SharedFunctionalGroupsSequence") or ():
        _lay_open(item, base)
    _name_agent(header, base)
    return tuple(_frame_header(base, group, number) for number, group in enumerate(groups, start=1))


def _frame_header(base: Dataset, group: Dataset, number: int) -> Dataset:
    frame = Dataset()
    frame.update(base)
    _lay_open(group, frame)
    if frame.get("ContrastBolusAgentAdministered") == "NO":
        _put(frame, "ContrastBolusAgent", "NONE")
    _put(frame, "ReferencedFrameNumber", number)
    return frame


def _lay_open(group: Dataset, into: Dataset) -> None:
    for name in _GROUPS:
        for item in group.get(name) or ():
            into.update(item)
            for keyword, usual in _RENAMED.items():
                if keyword in item:
                    _put(into, usual, item[keyword].value)


def _put(dataset: Dataset, keyword: str, value: object) -> None:
    # setting the attribute would change the element that other frames share
    dataset.add_new(keyword, dictionary_VR(keyword), value)


def _name_agent(header: Dataset, base: Dataset) -> None:
    # the Enhanced Contrast/Bolus module has codes where a CT image has a text (PS3.3 C.7.6.4b)
    agents = [str(item.get("CodeMeaning") or "") for item in header.get("ContrastBolusAgentSequence") or ()]
    if agents and not base.get("ContrastBolusAgent"):
        _put(base, "ContrastBolusAgent", agents[0])


def read_frames(path: Path, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """Stored values of frames, (rows, columns) each, in the order asked for; one frame is in memory at a time.

    Args:
        numbers: from 1 on.

    Raises:
        OSError, ValueError, ...: as pydicom raises them for a file that can't be decoded.
    """
    indices = [number - 1 for number in numbers]
    meta = pydicom.filereader.read_file_meta_info(path)
    # a deflated file has no place to seek to: it's inflated whole
    deflated = meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    yield from iter_pixels(pydicom.dcmread(path) if deflated else path, indices=indices)
