"""Coded concepts of the report: standard ones where DICOM or SNOMED CT has them, else the private scheme 99OSTEO.

DICOM has no concept for a density estimated from CT; DXA's LOINC codes would be wrong for it. Private meanings
therefore say "estimated from CT". Values hold at most 16 characters (VR SH), meanings at most 64 (VR LO).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pydicom.sr.coding import Code

from osteo_daemon.domain.findings import Category, Level, Severity

SCHEME = "99OSTEO"
SCHEME_NAME = "osteo_daemon private codes"
_MAXIMUM_VALUE_LENGTH = 16
_MAXIMUM_MEANING_LENGTH = 64


def private(value: str, meaning: str) -> Code:
    """A code of the private scheme.

    Raises:
        ValueError: value or meaning is too long for its VR.
    """
    if len(value) > _MAXIMUM_VALUE_LENGTH or len(meaning) > _MAXIMUM_MEANING_LENGTH:
        raise ValueError(f"code {value!r} or its meaning {meaning!r} is too long")
    return Code(value, SCHEME, meaning)


# ---- anatomy -------------------------------------------------------------------------------------------------------
VERTEBRA = Code("51282000", "SCT", "Vertebra")
LUMBAR_SPINE = Code("122496007", "SCT", "Lumbar spine")
VERTEBRAE: Mapping[Level, Code] = MappingProxyType(
    {
        # PS3.16 CID 7602
        Level.T10: Code("7610001", "SCT", "T10 vertebra"),
        Level.T11: Code("12989004", "SCT", "T11 vertebra"),
        Level.T12: Code("23215003", "SCT", "T12 vertebra"),
        Level.L1: Code("66794005", "SCT", "L1 vertebra"),
        Level.L2: Code("14293000", "SCT", "L2 vertebra"),
        Level.L3: Code("36470004", "SCT", "L3 vertebra"),
        Level.L4: Code("11994002", "SCT", "L4 vertebra"),
        Level.L5: Code("49668003", "SCT", "L5 vertebra"),
        # CID 7602 names single sacral segments nowhere
        Level.S1: private("S1", "S1 vertebra"),
    }
)
ANATOMICAL_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
SPATIAL_CONCEPT = Code("309825002", "SCT", "Spatial and Relational Concept")
TRABECULAR_REGION = private("TRABECULAR_ROI", "Trabecular measurement region of the vertebral body")

# ---- document ------------------------------------------------------------------------------------------------------
MEASUREMENT_REPORT = Code("126000", "DCM", "Imaging Measurement Report")
IMAGING_MEASUREMENTS = Code("126010", "DCM", "Imaging Measurements")
MEASUREMENT_GROUP = Code("125007", "DCM", "Measurement Group")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
DIAGNOSTIC_IMAGING_REPORT = Code("18748-4", "LN", "Diagnostic imaging report")
SOURCE_OF_MEASUREMENT = Code("121112", "DCM", "Source of Measurement")
OF_INTEREST = Code("113000", "DCM", "Of Interest")
PROCEDURE_REPORTED = Code("121058", "DCM", "Procedure reported")
CT_UNSPECIFIED = Code("25045-6", "LN", "CT unspecified body region")
LANGUAGE = Code("121049", "DCM", "Language of Content Item and Descendants")
FINDING = Code("121071", "DCM", "Finding")
FINDING_SITE = Code("363698007", "SCT", "Finding Site")
TRACKING_IDENTIFIER = Code("112039", "DCM", "Tracking Identifier")
IMAGE_REGION = Code("111030", "DCM", "Image Region")
REFERENCED_SEGMENT = Code("121191", "DCM", "Referenced Segment")
SOURCE_SERIES = Code("121232", "DCM", "Source series for segmentation")
DERIVATION = Code("121401", "DCM", "Derivation")
ALGORITHM_NAME = Code("111001", "DCM", "Algorithm Name")
ALGORITHM_VERSION = Code("111003", "DCM", "Algorithm Version")
ALGORITHM_PARAMETERS = Code("111002", "DCM", "Algorithm Parameters")
IMPRESSION = Code("121073", "DCM", "Impression")
RECOMMENDATION = Code("121075", "DCM", "Recommendation")
COMMENT = Code("121106", "DCM", "Comment")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")

# ---- measurements --------------------------------------------------------------------------------------------------
ATTENUATION = Code("112031", "DCM", "Attenuation Coefficient")
MEAN = Code("373098007", "SCT", "Mean")
MEDIAN = Code("373099004", "SCT", "Median")
STANDARD_DEVIATION = Code("386136009", "SCT", "Standard Deviation")
VOLUME = Code("118565006", "SCT", "Volume")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
CORRECTED_ATTENUATION = private("ATT_CORRECTED", "Attenuation corrected for acquisition, mean")
CENTRE_LPS: tuple[Code, Code, Code] = (
    private("CENTRE_LPS_X", "Vertebral centre, patient coordinate x (left)"),
    private("CENTRE_LPS_Y", "Vertebral centre, patient coordinate y (posterior)"),
    private("CENTRE_LPS_Z", "Vertebral centre, patient coordinate z (superior)"),
)
VOXEL_COUNT = private("VOXEL_COUNT", "Voxels in the measured region")
STANDARD_ERROR = private("ATT_STD_ERROR", "Standard error of the mean attenuation")
HEIGHTS: tuple[Code, Code, Code] = (
    private("HEIGHT_ANTERIOR", "Anterior height of the vertebral body"),
    private("HEIGHT_MIDDLE", "Middle height of the vertebral body"),
    private("HEIGHT_POST", "Posterior height of the vertebral body"),
)
COMPRESSION_GRADE = private("COMPRESSION_GRD", "Grade of vertebral compression by loss of height, 0 to 3")


@dataclass(frozen=True, slots=True)
class EstimateCodes:
    """Codes of what the network estimates; ``interval_90`` are the limits of the BMD's 90 % prediction interval."""

    bmd: Code
    interval_90: tuple[Code, Code]
    t_score: Code
    class_probabilities: Mapping[str, Code]


