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


@dataclass(frozen=True, slots=True)
class AgeReference:
    """Mean and standard deviation of L1's trabecular attenuation in HU at an age, and where they were published."""

    mean_hu: float
    sd_hu: float
    source: str


_YOUNGEST: Final = (30.0, 226.0, 44.0)  # years, mean and SD in HU: the published group below 30
_OLDEST: Final = (90.0, 89.0, 38.0)  # the published group of 90 and above


def l1_age_reference(age_years: int) -> AgeReference:
    """Trabecular attenuation of L1 to be expected at an age, unenhanced at 120 kVp.

    A line between the youngest and the oldest group of Jang et al., Radiology 2019 (20,374 adults); the paper describes
    the decline between them as linear, about 2.5 HU a year. For comparison only: it decides nothing.
    """
    share = min(max((age_years - _YOUNGEST[0]) / (_OLDEST[0] - _YOUNGEST[0]), 0.0), 1.0)
    mean, sd = (young + share * (old - young) for young, old in zip(_YOUNGEST[1:], _OLDEST[1:], strict=True))
    return AgeReference(mean, sd, "Jang, Radiology 2019")


CONTRAST_OFFSET_HU: Final[dict[str, float]] = {"portal_venous": -11.2}
"""Added to trabecular attenuation measured in a contrast phase (`osteo_daemon.inference.contrast.Phase`).

Enhanced minus unenhanced L1 attenuation was 11.2 HU on average (SD 19.2, 95% interval 8.2 to 14.2; 157 adults, routine
abdominal CT, no trend with density): Pickhardt et al., Osteoporos Int 2016;27:147. The SD is large, so the uncorrected
value always stands beside. Why no other phase is corrected: docs/decision.md.
"""
