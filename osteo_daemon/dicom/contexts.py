"""What the node accepts: a short explicit list of storage classes and the transfer syntaxes a CT can arrive in.

A class refused at association time fails many senders' whole study, so the objects that usually travel with a CT are
accepted too; the settings say for each group of them whether they are kept. Names and values from PS3.6 annex A.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from pydicom.uid import UID
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext

VERIFICATION = "1.2.840.10008.1.1"

_STORAGE = "1.2.840.10008.5.1.4.1.1"

SCREENED_CLASSES = (
    f"{_STORAGE}.2",  # CT Image Storage
    f"{_STORAGE}.2.1",  # Enhanced CT Image Storage
    f"{_STORAGE}.2.2",  # Legacy Converted Enhanced CT Image Storage
)
"""Classes that make a study a candidate for screening."""


class Accompanying(StrEnum):
    """Groups of objects that travel with a CT; the names of the settings of ``[accompanying]``."""

    PICTURES = "pictures"
    DOCUMENTS = "documents"
    PRESENTATIONS = "presentations"
    SEGMENTATIONS = "segmentations"
    RADIOTHERAPY = "radiotherapy"
    PET = "pet"
    RAW = "raw"


ACCOMPANYING: Mapping[Accompanying, tuple[str, ...]] = MappingProxyType(
    {
        Accompanying.PICTURES: (
            f"{_STORAGE}.7",  # Secondary Capture Image: screens, dose tables, scanned papers
            f"{_STORAGE}.7.1",  # Multi-frame Single Bit Secondary Capture
            f"{_STORAGE}.7.2",  # Multi-frame Grayscale Byte Secondary Capture
            f"{_STORAGE}.7.3",  # Multi-frame Grayscale Word Secondary Capture
            f"{_STORAGE}.7.4",  # Multi-frame True Color Secondary Capture
        ),
        Accompanying.DOCUMENTS: (
            f"{_STORAGE}.88.11",  # Basic Text SR
            f"{_STORAGE}.88.22",  # Enhanced SR
            f"{_STORAGE}.88.33",  # Comprehensive SR
            f"{_STORAGE}.88.34",  # Comprehensive 3D SR
            f"{_STORAGE}.88.35",  # Extensible SR
            f"{_STORAGE}.88.40",  # Procedure Log
            f"{_STORAGE}.88.59",  # Key Object Selection Document
            f"{_STORAGE}.88.65",  # Chest CAD SR
            f"{_STORAGE}.88.67",  # X-Ray Radiation Dose SR
            f"{_STORAGE}.88.68",  # Radiopharmaceutical Radiation Dose SR
            f"{_STORAGE}.88.69",  # Colon CAD SR
            f"{_STORAGE}.88.71",  # Acquisition Context SR
            f"{_STORAGE}.88.73",  # Patient Radiation Dose SR
            f"{_STORAGE}.88.74",  # Planned Imaging Agent Administration SR
            f"{_STORAGE}.88.75",  # Performed Imaging Agent Administration SR
            f"{_STORAGE}.88.76",  # Enhanced X-Ray Radiation Dose SR
            f"{_STORAGE}.90.1",  # Content Assessment Results
            f"{_STORAGE}.104.1",  # Encapsulated PDF
            f"{_STORAGE}.104.2",  # Encapsulated CDA
            f"{_STORAGE}.200.1",  # CT Defined Procedure Protocol
            f"{_STORAGE}.200.2",  # CT Performed Procedure Protocol
            f"{_STORAGE}.200.3",  # Protocol Approval
        ),
        Accompanying.PRESENTATIONS: (
            f"{_STORAGE}.11.1",  # Grayscale Softcopy Presentation State
            f"{_STORAGE}.11.2",  # Color Softcopy Presentation State
            f"{_STORAGE}.11.3",  # Pseudo-Color Softcopy Presentation State
            f"{_STORAGE}.11.4",  # Blending Softcopy Presentation State
            f"{_STORAGE}.11.6",  # Grayscale Planar MPR Volumetric Presentation State
            f"{_STORAGE}.11.7",  # Compositing Planar MPR Volumetric Presentation State
            f"{_STORAGE}.11.8",  # Advanced Blending Presentation State
            f"{_STORAGE}.11.9",  # Volume Rendering Volumetric Presentation State
            f"{_STORAGE}.11.10",  # Segmented Volume Rendering Volumetric Presentation State
            f"{_STORAGE}.11.11",  # Multiple Volume Rendering Volumetric Presentation State
            f"{_STORAGE}.131",  # Basic Structured Display
        ),
        Accompanying.SEGMENTATIONS: (
            f"{_STORAGE}.66.4",  # Segmentation: read for vertebrae, see docs/vertebrae.md
            f"{_STORAGE}.66.5",  # Surface Segmentation
            f"{_STORAGE}.66.7",  # Label Map Segmentation
            f"{_STORAGE}.66.1",  # Spatial Registration
            f"{_STORAGE}.66.2",  # Spatial Fiducials
            f"{_STORAGE}.66.3",  # Deformable Spatial Registration
            f"{_STORAGE}.67",  # Real World Value Mapping
            f"{_STORAGE}.30",  # Parametric Map
        ),
        Accompanying.RADIOTHERAPY: (
            f"{_STORAGE}.481.3",  # RT Structure Set, with planning CT
            f"{_STORAGE}.481.5",  # RT Plan
            f"{_STORAGE}.481.2",  # RT Dose
        ),
        Accompanying.PET: (
            f"{_STORAGE}.128",  # Positron Emission Tomography Image, in the study of a PET/CT
            f"{_STORAGE}.128.1",  # Legacy Converted Enhanced PET Image
            f"{_STORAGE}.130",  # Enhanced PET Image
        ),
        Accompanying.RAW: (
            f"{_STORAGE}.66",  # Raw Data
            "1.3.12.2.1107.5.9.1",  # private, named below
            "1.3.12.2.1107.5.99.3.10",
            "1.3.12.2.1107.5.99.3.11",
            "1.2.840.113619.4.26",
            "1.2.840.113619.4.27",
            "1.2.840.113619.4.30",
        ),
    }
)
"""Classes that travel with a CT, by group: acknowledged, never a reason to screen."""

PRIVATE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "1.3.12.2.1107.5.9.1": "Siemens CSA Non-Image Storage",
        "1.3.12.2.1107.5.99.3.10": "Siemens CT MR Volume Storage",
        "1.3.12.2.1107.5.99.3.11": "Siemens AX Frame Sets Storage",
        "1.2.840.113619.4.26": "GE 3D Model Storage",
        "1.2.840.113619.4.27": "GE eNTEGRA Protocol or NM Genie Storage",
        "1.2.840.113619.4.30": "GE PET Raw Data Storage",
    }
)
"""Names that PS3.6 does not have."""

_NEW_NAMES = {f"{_STORAGE}.66.7": "Label Map Segmentation Storage"}  # younger than pydicom's dictionary

ACCOMPANYING_CLASSES = tuple(uid for group in ACCOMPANYING.values() for uid in group)
"""All of them."""

_GROUP_OF = {uid: group for group, uids in ACCOMPANYING.items() for uid in uids}

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1.99"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"

TRANSFER_SYNTAXES = (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, Non-Hierarchical, First-Order Prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless, Non-Hierarchical
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless Only
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
)
"""Stored as received; decoded later, elsewhere."""

_UNCOMPRESSED = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN)


def verification_context() -> PresentationContext:
    """C-ECHO."""
    return build_context(VERIFICATION, list(_UNCOMPRESSED))


def supported_contexts() -> list[PresentationContext]:
    """Every presentation context that the listener accepts from a sender."""
    contexts = [
        verification_context(),
        *(build_context(uid, list(TRANSFER_SYNTAXES)) for uid in (*SCREENED_CLASSES, *ACCOMPANYING_CLASSES)),
    ]
    for context in contexts:
        # the library copies all of them for each association and changes none: that was most of an association's cost
        context.__class__ = _SharedContext
    return contexts


class _SharedContext(PresentationContext):  # type: ignore[misc]
    def __deepcopy__(self, _memo: object) -> _SharedContext:
        return self


def group_of(sop_class_uid: str) -> Accompanying | None:
    """The group of a class that only travels with a CT; None for one that is screened or not taken."""
    return _GROUP_OF.get(sop_class_uid)


def class_name(sop_class_uid: str) -> str:
    """Name of a SOP class."""
    known = PRIVATE_NAMES.get(sop_class_uid) or _NEW_NAMES.get(sop_class_uid)
    return known or UID(sop_class_uid).name
