"""HL7 and FHIR messages: valid by independent readers, the same numbers as the report, nothing unverified as final."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation
from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.exceptions import HL7apyException
from hl7apy.parser import parse_message

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.report_forms import BuiltObject
from osteo_daemon.dicom.report_objects import ReportRequest
from osteo_daemon.dicom.reported_values import as_reported
from osteo_daemon.domain.findings import Level
from osteo_daemon.domain.wording import LANGUAGES, load_wording
from osteo_daemon.messages import build_messages
from osteo_daemon.messaging import concepts
from osteo_daemon.settings import DestinationSettings
from tests.report_cases import (
    STUDY_UID,
    encoded_name_case,
    excluded_case,
    indeterminate_case,
    short_case,
    synthetic_case,
    withheld_case,
)

HL7 = DestinationSettings(
    name="ris", kind="hl7", host="h", port=1, receiving_application="RIS", receiving_facility="A&E"
)
FHIR = DestinationSettings(name="server", kind="fhir", url="https://h/r4")
INVESTIGATIONAL = concepts.ESTIMATES["investigational"]
CASES = [synthetic_case, indeterminate_case, withheld_case, excluded_case]


def message(request: ReportRequest, destination: DestinationSettings) -> BuiltObject:
    (built,) = build_messages(request, [destination])
    return built


def segments(request: ReportRequest) -> list[list[str]]:
    return [line.split("|") for line in message(request, HL7).data.decode().rstrip("\r").split("\r")]


def resources(request: ReportRequest) -> list[dict[str, Any]]:
    return [entry["resource"] for entry in json.loads(message(request, FHIR).data)["entry"]]


def test_concepts_are_those_of_the_structured_report() -> None:
    for name in ("FINDING_SITE", "ATTENUATION", "MEAN", "MEDIAN", "STANDARD_DEVIATION", "CORRECTED_ATTENUATION",
                 "NETWORK_STATUS", "CATEGORY", "IMPRESSION", "RECOMMENDATION", "COMMENT", "CT_UNSPECIFIED",
                 "HOUNSFIELD", "G_PER_CM2"):  # fmt: skip
        same(getattr(concepts, name), getattr(codes, name))
    for mine, theirs in ((concepts.VERTEBRAE, codes.VERTEBRAE), (concepts.CATEGORIES, codes.CATEGORIES)):
        assert mine.keys() == theirs.keys()
        for key in mine:
            same(mine[key], theirs[key])
    assert concepts.ESTIMATES.keys() == codes.ESTIMATES.keys()
    for status, estimates in concepts.ESTIMATES.items():
        expected = codes.ESTIMATES[status]
        same(estimates.bmd, expected.bmd)
        same(estimates.t_score, expected.t_score)
        for mine, theirs in zip(estimates.interval_90, expected.interval_90, strict=True):
            same(mine, theirs)


def same(mine: Any, theirs: Any) -> None:
    assert (mine.value, mine.scheme, mine.meaning) == (theirs.value, theirs.scheme_designator, theirs.meaning)


@pytest.mark.parametrize("make", CASES)
def test_a_strict_reader_accepts_the_hl7_message(make: Any) -> None:
    for language in LANGUAGES:
        request = dataclasses.replace(make(), wording=load_wording(language))
        text = message(request, HL7).data.decode()
        parsed = checked(text)
        assert parsed.msh.msh_9.to_er7() == "ORU^R01^ORU_R01"
        assert parsed.to_er7() == text.rstrip("\r")


def checked(text: str) -> Any:
    """hl7apy's own validation of structure, fields and data types against its tables of 2.5.1.

    Its strict parser takes every observation value for a string of 199 characters, whatever OBX-2 says: it reads
    tolerantly and is asked afterwards.
    """
    parsed = parse_message(text, validation_level=VALIDATION_LEVEL.TOLERANT)
    assert parsed.name == "ORU_R01"
    assert parsed.validate()
    return parsed


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("|P-17|", "||"), ("|25045-6^CT unspecified body region^LN|", "||"), ("|ORU^R01^ORU_R01|", "|ORU^R01^ORU_R99|")],
)
def test_the_reader_refuses_a_broken_hl7_message(right: str, wrong: str) -> None:
    text = message(short_case(), HL7).data.decode()
    assert right in text
    with pytest.raises((HL7apyException, AssertionError)):
        checked(text.replace(right, wrong))


def test_hl7_holds_the_numbers_of_every_level() -> None:
    request = synthetic_case()
    rows = [fields for fields in segments(request) if fields[0] == "OBX"]
    assert [fields[1] for fields in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert {fields[11] for fields in rows} == {"P"}
    for number, finding in enumerate(as_reported(request.result).vertebrae, start=1):
        mine = [fields for fields in rows if fields[4] == str(number)]
        assert f"{finding.level} vertebra" in mine[0][5]
        values = {
            fields[3].split("^")[4] if fields[3].count("^") > 2 else fields[3].split("^")[0]: fields for fields in mine
        }
        assert finding.attenuation_hu is not None
        assert finding.network is not None
        assert float(values["Mean"][5]) == finding.attenuation_hu.mean
        assert float(values["Median"][5]) == finding.attenuation_hu.median
        assert values["Mean"][6].split("^")[0] == "[hnsf'U]"
        assert float(values["INV_ABMD"][5]) == finding.network.bmd_g_cm2
        assert float(values["INV_ABMD_LOW90"][5]) == 0.751
        assert float(values["INV_TSCORE"][5]) == finding.network.t_score
    text = message(request, HL7).data.decode()
    assert "does not rule out low bone density" in text
    assert "normal" not in text.lower()


def test_hl7_carries_identity_and_order_escaped() -> None:
    request = short_case(PatientID="A|B^C&D", AccessionNumber="ACC~1", PatientName="Doe^Jane^M^Dr^III")
    found = {fields[0]: fields for fields in segments(request)}
    assert found["MSH"][2:6] == ["OSTEO", "Test Hospital", "RIS", "A\\T\\E"]
    assert found["PID"][3] == "A\\F\\B\\S\\C\\T\\D"
    assert found["PID"][5] == "Doe^Jane^M^III^Dr^^L^A"
    assert found["PID"][7:9] == ["19560101", "F"]
    assert found["OBR"][2] == "ACC\\R\\1"
    assert found["OBR"][25] == "P"
    japanese = encoded_name_case(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう")
    name = {fields[0]: fields for fields in segments(japanese)}["PID"][5]
    assert name == "Yamada^Tarou^^^^^L^A~山田^太郎^^^^^L^I~やまだ^たろう^^^^^L^P"


@pytest.mark.parametrize("destination", [HL7, FHIR])
def test_the_same_result_gives_the_same_message(destination: DestinationSettings) -> None:
    one, again = message(short_case(), destination), message(short_case(), destination)
    assert one == again
    later = message(dataclasses.replace(short_case(), revision=2), destination)
    assert later.sop_instance_uid != one.sop_instance_uid
    other = message(short_case(), destination.model_copy(update={"name": "other"}))
    assert other.sop_instance_uid != one.sop_instance_uid


@pytest.mark.parametrize("make", CASES)
def test_a_fhir_library_accepts_every_resource(make: Any) -> None:
    for language in LANGUAGES:
        request = dataclasses.replace(make(), wording=load_wording(language))
        Bundle.model_validate_json(message(request, FHIR).data)
        for resource in resources(request):
            {"DiagnosticReport": DiagnosticReport, "Observation": Observation}[resource["resourceType"]].model_validate(
                resource
            )
            assert resource["status"] == "preliminary"
            assert "normal" not in json.dumps(resource).lower()


def test_fhir_holds_the_numbers_and_points_to_what_it_brings() -> None:
    request = synthetic_case()
    bundle = json.loads(message(request, FHIR).data)
    urls = [entry["fullUrl"] for entry in bundle["entry"]]
    report = bundle["entry"][-1]["resource"]
    assert [entry["reference"] for entry in report["result"]] == urls[:-1]
    assert len(set(urls)) == len(urls) == 13
    assert len({entry["request"]["url"] for entry in bundle["entry"]}) == 13
    assert report["imagingStudy"][0]["identifier"]["value"] == f"urn:oid:{STUDY_UID}"
    assert report["subject"] == {"type": "Patient", "identifier": {"value": "P-17"}}
    # the patient is named by identifier alone
    assert "Doe" not in json.dumps(bundle)
    findings = {finding.level: finding for finding in as_reported(request.result).vertebrae}
    for resource in resources(request)[:-1]:
        finding = findings[Level(resource["bodySite"]["text"].split()[0])]
        assert finding.attenuation_hu is not None
        assert finding.network is not None
        if resource["code"]["text"] == INVESTIGATIONAL.bmd.meaning:
            assert resource["valueQuantity"]["value"] == finding.network.bmd_g_cm2
            assert any("Investigational" in note["text"] for note in resource["note"])
        else:
            assert resource["valueQuantity"]["value"] == finding.attenuation_hu.mean
            assert resource["valueQuantity"]["code"] == "[hnsf'U]"


def test_fhir_says_why_a_value_is_absent() -> None:
    network = next(
        entry
        for entry in resources(withheld_case())
        if entry.get("code", {}).get("text") == INVESTIGATIONAL.bmd.meaning
    )
    t_score = next(entry for entry in network["component"] if entry["code"]["text"] == INVESTIGATIONAL.t_score.meaning)
    assert t_score["dataAbsentReason"]["text"] == "the header gives no age"
    blocked = [entry for entry in resources(indeterminate_case()) if "dataAbsentReason" in entry]
    assert ["metal implant" in entry["dataAbsentReason"]["text"] for entry in blocked] == [True]


def test_a_dicom_destination_gets_no_message() -> None:
    assert list(build_messages(short_case(), [DestinationSettings(name="a", ae_title="A", host="h", port=1)])) == []
