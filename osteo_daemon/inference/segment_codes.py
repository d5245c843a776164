"""Which vertebra a segment stands for: by its codes, else by its label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pydicom.dataset import Dataset

from osteo_daemon.domain.findings import Level
from osteo_daemon.errors import VertebraeUnusable

SNOMED_SCHEMES = frozenset({"SCT", "SRT", "SNM3", "99SDM"})
"""SNOMED CT and the designators under which SNOMED RT codes were written before (PS3.16 8.1)."""

LEVEL_BY_CODE: Mapping[str, Level] = MappingProxyType(
    {
        # PS3.16 CID 7602: SNOMED CT, then the SNOMED RT code of the same concept
        "7610001": Level.T10,
        "T-117A0": Level.T10,
        "12989004": Level.T11,
        "T-117B0": Level.T11,
        "23215003": Level.T12,
        "T-117C0": Level.T12,
        "66794005": Level.L1,
        "T-11910": Level.L1,
        "14293000": Level.L2,
        "T-11920": Level.L2,
        "36470004": Level.L3,
        "T-11930": Level.L3,
        "11994002": Level.L4,
        "T-11940": Level.L4,
        "49668003": Level.L5,
        "T-11950": Level.L5,
    }
)

_UNNAMED_BONE = frozenset(
    {
        # types under which a label may name the vertebra; SNOMED CT, then SNOMED RT
        "51282000",  # vertebra
        "T-11510",
        "272673000",  # bone
        "T-D016E",
        "85756007",  # tissue: what editors write for a segment without a type of its own
        "T-D0050",
        "91723000",  # anatomical structure
        "T-D0005",
        "123037004",  # body structure
        "T-D000A",
    }
)
_LABEL = re.compile(
    r"(?:vertebrae?|vertebral body|spine|bone|ct)?[ _-]*(?P<level>t1[0-2]|l[1-5])"
    r"(?:[ _-]*(?:vertebrae?|vertebral|bone|body|corpus))*",
    re.IGNORECASE,
)


def level_of_label(label: str) -> Level | None:
    """The vertebra that a label such as ``vertebrae_L1``, ``L1`` or ``L1 vertebral body`` names; None for any other."""
    match = _LABEL.fullmatch(label.strip())
    return None if match is None else Level(match["level"].upper())


def level_of_segment(segment: Dataset) -> Level | None:
    """The vertebra that an item of Segment Sequence (0062,0002) stands for; None when it is something else.

    The property type decides. A type that only says bone, vertebra or tissue leaves it to the anatomic region, then to
    the label; any other type (a disc, a measurement region) is no vertebra, whatever its label says.

    Raises:
        VertebraeUnusable: code and label name different vertebrae.
    """
    kind = _snomed(segment, "SegmentedPropertyTypeCodeSequence")
    labelled = level_of_label(str(segment.get("SegmentLabel") or ""))
    coded = LEVEL_BY_CODE.get(kind)
    if coded is None and kind in _UNNAMED_BONE:
        coded = LEVEL_BY_CODE.get(_snomed(segment, "AnatomicRegionSequence"), labelled)
    if coded is not None and labelled is not None and coded is not labelled:
        raise VertebraeUnusable(f"a segment's code says {coded}, its label {labelled}")
    return coded


def _snomed(segment: Dataset, keyword: str) -> str:
    for item in segment.get(keyword) or ():
        if item.get("CodingSchemeDesignator") in SNOMED_SCHEMES:
            return str(item.get("CodeValue") or "")
    return ""
