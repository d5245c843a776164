"""What is true of a virtual patient and what a densitometer of a site would have said.

Only arithmetic, no pixels. Sources are cited beside each constant; what no source gave is marked "assumption" and is a
statement about the simulation, not about people.

Scales: sBMD is the standardised BMD of Hui et al. (Osteoporos Int 1997), here in g/cm2. Every level has its own
offset from the L1-L4 mean, so T-scores of single vertebrae use a reference shifted by the same offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

Sex = Literal["F", "M"]
Maker = Literal["Hologic", "Lunar", "Norland"]

MAKERS: Final[tuple[Maker, ...]] = ("Hologic", "Lunar", "Norland")

_HUI_CENTRE_G_CM2: Final = 1.0436
_HUI: Final[dict[Maker, tuple[float, float]]] = {
    "Hologic": (1.0550, 0.972),
    "Lunar": (0.9683, 1.100),
    "Norland": (0.9743, 0.969),
}
"""Hui 1997: sBMD = slope * (BMD - centre) + 1.0436, spine."""

REFERENCE_MEAN_G_CM2: Final = 1.0550 * (1.064 - 0.972) + _HUI_CENTRE_G_CM2
REFERENCE_SD_G_CM2: Final = 1.0550 * 0.106
"""NHANES 2005-14, non-Hispanic White women 21-30 years, lumbar spine 1.064 +/- 0.106 on Hologic, as sBMD; used for men
too (ISCD)."""
REFERENCE_NAME: Final = "NHANES 2005-14 non-Hispanic White women 21-30 y, lumbar spine, converted to sBMD (Hui 1997)"

LEVEL_OFFSET_G_CM2: Final[dict[str, float]] = {"L1": -0.09, "L2": -0.01, "L3": 0.04, "L4": 0.06}
"""sBMD of a level minus the mean of L1-L4: BMD rises from L1 to L4 (sizes are an assumption)."""

_HU_AT_25: Final = 226.0
_HU_PER_YEAR: Final = -2.5
_HU_PER_MG: Final = 1.25
"""Jang, Radiology 2019: 226 HU below 30 years, -2.5 HU a year; 1.25 HU per mg/cm3 as in the phantom's calibration."""
DENSITY_SD_MG_CM3: Final = 35.0
"""44 HU (Jang, below 30 years) over 1.25."""

SBMD_PER_MG: Final = 0.0025
"""g/cm2 per mg/cm3: about the slope of the published linear HU model of a cleared device (0.0025 g/cm2 per HU of the
whole vertebra), taken per mg/cm3 because trabecular bone is a part of the projection (assumption)."""
_AGE_ARTEFACT_PER_YEAR: Final = 0.0017
"""Cortical thickening, facet and aortic calcification in the projection. Set so that women of 75 meet NHANES' 0.902
Hologic for 71-80 years, given the fall of trabecular density (computed)."""
_MALE_OFFSET: Final = -0.02
"""So that young men, whose bodies are deeper, meet NHANES' 1.057 Hologic (computed)."""
_OSTEOPHYTE: Final = 0.08
_DEPTH_PER_MM: Final = 0.008
"""Assumptions: osteophytes from 0 to 1 add up to this much; deeper bodies project more bone."""
PATIENT_RESIDUAL_G_CM2: Final = 0.05
LEVEL_RESIDUAL_G_CM2: Final = 0.025
"""Assumptions: what no CT of the body shows (posterior elements, soft tissue, positioning of the densitometer)."""
READING_SD_G_CM2: Final = 0.012
"""Precision error of one densitometry, about 1 % (assumption)."""
CONVERSION_ERROR: Final = 0.04
"""Relative error that is left after conversion to sBMD: the lower end of the published 4-7 % of cross-calibration. Half
of its variance belongs to the machine, half to the patient on it (the split is an assumption)."""
PATIENT_ERROR: Final = CONVERSION_ERROR * math.sqrt(0.5)
"""Relative SD of a maker's scale from patient to patient."""
MACHINE_ERROR: Final[dict[Maker, float]] = {
    "Hologic": 0.0,
    "Lunar": CONVERSION_ERROR * math.sqrt(0.75),
    "Norland": -CONVERSION_ERROR * math.sqrt(0.75),
}
"""Relative error of the one machine of each maker in this simulation: constant for all its patients, with a mean of
zero and a root mean square of ``PATIENT_ERROR`` over the makers. Which maker reads high is an arbitrary choice and no
statement about makers. An image can't show it; only who was sent to which machine can."""


