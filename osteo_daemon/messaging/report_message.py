"""What a message tells: the result with the identity and the order that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from osteo_daemon.domain.findings import ScreeningResult
from osteo_daemon.domain.wording import Wording


@dataclass(frozen=True, slots=True)
class StudyContext:
    """Patient and order as the source headers tell them; "" where they say nothing. Never logged.

    Attributes:
        patient_name: DICOM person name (PS3.5 6.2.1): groups separated by ``=``, components by ``^``.
        patient_birth_date, study_date: ``YYYYMMDD``.
        study_time: ``HHMMSS``, perhaps with a fraction.
        procedure: code value, scheme and meaning of the procedure that was done, None when the header has none.
    """

    patient_id: str
    issuer_of_patient_id: str
    patient_name: str
    patient_birth_date: str
    patient_sex: str
    accession_number: str
    study_date: str
    study_time: str
    procedure: tuple[str, str, str] | None


@dataclass(frozen=True, slots=True)
class ReportMessage:
    """One result as a message reports it.

    Attributes:
        result: as reported (rounded).
        uid: identifies this revision's message for its destination; the same for every attempt.
        created: when the result was made, with the site's time zone.
        device_uid: of this version of the software and its models.
    """

    result: ScreeningResult
    context: StudyContext
    wording: Wording
    uid: str
    created: datetime
    revision: int
    software_version: str
    device_uid: str
    institution: str = ""
