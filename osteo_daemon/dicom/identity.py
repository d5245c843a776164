"""Whom a file is of. For the audit trail alone: what this returns goes into no log, name or table."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from osteo_daemon.audit.events import AuditPatient
from osteo_daemon.log import get_logger


def patient_of(path: Path) -> AuditPatient:
    """Patient ID and name of a DICOM file; empty where the file has none, is gone or cannot be read."""
    try:
        header = pydicom.dcmread(path, specific_tags=["SpecificCharacterSet", "PatientID", "PatientName"])
        return AuditPatient(str(header.get("PatientID") or ""), str(header.get("PatientName") or ""))
    except (OSError, InvalidDicomError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
        # pydicom's own errors quote what it read
        get_logger().warning("patient_unknown", error=type(error).__name__)
        return AuditPatient()