ESTIMATES: Mapping[str, EstimateCodes] = MappingProxyType(
    {
        "clinical": EstimateCodes(
            bmd=private("CT_ABMD", "Areal bone mineral density, estimated from CT"),
            interval_90=(
                private("CT_ABMD_LOW90", "Lower limit of the BMD's 90% prediction interval, est. from CT"),
                private("CT_ABMD_HIGH90", "Upper limit of the BMD's 90% prediction interval, est. from CT"),
            ),
            t_score=private("CT_TSCORE", "T-score, estimated from CT"),
            class_probabilities=MappingProxyType(
                {
                    # the network's class names; the report says "normal" nowhere
                    "normal": private("P_NEITHER", "Probability of neither class below, estimated from CT"),
                    "osteopenia": private("P_OSTEOPENIA", "Probability of osteopenia, estimated from CT"),
                    "osteoporosis": private("P_OSTEOPOROSIS", "Probability of osteoporosis, estimated from CT"),
                }
            ),
        ),
        # codes of their own: viewers and registries that take single values out of a report drop the status beside them
        "investigational": EstimateCodes(
            bmd=private("INV_ABMD", "Investigational: areal BMD, estimated from CT"),
            interval_90=(
                private("INV_ABMD_LOW90", "Investigational: lower 90% limit of the BMD est. from CT"),
                private("INV_ABMD_HIGH90", "Investigational: upper 90% limit of the BMD est. from CT"),
            ),
            t_score=private("INV_TSCORE", "Investigational: T-score, estimated from CT"),
            class_probabilities=MappingProxyType(
                {
                    "normal": private("INV_NEITHER", "Investigational: probability of neither class below"),
                    "osteopenia": private("INV_OSTEOPENIA", "Investigational: probability of osteopenia"),
                    "osteoporosis": private("INV_OSTEOPOROSIS", "Investigational: probability of osteoporosis"),
                }
            ),
        ),
    }
)
HOUNSFIELD = Code("[hnsf'U]", "UCUM", "Hounsfield unit")
CUBIC_MILLIMETRE = Code("mm3", "UCUM", "cubic millimeter")
MILLIMETRE = Code("mm", "UCUM", "millimeter")
G_PER_CM2 = Code("g/cm2", "UCUM", "gram per square centimeter")
PERCENT = Code("%", "UCUM", "percent")
UNITY = Code("1", "UCUM", "no units")

# ---- qualitative evaluations ---------------------------------------------------------------------------------------
CATEGORY = private("CATEGORY", "Attenuation category of the study")
CATEGORIES: Mapping[Category, Code] = MappingProxyType(
    {
        Category.LOW: private("LOW", "Low trabecular attenuation"),
        Category.REDUCED: private("REDUCED", "Reduced trabecular attenuation"),
        Category.NOT_FLAGGED: private("NOT_FLAGGED", "No finding below the screening threshold"),
        Category.INDETERMINATE: private("INDETERMINATE", "Indeterminate"),
    }
)
OUTCOME = private("OUTCOME", "Outcome of the screening")
OUTCOME_REPORTED = private("REPORTED", "Screened")
OUTCOME_EXCLUDED = private("EXCLUDED", "Not screened")
EXCLUSION = private("EXCLUSION", "Reason for not screening")
EXCLUSION_REASON = private("EXCLUSION_TEXT", "Reason for not screening, explained")
SCREENED_SERIES = private("SCREENED_SERIES", "Series that was screened")
MODEL_BUNDLE = private("MODEL_BUNDLE", "Model bundle: name, version, sha256")
NETWORK_STATUS = private("NETWORK_STATUS", "Status of the network estimate")
NETWORK_STATUSES: Mapping[str, Code] = MappingProxyType(
    {
        "investigational": private("INVESTIGATIONAL", "Investigational, not for clinical decisions"),
        "clinical": private("CLINICAL", "Released for clinical use by the site"),
    }
)
WITHHELD: Mapping[str, Code] = MappingProxyType(
    {
        # the value is the reason, a code made from its name like a flag's
        "bmd": private("WITHHELD_BMD", "BMD estimate withheld because"),
        "t_score": private("WITHHELD_TSCORE", "T-score estimate withheld because"),
        "class": private("WITHHELD_CLASS", "Class probabilities withheld because"),
    }
)
FLAGS: Mapping[Severity, Code] = MappingProxyType(
    {
        # the concept name carries the severity, the value the flag
        Severity.INFO: private("FLAG_INFO", "Quality flag, information"),
        Severity.CAUTION: private("FLAG_CAUTION", "Quality flag, caution"),
        Severity.BLOCKING: private("FLAG_BLOCKING", "Quality flag, blocking"),
    }
)


def slug_code(slug: str) -> Code:
    """The private code of a quality flag or exclusion.

    The meaning is the slug with spaces for underscores, so it reads well and `slug_of` can restore it. The value is
    the slug in capitals, or, where that has more than 16 characters, ``Q`` and 15 hexadecimal digits of its sha256.

    Args:
        slug: lower case ASCII letters, digits and underscores.
    """
    value = slug.upper()
    if len(value) > _MAXIMUM_VALUE_LENGTH:
        value = "Q" + hashlib.sha256(slug.encode()).hexdigest()[: _MAXIMUM_VALUE_LENGTH - 1].upper()
    return private(value, slug.replace("_", " "))


def slug_of(meaning: str) -> str:
    """The flag or exclusion slug whose code has this meaning."""
    return meaning.replace(" ", "_")
