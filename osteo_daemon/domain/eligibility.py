"""Which studies are screened, and the codes of those that are not."""

from __future__ import annotations

from enum import StrEnum

MINIMUM_AGE_YEARS = 30
"""Below this age a study is excluded: cleared products start at 30 or 50 years (docs/intended-use.md)."""

CLASSIFICATION_AGE_YEARS = 50
"""Below this age attenuation only: WHO classes and T-scores are defined for postmenopausal women and men from 50."""


class ExclusionCode(StrEnum):
    """Why a study was not screened; documented in docs/report.md."""

    NO_CT_SERIES = "no_ct_series"
    DERIVED_SERIES = "derived_series"
    UNEVEN_GEOMETRY = "uneven_geometry"
    UNSUITABLE_KERNEL = "unsuitable_kernel"
    SLICES_TOO_THICK = "slices_too_thick"
    INSUFFICIENT_COVERAGE = "insufficient_coverage"
    NO_LUMBAR_VERTEBRA = "no_lumbar_vertebra"
    CALIBRATION_OUT_OF_RANGE = "calibration_out_of_range"
    AGE_BELOW_LIMIT = "age_below_limit"
