"""HL7 v2.5.1 ORU^R01: the report for systems that read text and numbers, not DICOM.

Fields follow chapters 2, 3, 4 and 7 of the standard. Everything is preliminary (OBR-25 and OBX-11 ``P``): nobody has
verified it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from osteo_daemon.domain.findings import NetworkFinding, VertebraFinding
from osteo_daemon.messaging import concepts
from osteo_daemon.messaging.concepts import Concept
from osteo_daemon.messaging.report_message import ReportMessage, StudyContext

ENCODING: Final = "utf-8"
PRELIMINARY: Final = "P"
SENDING_APPLICATION: Final = "OSTEO"
_ESCAPES: Final = str.maketrans(
    {"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\", "\r": " ", "\n": " "}
)
_REPRESENTATIONS: Final = ("A", "I", "P")
"""HL7 table 4000 for the groups of a DICOM person name: alphabetic, ideographic, phonetic."""


def control_id(uid: str) -> str:
    """MSH-10, at most 20 characters: the same for every attempt at one message, so that a receiver can tell repeats."""
    return hashlib.sha256(uid.encode()).hexdigest()[:20].upper()


def oru_r01(message: ReportMessage, receiving_application: str, receiving_facility: str) -> bytes:
    """The message in UTF-8, segments ended by carriage returns, without the frame of a transport."""
    return "".join(f"{segment}\r" for segment in _segments(message, receiving_application, receiving_facility)).encode(
        ENCODING
    )


def _segments(message: ReportMessage, application: str, facility: str) -> Iterator[str]:
    context = message.context
    moment = message.created.strftime("%Y%m%d%H%M%S%z")
    yield (
        f"MSH|^~\\&|{SENDING_APPLICATION}|{_text(message.institution)}|{_text(application)}|{_text(facility)}|{moment}||"
        f"ORU^R01^ORU_R01|{control_id(message.uid)}|P|2.5.1|||||||UNICODE UTF-8"
    )
    issuer = _text(context.issuer_of_patient_id)
    yield (
        f"PID|1||{_text(context.patient_id)}^^^{issuer}".rstrip("^")
        + f"||{_name(context.patient_name)}||{context.patient_birth_date}|{context.patient_sex}".rstrip("|")
    )
    observed = _study_moment(context)
    procedure = Concept(*context.procedure) if context.procedure else concepts.CT_UNSPECIFIED
    yield (
        f"OBR|1|{_text(context.accession_number)}|{control_id(message.uid)}^{SENDING_APPLICATION}|{_coded(procedure)}|||"
        f"{observed}|||||||||||||||{moment}||CT|{PRELIMINARY}"
    )
    rows = [*_study_rows(message)]
    for number, finding in enumerate(message.result.vertebrae, start=1):
        rows += [(str(number), *row) for row in _vertebra_rows(message, finding)]
    for set_id, (sub_id, kind, name, value, unit) in enumerate(rows, start=1):
        yield f"OBX|{set_id}|{kind}|{name}|{sub_id}|{value}|{unit}|||||{PRELIMINARY}|||{observed}"


_Row = tuple[str, str, str, str, str]  # sub-id, value type, coded name, value, unit


def _study_rows(message: ReportMessage) -> Iterator[_Row]:
    result, wording = message.result, message.wording
    yield "0", "ST", _coded(concepts.STUDY_INSTANCE_UID), result.study_instance_uid, ""
    if result.category is not None:
        yield "0", "CWE", _coded(concepts.CATEGORY), _coded(concepts.CATEGORIES[result.category]), ""
    yield "0", "TX", _coded(concepts.IMPRESSION), _text(wording.impression(result)), ""
    yield "0", "TX", _coded(concepts.RECOMMENDATION), _text(wording.next_step(result)), ""
    yield "0", "TX", _coded(concepts.COMMENT), _text(wording.disclaimer), ""
    if any(finding.network is not None and finding.network.status == "investigational" for finding in result.vertebrae):
        yield "0", "TX", _coded(concepts.COMMENT), _text(wording.investigational), ""
    for sentence in wording.t_score_references(result):
        yield "0", "TX", _coded(concepts.COMMENT), _text(sentence), ""


def _vertebra_rows(message: ReportMessage, finding: VertebraFinding) -> Iterator[tuple[str, str, str, str]]:
    yield "CWE", _coded(concepts.FINDING_SITE), _coded(concepts.VERTEBRAE[finding.level]), ""
    measured, corrected = finding.attenuation_hu, finding.attenuation_hu_corrected
    hounsfield = _coded(concepts.HOUNSFIELD)
    if measured is not None:
        for value, derivation in (
            (measured.mean, concepts.MEAN),
            (measured.median, concepts.MEDIAN),
            (measured.sd, concepts.STANDARD_DEVIATION),
        ):
            # the derivation as the alternate identifier: OBX-3 has no place of its own for it
            yield "NM", f"{_coded(concepts.ATTENUATION)}^{_coded(derivation)}", f"{value:g}", hounsfield
    if corrected is not None:
        yield "NM", _coded(concepts.CORRECTED_ATTENUATION), f"{corrected.mean:g}", hounsfield
    for flag in finding.quality_flags:
        yield "TX", _coded(concepts.COMMENT), _text(message.wording.flag_text(flag)), ""
    if finding.network is not None:
        yield from _network_rows(message, finding.network)


def _network_rows(message: ReportMessage, network: NetworkFinding) -> Iterator[tuple[str, str, str, str]]:
    yield "TX", _coded(concepts.NETWORK_STATUS), _text(message.wording.tables["status"][network.status]), ""
    estimates = concepts.ESTIMATES[network.status]
    density = _coded(concepts.G_PER_CM2)
    if network.bmd_g_cm2 is not None:
        yield "NM", _coded(estimates.bmd), f"{network.bmd_g_cm2:g}", density
    if network.bmd_interval_90_g_cm2 is not None:
        for concept, limit in zip(estimates.interval_90, network.bmd_interval_90_g_cm2, strict=True):
            yield "NM", _coded(concept), f"{limit:g}", density
    if network.t_score is not None:
        yield "NM", _coded(estimates.t_score), f"{network.t_score:g}", _coded(concepts.T_SCORE_UNIT)


def _text(value: str) -> str:
    """Escape sequences of 2.7.4; a line break becomes a space."""
    return value.translate(_ESCAPES)


def _coded(concept: Concept) -> str:
    return f"{_text(concept.value)}^{_text(concept.meaning)}^{_text(concept.scheme)}"


def _name(person_name: str) -> str:
    """XPN from a DICOM person name: suffix and prefix change places, each group is a repetition."""
    repetitions = []
    for group, representation in zip(person_name.split("="), _REPRESENTATIONS, strict=False):
        parts = [_text(part) for part in (*group.split("^"), "", "", "", "", "")[:5]]
        if any(parts):
            family, given, middle, prefix, suffix = parts
            repetitions.append(f"{family}^{given}^{middle}^{suffix}^{prefix}^^L^{representation}")
    return "~".join(repetitions)


def _study_moment(context: StudyContext) -> str:
    return f"{context.study_date}{context.study_time.partition('.')[0]}" if context.study_date else ""
