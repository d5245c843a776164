"""Whether two objects under one SOP Instance UID show the same image: compared in a child with bounded memory and time.

What decides: decoded pixels and everything that gives them place and meaning; of an object without pixels, all but
whose it is. A decoder meets bytes from the network here, so it never runs in the process that answers the PACS.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Any

from osteo_daemon.child import confine
from osteo_daemon.errors import NotDicom

_MEMORY_BYTES = 4 << 30
_CPU_SECONDS = 60
_WALL_SECONDS = 90.0
_ONE_AT_A_TIME = threading.Lock()

_IMAGE_ELEMENTS = (
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsStored",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PixelPaddingValue",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PatientPosition",
    "FrameOfReferenceUID",
    "GantryDetectorTilt",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


_IDENTITY_GROUPS = frozenset((0x0010, 0x0032, 0x0038))
_IDENTITY_ELEMENTS = frozenset(
    (
        "SpecificCharacterSet",
        "InstanceCoercionDateTime",
        "TimezoneOffsetFromUTC",
        "StudyDate",
        "StudyTime",
        "StudyDescription",
        "StudyID",
        "AccessionNumber",
        "IssuerOfAccessionNumberSequence",
        "ReferringPhysicianName",
        "InstitutionName",
        "RequestAttributesSequence",
        "ReferencedRequestSequence",
        "OriginalAttributesSequence",
    )
)
"""What the correction of a patient or an order changes, beside the groups of patient, request and visit."""


class Comparison(StrEnum):
    """How two objects under one UID relate."""

    IDENTICAL = "identical data set"
    SAME_IMAGE = "same pixels and geometry"  # of an object without pixels: the same of another patient or order
    DIFFERENT = "other pixels or geometry"
    UNDECIDED = "could not be compared"


def compare_objects(stored: Path, received: Path) -> Comparison:
    """Compare two Part 10 files; UNDECIDED when the child needs too much or cannot read one of them."""
    with _ONE_AT_A_TIME:
        try:
            child = subprocess.run(
                [sys.executable, "-m", "osteo_daemon.dicom.compare", str(stored), str(received)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_WALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Comparison.UNDECIDED
    word = child.stdout.decode("ascii", "replace").strip()
    if child.returncode != 0 or word not in Comparison.__members__:
        return Comparison.UNDECIDED
    return Comparison[word]


def compare_files(stored: Path, received: Path) -> Comparison:
    """The comparison itself, in this process; for the child and for tests.

    Raises:
        NotDicom: a file cannot be read.
    """
    first, second = _read(stored), _read(received)
    if first.file_meta.TransferSyntaxUID == second.file_meta.TransferSyntaxUID and first == second:
        return Comparison.IDENTICAL
    if any(first.get(name) != second.get(name) for name in _IMAGE_ELEMENTS):
        return Comparison.DIFFERENT
    if "PixelData" not in first and "PixelData" not in second:
        # a document's content is what counts, and any change of it is another object
        return Comparison.SAME_IMAGE if _content(first) == _content(second) else Comparison.DIFFERENT
    if ("PixelData" in first) != ("PixelData" in second):
        return Comparison.DIFFERENT
    return Comparison.SAME_IMAGE if _same_pixels(first, second) else Comparison.DIFFERENT


def _read(path: Path) -> Any:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        return dcmread(path)
    except (InvalidDicomError, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise NotDicom(type(error).__name__) from error


def _content(dataset: Any) -> dict[int, Any]:
    """The elements of a data set that do not tell whose it is, by tag."""
    return {
        int(element.tag): element
        for element in dataset
        if element.tag.group not in _IDENTITY_GROUPS and element.keyword not in _IDENTITY_ELEMENTS
    }


def _same_pixels(first: Any, second: Any) -> bool:
    import numpy as np
    from pydicom.pixels.utils import pixel_array

    return bool(np.array_equal(pixel_array(first, raw=True), pixel_array(second, raw=True)))


def _main(arguments: list[str]) -> int:
    from osteo_daemon.imaging.codecs import choose_decoders

    choose_decoders()
    confine(_MEMORY_BYTES, cpu_seconds=_CPU_SECONDS)
    sys.stdout.write(compare_files(Path(arguments[0]), Path(arguments[1])).name)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
