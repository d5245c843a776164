"""Which studies are screened, and the codes of those that are not."""

from __future__ import annotations

import re
from datetime import date, datetime
from enum import StrEnum
from typing import Final

MINIMUM_AGE_YEARS = 30
"""Below this age a study is excluded: cleared products start at 30 or 50 years (docs/intended-use.md)."""

CLASSIFICATION_AGE_YEARS = 50
"""Below this age attenuation only: WHO classes and T-scores are defined for postmenopausal women and men from 50."""


class AgeBand(StrEnum):
    """Ages that the decision table tells apart."""

    BELOW_LIMIT = "below 30"
    ATTENUATION_ONLY = "30-49"
    CLASSIFIABLE = "50 and above"
    UNKNOWN = "unknown"


def age_band(years: int | None) -> AgeBand:
    """Band of an age in whole years; an unknown age stays unknown."""
    if years is None:
        return AgeBand.UNKNOWN
    if years < MINIMUM_AGE_YEARS:
        return AgeBand.BELOW_LIMIT
    return AgeBand.ATTENUATION_ONLY if years < CLASSIFICATION_AGE_YEARS else AgeBand.CLASSIFIABLE


_OLDEST_YEARS: Final = 125  # a birth date of 19000101 is an anonymiser's, not a patient's
_AGE_STRING: Final = re.compile(r"(\d{3})([DWMY])")


class ExclusionCode(StrEnum):
    """Why a study was not screened; docs/refusals.md says what to do about each."""

    NO_CT_SERIES = "no_ct_series"
    DERIVED_SERIES = "derived_series"
    UNEVEN_GEOMETRY = "uneven_geometry"
    UNSUITABLE_KERNEL = "unsuitable_kernel"
    SLICES_TOO_THICK = "slices_too_thick"
    INSUFFICIENT_COVERAGE = "insufficient_coverage"
    NO_LUMBAR_VERTEBRA = "no_lumbar_vertebra"
    CALIBRATION_OUT_OF_RANGE = "calibration_out_of_range"
    AGE_BELOW_LIMIT = "age_below_limit"


def age_years(patient_age: str, birth_date: str, reference_date: str) -> int | None:
    """Age in whole years on the study's date, or None when nothing in the header says it.

    Args:
        patient_age: Patient's Age (0010,1010), VR AS: three digits and D, W, M or Y (PS3.5 6.2).
        birth_date: Patient's Birth Date (0010,0030), ``YYYYMMDD``; asked first, since it's a fact and not a derivation.
        reference_date: Study Date (0008,0020), ``YYYYMMDD``.
    """
    born, at = _date(birth_date), _date(reference_date)
    if born and at and born <= at:
        years = at.year - born.year - ((at.month, at.day) < (born.month, born.day))
        if years <= _OLDEST_YEARS:
            return years
    if match := _AGE_STRING.fullmatch(patient_age.strip()):
        count, unit = int(match.group(1)), match.group(2)
        return {"Y": count, "M": count // 12, "W": count // 52, "D": count // 365}[unit]
    return None


def _date(text: str) -> date | None:
    try:
        return datetime.strptime(text.strip(), "%Y%m%d").date()  # noqa: DTZ007 - a calendar day has no zone
    except ValueError:
        return None