def to_sbmd(bmd_g_cm2: float, maker: Maker) -> float:
    """A densitometer's BMD on the standardised scale (Hui 1997)."""
    slope, centre = _HUI[maker]
    return slope * (bmd_g_cm2 - centre) + _HUI_CENTRE_G_CM2


def from_sbmd(sbmd_g_cm2: float, maker: Maker) -> float:
    """The inverse of `to_sbmd`."""
    slope, centre = _HUI[maker]
    return (sbmd_g_cm2 - _HUI_CENTRE_G_CM2) / slope + centre


def t_score(sbmd_g_cm2: float, level: str | None = None) -> float:
    """T-score of a level (L1-L4), or of the mean of L1-L4 when None, against `REFERENCE_NAME`."""
    offset = 0.0 if level is None else LEVEL_OFFSET_G_CM2[level]
    return (sbmd_g_cm2 - offset - REFERENCE_MEAN_G_CM2) / REFERENCE_SD_G_CM2


def diagnosis(t: float) -> int:
    """0 normal (T > -1), 1 osteopenia, 2 osteoporosis (T <= -2.5), by the WHO's cuts."""
    return 2 if t <= -2.5 else 1 if t <= -1.0 else 0


def draw_density_mg_cm3(rng: np.random.Generator, age_years: float) -> float:
    """Trabecular density of a person of that age, at least 15 mg/cm3."""
    mean = (_HU_AT_25 + _HU_PER_YEAR * max(0.0, age_years - 25.0)) / _HU_PER_MG
    return float(max(15.0, rng.normal(mean, DENSITY_SD_MG_CM3)))


@dataclass(frozen=True, slots=True)
class LevelTruth:
    """Truth of one level.

    Attributes:
        visible_g_cm2: the part of the sBMD that follows from what was drawn of body, age and sex: what an ideal reader
            of the CT could say.
        sbmd_g_cm2: true sBMD, with what no CT of the body shows.
    """

    visible_g_cm2: float
    sbmd_g_cm2: float


def draw_truth(
    rng: np.random.Generator,
    *,
    age_years: float,
    sex: Sex,
    osteophytes: float,
    density_mg_cm3: dict[str, float],
    depth_mm: dict[str, float],
) -> dict[str, LevelTruth]:
    """Truth of L1-L4 of one patient, no densitometer yet.

    Args:
        rng: of this patient.
        density_mg_cm3: true trabecular density by level.
        depth_mm: true antero-posterior depth of the body by level.
    """
    person = rng.normal(0.0, PATIENT_RESIDUAL_G_CM2)
    young = _HU_AT_25 / _HU_PER_MG
    levels = {}
    for level, offset in LEVEL_OFFSET_G_CM2.items():
        visible = (
            REFERENCE_MEAN_G_CM2
            + offset
            + SBMD_PER_MG * (density_mg_cm3[level] - young)
            + _AGE_ARTEFACT_PER_YEAR * (age_years - 27.0)
            + (_MALE_OFFSET if sex == "M" else 0.0)
            + _OSTEOPHYTE * (osteophytes - 0.2)
            + _DEPTH_PER_MM * (depth_mm[level] - 35.0)
        )
        sbmd = max(0.3, float(visible + person + rng.normal(0.0, LEVEL_RESIDUAL_G_CM2)))
        levels[level] = LevelTruth(float(visible), sbmd)
    return levels


def size_adds_g_cm2(factor: float) -> float:
    """What ``draw_truth`` adds when all bones grow by this factor, for a body about as deep as those it starts from."""
    return _DEPTH_PER_MM * 35.0 * (factor - 1.0)


def machine_sbmd(sbmd_g_cm2: float, maker: Maker) -> float:
    """What the maker's machine would say of a true sBMD without chance, converted to sBMD: its own version of truth."""
    return to_sbmd(from_sbmd(sbmd_g_cm2, maker) * (1.0 + MACHINE_ERROR[maker]), maker)


def draw_readings(rng: np.random.Generator, sbmd_g_cm2: dict[str, float], maker: Maker) -> dict[str, float]:
    """Readings of one patient on one machine, in g/cm2 on the maker's own scale.

    Args:
        rng: of this patient's densitometry; the same numbers are drawn for every maker.
        sbmd_g_cm2: true sBMD by level.
    """
    factor = 1.0 + MACHINE_ERROR[maker] + rng.normal(0.0, PATIENT_ERROR)
    return {
        level: from_sbmd(sbmd + rng.normal(0.0, READING_SD_G_CM2), maker) * factor for level, sbmd in sbmd_g_cm2.items()
    }
