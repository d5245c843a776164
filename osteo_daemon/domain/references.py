"""Published constants, each with its source; the only place where one stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Threshold:
    """An attenuation threshold at 120 kVp, unenhanced, in HU, and where it was published."""

    hu: float
    meaning: str
    source: str


LOW_ATTENUATION: Final = Threshold(
    110.0,
    "more than 90% specific for osteoporosis by DXA",
    "Pickhardt et al., Ann Intern Med 2013;158:588 (L1, 120 kVp, 1,867 adults)",
)
REDUCED_ATTENUATION: Final = Threshold(
    160.0,
    "90% sensitive for osteoporosis by DXA",
    "Pickhardt et al., Ann Intern Med 2013;158:588 (L1, 120 kVp, 1,867 adults)",
)

KVP_TO_120: Final[dict[int, float]] = {100: 0.951, 120: 1.0, 140: 1.073}
"""Factors from trabecular attenuation at a tube voltage to 120 kVp.

Ratios of population means, which also carry differences between the patients: rough, so the uncorrected value always
stands beside. At 80 kVp populations differ by 23% (538,946 CTs), too much for a factor.
"""
KVP_SOURCE: Final = "ratios of population means by tube voltage"

VENOUS_ENHANCEMENT_HU: Final = 14.75
ARTERIAL_ENHANCEMENT_HU: Final = 20.0
"""What an open spine report adds to a native threshold in each phase (TotalSegmentator): never subtracted here."""

NHANES_SPINE_MEAN_G_CM2: Final = 1.065
NHANES_SPINE_SD_G_CM2: Final = 0.122
NHANES_SPINE_SOURCE: Final = "NHANES 2005-14, non-Hispanic White peak lumbar spine, Hologic"

JANG_SLOPE_HU_PER_YEAR: Final = -2.5
JANG_YOUNG_MEAN_HU: Final = 226.0
JANG_YOUNG_SD_HU: Final = 44.0
JANG_OLD_MEAN_HU: Final = 89.0
JANG_OLD_SD_HU: Final = 38.0
JANG_SOURCE: Final = "Jang et al., Radiology 2019 (L1, n = 20,374): 226 +/- 44 HU below 30, 89 +/- 38 HU from 90 years"
