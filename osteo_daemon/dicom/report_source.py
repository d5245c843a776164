"""Where a report's identity and references come from: the headers of the source series."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from osteo_daemon.errors import Damaged
from osteo_daemon.imaging.region import Region

UTF_8 = "ISO_IR 192"
_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_GEOMETRY_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "InstanceNumber",
    "ReferencedFrameNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "Rows",
    "Columns",
)
_TYPE_2_KEYWORDS = (
    # type 2 attributes of the Patient and General Study modules: present, perhaps empty (PS3.3 C.7.1.1, C.7.2.1)
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


class VertebraRegions(Protocol):
    """Regions of one vertebra: its body and the trabecular region that was measured (None when there was none)."""

    @property
    def body(self) -> Region:
        """The vertebral body."""

    @property
    def trabecular(self) -> Region | None:
        """The measured region inside the body."""


@dataclass(frozen=True, slots=True, eq=False)
class ReportSource:
    """The source series.

    Attributes:
        headers: one dataset without pixels per slice, in the order of the volume's D axis; a frame of a multi-frame
            object says in ReferencedFrameNumber (0008,1160) which one it is.
    """

    headers: tuple[Dataset, ...]

    def __init__(self, headers: Iterable[Dataset]) -> None:
        object.__setattr__(self, "headers", tuple(headers))
        if not self.headers:
            raise ValueError("a report needs at least one header of its source study")


def clean_headers(source: ReportSource) -> tuple[Dataset, ...]:
    """The headers as report objects inherit them: Unicode, without private or pixel attributes.

    The first keeps every public attribute below group 0028 (identity, equipment, procedure); each of the others shares
    its elements and has its own geometry. Missing type 2 attributes are there and empty; dates, times and sexes that
    are no legal values are emptied, since no report must fail or invent because of them.

    Raises:
        Damaged: a slice lacks its SOP Instance UID.
    """
    first = _identity(source.headers[0])
    cleaned = []
    for header in source.headers:
        slice_header = Dataset()
        slice_header.update(first)
        for keyword in _GEOMETRY_KEYWORDS:
            if keyword in header:
                slice_header[keyword] = header[keyword]
        if not slice_header.get("SOPInstanceUID"):
            raise Damaged("a source slice has no SOP Instance UID")
        cleaned.append(slice_header)
    return tuple(cleaned)


def frame_number(header: Dataset) -> int | None:
    """Which frame of its object a slice is, from 1 on; None for an object of one image."""
    number = header.get("ReferencedFrameNumber")
    return None if number is None else int(number)


def instances(slices: Iterable[Dataset]) -> tuple[Dataset, ...]:
    """Of slices that are frames of one object only the first: every object once, as evidence is listed."""
    found: dict[str, Dataset] = {}
    for header in slices:
        found.setdefault(str(header.SOPInstanceUID), header)
    return tuple(found.values())


def _identity(header: Dataset) -> Dataset:
    public = Dataset()
    for element in header:
        if not element.tag.is_private and element.tag.group < 0x0028:
            public.add(copy.deepcopy(element))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values of the patient
        public.decode()
    _forget_character_sets(public)
    public.SpecificCharacterSet = UTF_8
    public.setdefault("SOPClassUID", CTImageStorage)
    for keyword in _TYPE_2_KEYWORDS:
        if public.get(keyword) is None:
            setattr(public, keyword, "")
    _empty_unless(public, ("StudyDate", "PatientBirthDate", "SeriesDate", "AcquisitionDate"), _DATE)
    _empty_unless(public, ("StudyTime", "SeriesTime", "AcquisitionTime"), _TIME)
    if public.PatientSex not in ("M", "F", "O"):
        public.PatientSex = ""
    if not public.get("DeidentificationMethod"):
        public.pop("DeidentificationMethod", None)
        if public.get("PatientIdentityRemoved") == "YES" and not public.get("DeidentificationMethodCodeSequence"):
            # type 1C beside the flag (PS3.3 C.7.1.1): the flag stays, and a method isn't invented
            public.DeidentificationMethod = "not recorded in the source"
    for keyword in ("PatientName", "ReferringPhysicianName"):
        setattr(public, keyword, _with_delimiter(str(public[keyword].value or "")))
    return public


def _with_delimiter(name: str) -> str:
    # A name of one component alone has the retired form of ACR-NEMA. With the delimiter it is the family name, and
    # the same name: trailing delimiters may be there or not (PS3.5 6.2.1.1).
    groups = name.split("=")
    return "=".join([f"{group}^" if group and "^" not in group else group for group in groups[:1]] + groups[1:])


def _forget_character_sets(dataset: Dataset) -> None:
    # nested items inherit the character set of the root (PS3.3 C.12.1.1.2)
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                item.pop("SpecificCharacterSet", None)
                _forget_character_sets(item)


def _empty_unless(dataset: Dataset, keywords: tuple[str, ...], pattern: re.Pattern[str]) -> None:
    for keyword in keywords:
        value: Any = dataset.get(keyword)
        if value is not None and not pattern.fullmatch(str(value).strip()):
            setattr(dataset, keyword, "")
