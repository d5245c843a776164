"""From a report request to the messages of HL7 and FHIR destinations: the same result, the same identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydicom.dataset import Dataset

from osteo_daemon.dicom.report_forms import BuiltObject
from osteo_daemon.dicom.report_objects import ReportRequest
from osteo_daemon.dicom.report_source import clean_headers
from osteo_daemon.dicom.reported_values import as_reported, result_digest
from osteo_daemon.dicom.uids import device_uid, result_instance_uid
from osteo_daemon.messaging import fhir, hl7
from osteo_daemon.messaging.report_message import ReportMessage, StudyContext
from osteo_daemon.settings import DestinationSettings


def build_messages(request: ReportRequest, destinations: Iterable[DestinationSettings]) -> Iterator[BuiltObject]:
    """One message for each destination that is no DICOM peer; the same request gives the same bytes.

    Raises:
        Damaged: the source headers lack what a report must refer to.
    """
    for destination in destinations:
        if destination.takes_objects:
            continue
        message = _message(request, destination)
        if destination.kind == "hl7":
            data = hl7.oru_r01(message, destination.receiving_application, destination.receiving_facility)
        else:
            data = fhir.transaction(message)
        yield BuiltObject(
            kind=destination.kind,
            variant=destination.name,
            sop_class_uid="",
            sop_instance_uid=message.uid,
            series_instance_uid="",
            data=data,
        )


def _message(request: ReportRequest, destination: DestinationSettings) -> ReportMessage:
    result = as_reported(request.result)
    addressed = (destination.receiving_application, destination.receiving_facility)
    settings = "".join((request.effective_settings, request.wording.digest, *addressed))
    return ReportMessage(
        result=result,
        context=_context(clean_headers(request.source)[0]),
        wording=request.wording,
        uid=result_instance_uid(
            destination.kind,
            destination.name,
            result.study_instance_uid,
            request.revision,
            result_digest(request.result, settings),
            request.software_version,
        ),
        created=request.local_created,
        revision=request.revision,
        software_version=request.software_version,
        device_uid=device_uid(request.software_version, tuple(model.sha256 for model in result.models)),
        institution=request.site.institution,
    )


def _context(header: Dataset) -> StudyContext:
    def text(keyword: str) -> str:
        return str(header.get(keyword) or "")

    procedure = None
    for item in header.get("ProcedureCodeSequence", ()):
        value, scheme, meaning = (
            str(item.get(key) or "") for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
        )
        if value and scheme and meaning:
            procedure = (value, scheme, meaning)
            break
    return StudyContext(
        patient_id=text("PatientID"),
        issuer_of_patient_id=text("IssuerOfPatientID"),
        patient_name=text("PatientName"),
        patient_birth_date=text("PatientBirthDate"),
        patient_sex=text("PatientSex"),
        accession_number=text("AccessionNumber"),
        study_date=text("StudyDate"),
        study_time=text("StudyTime"),
        procedure=procedure,
    )
