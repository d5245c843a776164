"""FHIR R4: the report as a transaction of one DiagnosticReport and an Observation per vertebra and channel.

Every resource is a conditional update on an identifier made from the study, so a repeated or a later transaction
replaces what is there and never doubles it. The patient is named by identifier alone. Everything is ``preliminary``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from osteo_daemon.domain.findings import NetworkFinding, VertebraFinding
from osteo_daemon.messaging import concepts
from osteo_daemon.messaging.concepts import Concept
from osteo_daemon.messaging.report_message import ReportMessage

MEDIA_TYPE: Final = "application/fhir+json"
IDENTIFIER_SYSTEM: Final = "urn:osteo-daemon:result"
_SYSTEMS: Final[Mapping[str, str]] = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "LN": "http://loinc.org",
    "UCUM": "http://unitsofmeasure.org",
    concepts.PRIVATE: "urn:osteo-daemon:codes",
}
_ABSENT: Final = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
_Resource = dict[str, Any]


def transaction(message: ReportMessage) -> bytes:
    """The transaction Bundle as UTF-8 JSON; the same message gives the same bytes."""
    observations = [*_observations(message)]
    report = _report(message, [entry["fullUrl"] for entry in observations])
    bundle = {"resourceType": "Bundle", "type": "transaction", "entry": [*observations, report]}
    return json.dumps(bundle, ensure_ascii=False, separators=(",", ":")).encode()


def _entry(message: ReportMessage, what: str, resource: _Resource) -> _Resource:
    value = f"{message.result.study_instance_uid}/{what}"
    resource = {
        "resourceType": resource["resourceType"],
        "identifier": [{"system": IDENTIFIER_SYSTEM, "value": value}],
        **{key: entry for key, entry in resource.items() if key != "resourceType"},
    }
    search = quote(f"{IDENTIFIER_SYSTEM}|{value}", safe="")
    return {
        "fullUrl": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{IDENTIFIER_SYSTEM}|{value}')}",
        "resource": resource,
        "request": {"method": "PUT", "url": f"{resource['resourceType']}?identifier={search}"},
    }


def _report(message: ReportMessage, results: list[str]) -> _Resource:
    result, context = message.result, message.context
    procedure = Concept(*context.procedure) if context.procedure else concepts.CT_UNSPECIFIED
    report: _Resource = {
        "resourceType": "DiagnosticReport",
        "status": "preliminary",
        "category": [_text_coded("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")],
        "code": _concept(procedure),
        **_subject(message),
        "issued": message.created.isoformat(),
        "imagingStudy": [
            {
                "type": "ImagingStudy",
                "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{result.study_instance_uid}"},
            }
        ],
        "conclusion": " ".join(
            [message.wording.impression(result), message.wording.next_step(result), message.wording.disclaimer]
        ),
    }
    if context.accession_number:
        accession = _text_coded("http://terminology.hl7.org/CodeSystem/v2-0203", "ACSN", "Accession ID")
        report["basedOn"] = [
            {"type": "ServiceRequest", "identifier": {"type": accession, "value": context.accession_number}}
        ]
    if result.category is not None:
        report["conclusionCode"] = [_concept(concepts.CATEGORIES[result.category])]
    if results:
        report["result"] = [{"reference": reference} for reference in results]
    return _entry(message, "report", report)


def _observations(message: ReportMessage) -> Iterator[_Resource]:
    for finding in message.result.vertebrae:
        yield _entry(message, f"{finding.level}/attenuation", _attenuation(message, finding))
        if finding.network is not None:
            yield _entry(message, f"{finding.level}/network", _network(message, finding, finding.network))


def _attenuation(message: ReportMessage, finding: VertebraFinding) -> _Resource:
    resource = _observation(message, finding, concepts.ATTENUATION)
    measured, corrected = finding.attenuation_hu, finding.attenuation_hu_corrected
    if measured is None:
        reasons = message.wording.join([message.wording.flag(flag.code) for flag in finding.quality_flags])
        resource["dataAbsentReason"] = _absent(reasons)
    else:
        resource["valueQuantity"] = _quantity(measured.mean, concepts.HOUNSFIELD)
        resource["component"] = [
            {"code": _concept(concept), "valueQuantity": _quantity(value, concepts.HOUNSFIELD)}
            for concept, value in (
                (concepts.MEAN, measured.mean),
                (concepts.MEDIAN, measured.median),
                (concepts.STANDARD_DEVIATION, measured.sd),
                *(() if corrected is None else ((concepts.CORRECTED_ATTENUATION, corrected.mean),)),
            )
        ]
    if finding.quality_flags:
        resource["note"] = [{"text": message.wording.flag_text(flag)} for flag in finding.quality_flags]
    return resource


def _network(message: ReportMessage, finding: VertebraFinding, network: NetworkFinding) -> _Resource:
    estimates = concepts.ESTIMATES[network.status]
    resource = _observation(message, finding, estimates.bmd)
    wording = message.wording
    notes = [wording.tables["status"][network.status]]
    if network.status == "investigational":
        notes.append(wording.investigational)
    components: list[_Resource] = []
    if network.bmd_g_cm2 is None:
        resource["dataAbsentReason"] = _absent(wording.reason(network.withheld.get("bmd", "")))
    else:
        resource["valueQuantity"] = _quantity(network.bmd_g_cm2, concepts.G_PER_CM2)
    for concept, limit in zip(estimates.interval_90, network.bmd_interval_90_g_cm2 or (), strict=False):
        components.append({"code": _concept(concept), "valueQuantity": _quantity(limit, concepts.G_PER_CM2)})
    if network.t_score is not None:
        components.append(
            {"code": _concept(estimates.t_score), "valueQuantity": _quantity(network.t_score, concepts.T_SCORE_UNIT)}
        )
        if network.t_score_reference:
            notes.append(wording.text("impression", "t_score_reference", reference=network.t_score_reference))
    elif "t_score" in network.withheld:
        reason = _absent(wording.reason(network.withheld["t_score"]))
        components.append({"code": _concept(estimates.t_score), "dataAbsentReason": reason})
    if components:
        resource["component"] = components
    resource["note"] = [{"text": note} for note in notes]
    return resource


def _observation(message: ReportMessage, finding: VertebraFinding, code: Concept) -> _Resource:
    models = ", ".join(f"{model.bundle} {model.version}" for model in message.result.models)
    return {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": [_text_coded("http://terminology.hl7.org/CodeSystem/observation-category", "imaging", "Imaging")],
        "code": _concept(code),
        **_subject(message),
        "issued": message.created.isoformat(),
        "bodySite": _concept(concepts.VERTEBRAE[finding.level]),
        "device": {
            "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{message.device_uid}"},
            "display": f"osteo_daemon {message.software_version}" + (f"; {models}" if models else ""),
        },
    }


def _subject(message: ReportMessage) -> _Resource:
    context = message.context
    found: _Resource = {}
    if context.patient_id:
        identifier = {"value": context.patient_id}
        if context.issuer_of_patient_id:
            identifier["system"] = f"urn:osteo-daemon:issuer:{quote(context.issuer_of_patient_id, safe='')}"
        found["subject"] = {"type": "Patient", "identifier": identifier}
    day = context.study_date
    if day:
        found["effectiveDateTime"] = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    return found


def _concept(concept: Concept) -> _Resource:
    system = _SYSTEMS.get(concept.scheme, f"urn:osteo-daemon:scheme:{quote(concept.scheme, safe='')}")
    return _text_coded(system, concept.value, concept.meaning)


def _text_coded(system: str, code: str, display: str) -> _Resource:
    return {"coding": [{"system": system, "code": code, "display": display}], "text": display}


def _quantity(value: float, unit: Concept) -> _Resource:
    shown = {"[hnsf'U]": "HU"}.get(unit.value, unit.value.strip("{}"))
    return {"value": value, "unit": shown, "system": _SYSTEMS["UCUM"], "code": unit.value}


def _absent(reason: str) -> _Resource:
    return {
        "coding": [{"system": _ABSENT, "code": "not-performed", "display": "Not Performed"}],
        **({"text": reason} if reason else {}),
    }
