"""Coded concepts of messages: those of the structured report, as plain values.

The same codes stand in `osteo_daemon.dicom.codes`, which needs pydicom; a test compares both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from osteo_daemon.domain.findings import Category, Level

PRIVATE: Final = "99OSTEO"


@dataclass(frozen=True, slots=True)
class Concept:
    """A code, its coding scheme designator as DICOM names it, and its meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class EstimateConcepts:
    """What the network estimates, by its status; ``interval_90`` are the limits of the 90 % prediction interval."""

    bmd: Concept
    interval_90: tuple[Concept, Concept]
    t_score: Concept


VERTEBRAE: Final = {
    Level.T10: Concept("7610001", "SCT", "T10 vertebra"),
    Level.T11: Concept("12989004", "SCT", "T11 vertebra"),
    Level.T12: Concept("23215003", "SCT", "T12 vertebra"),
    Level.L1: Concept("66794005", "SCT", "L1 vertebra"),
    Level.L2: Concept("14293000", "SCT", "L2 vertebra"),
    Level.L3: Concept("36470004", "SCT", "L3 vertebra"),
    Level.L4: Concept("11994002", "SCT", "L4 vertebra"),
    Level.L5: Concept("49668003", "SCT", "L5 vertebra"),
    Level.S1: Concept("S1", PRIVATE, "S1 vertebra"),
}
FINDING_SITE: Final = Concept("363698007", "SCT", "Finding Site")
ATTENUATION: Final = Concept("112031", "DCM", "Attenuation Coefficient")
MEAN: Final = Concept("373098007", "SCT", "Mean")
MEDIAN: Final = Concept("373099004", "SCT", "Median")
STANDARD_DEVIATION: Final = Concept("386136009", "SCT", "Standard Deviation")
CORRECTED_ATTENUATION: Final = Concept("ATT_CORRECTED", PRIVATE, "Attenuation corrected for acquisition, mean")
ESTIMATES: Final = {
    "clinical": EstimateConcepts(
        bmd=Concept("CT_ABMD", PRIVATE, "Areal bone mineral density, estimated from CT"),
        interval_90=(
            Concept("CT_ABMD_LOW90", PRIVATE, "Lower limit of the BMD's 90% prediction interval, est. from CT"),
            Concept("CT_ABMD_HIGH90", PRIVATE, "Upper limit of the BMD's 90% prediction interval, est. from CT"),
        ),
        t_score=Concept("CT_TSCORE", PRIVATE, "T-score, estimated from CT"),
    ),
    "investigational": EstimateConcepts(
        bmd=Concept("INV_ABMD", PRIVATE, "Investigational: areal BMD, estimated from CT"),
        interval_90=(
            Concept("INV_ABMD_LOW90", PRIVATE, "Investigational: lower 90% limit of the BMD est. from CT"),
            Concept("INV_ABMD_HIGH90", PRIVATE, "Investigational: upper 90% limit of the BMD est. from CT"),
        ),
        t_score=Concept("INV_TSCORE", PRIVATE, "Investigational: T-score, estimated from CT"),
    ),
}
NETWORK_STATUS: Final = Concept("NETWORK_STATUS", PRIVATE, "Status of the network estimate")
CATEGORY: Final = Concept("CATEGORY", PRIVATE, "Attenuation category of the study")
CATEGORIES: Final = {
    Category.LOW: Concept("LOW", PRIVATE, "Low trabecular attenuation"),
    Category.REDUCED: Concept("REDUCED", PRIVATE, "Reduced trabecular attenuation"),
    Category.NOT_FLAGGED: Concept("NOT_FLAGGED", PRIVATE, "No finding below the screening threshold"),
    Category.INDETERMINATE: Concept("INDETERMINATE", PRIVATE, "Indeterminate"),
}
IMPRESSION: Final = Concept("121073", "DCM", "Impression")
RECOMMENDATION: Final = Concept("121075", "DCM", "Recommendation")
COMMENT: Final = Concept("121106", "DCM", "Comment")
CT_UNSPECIFIED: Final = Concept("25045-6", "LN", "CT unspecified body region")
STUDY_INSTANCE_UID: Final = Concept("110180", "DCM", "Study Instance UID")

HOUNSFIELD: Final = Concept("[hnsf'U]", "UCUM", "Hounsfield unit")
G_PER_CM2: Final = Concept("g/cm2", "UCUM", "gram per square centimeter")
T_SCORE_UNIT: Final = Concept("{T-score}", "UCUM", "T-score")
