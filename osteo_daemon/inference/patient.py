"""What the headers say of the patient: age and sex, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.dataset import Dataset

from osteo_daemon.domain.eligibility import MINIMUM_AGE_YEARS, AgeBand, ExclusionCode, age_band, age_years
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible


@dataclass(frozen=True, slots=True)
class Patient:
    """What the header says of age and sex; a missing one withholds what needs it and is never replaced."""

    age_years: int | None
    sex: str | None

    @classmethod
    def of(cls, header: Dataset) -> Patient:
        values = (header.get("PatientAge"), header.get("PatientBirthDate"), header.get("StudyDate"))
        sex = str(header.get("PatientSex") or "").strip().upper()
        return cls(age_years(*(str(value or "") for value in values)), sex if sex in ("F", "M") else None)

    def check_age(self) -> None:
        if age_band(self.age_years) is AgeBand.BELOW_LIMIT:
            reason = f"the patient is younger than {MINIMUM_AGE_YEARS} years"
            raise NotEligible(ExclusionCode.AGE_BELOW_LIMIT, reason)

    @property
    def classifiable(self) -> bool:
        """True when WHO classes and T-scores are defined for this patient."""
        return age_band(self.age_years) is AgeBand.CLASSIFIABLE and self.sex is not None

    @property
    def quality_flags(self) -> tuple[QualityFlag, ...]:
        flags = []
        if self.age_years is None:
            flags.append(QualityFlag("age_missing", Severity.CAUTION))
        elif age_band(self.age_years) is AgeBand.ATTENUATION_ONLY:
            flags.append(QualityFlag("age_below_classification", Severity.INFO))
        if self.sex is None:
            flags.append(QualityFlag("sex_missing", Severity.CAUTION))
        return tuple(flags)
