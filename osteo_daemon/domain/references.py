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
