"""The structured report: TID 1500 with one measurement group per vertebra and channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import UID, BasicTextSRStorage, Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.measurement_group import MANUFACTURER, MeasurementGroups, ReportAnatomy, SegmentReference
from osteo_daemon.dicom.report_source import frame_number
from osteo_daemon.dicom.series_description import series_description
from osteo_daemon.dicom.uids import device_uid
from osteo_daemon.domain.findings import SEGMENTATION_SOURCE, Level, ModelReference, Outcome, ScreeningResult
from osteo_daemon.domain.wording import Wording

MODEL_NAME = "osteo_daemon"
SR_SERIES_NUMBER = 9101
BASIC_TEXT = "basic-text"
SR_CLASSES: Mapping[str, str] = {
    "comprehensive-3d": str(Comprehensive3DSRStorage),
    "comprehensive": str(ComprehensiveSRStorage),
    "enhanced": str(EnhancedSRStorage),
    BASIC_TEXT: str(BasicTextSRStorage),
}
"""SOP classes by the name that settings use, newest first. One tree is legal in all but Basic Text, which has no
numbers and coordinates: see `osteo_daemon.dicom.basic_text`."""


@dataclass(frozen=True, slots=True)
class SeriesReference:
    """An instance with the study and series it belongs to."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


def report_content(
    result: ScreeningResult,
    anatomy: ReportAnatomy,
    wording: Wording,
    *,
    network_model: ModelReference | None,
    segments: Mapping[Level, SegmentReference],
    software_version: str,
    device_serial_number: str,
) -> tuple[sr.ContainerContentItem, tuple[Dataset, ...]]:
    """The content tree, and the headers of the slices that it points to.

    Args:
        result: as reported (rounded).
        network_model: the bundle behind the network values.
        segments: body segments to refer to; empty when no segmentation accompanies the report.
    """
    root = sr.ContainerContentItem(name=codes.MEASUREMENT_REPORT, template_id="1500")
    root.ContentSequence = sr.ContentSequence()
    root.ContentSequence.extend(
        sr.LanguageOfContentItemAndDescendants(Code(wording.language_in_dicom, "RFC5646", wording.meaning))
    )
    root.ContentSequence.extend(_observation_context(result, software_version, device_serial_number))
    root.ContentSequence.append(
        sr.CodeContentItem(
            name=codes.PROCEDURE_REPORTED,
            value=_procedure(anatomy.headers[0]),
            relationship_type=sr.RelationshipTypeValues.HAS_CONCEPT_MOD,
        )
    )
    referenced: dict[tuple[str, int | None], Dataset] = {}
    if result.vertebrae:
        measurements = sr.ContainerContentItem(
            name=codes.IMAGING_MEASUREMENTS, relationship_type=sr.RelationshipTypeValues.CONTAINS
        )
        measurements.ContentSequence = sr.ContentSequence()
        builder = MeasurementGroups(result, anatomy, network_model, segments, software_version, referenced)
        for finding in result.vertebrae:
            measurements.ContentSequence.extend(builder.attenuation(finding))
            if finding.network is not None:
                measurements.ContentSequence.extend(builder.network(finding, finding.network))
        root.ContentSequence.append(measurements)
    root.ContentSequence.append(_evaluations(result, wording))
    if not referenced:
        middle = anatomy.headers[len(anatomy.headers) // 2]
        referenced[str(middle.SOPInstanceUID), frame_number(middle)] = middle
    return root, tuple(referenced.values())


def _observation_context(
    result: ScreeningResult, software_version: str, device_serial_number: str
) -> sr.ObservationContext:
    return sr.ObservationContext(observer_device_context=observer(result, software_version, device_serial_number))


def observer(result: ScreeningResult, software_version: str, device_serial_number: str) -> sr.ObserverContext:
    """This node as the observing device; a new UID for every version of software or model."""
    return sr.ObserverContext(
        observer_type=Code("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            # a segmentation belongs to its study: it makes no other device of this node
            uid=device_uid(
                software_version,
                tuple(model.sha256 for model in result.models if model.bundle != SEGMENTATION_SOURCE),
            ),
            name=MODEL_NAME,
            manufacturer_name=MANUFACTURER,
            model_name=f"{MODEL_NAME} {software_version}",
            serial_number=device_serial_number,
        ),
    )


def _procedure(header: Dataset) -> Code:
    # what was done to the patient, never what the algorithm did
    for item in header.get("ProcedureCodeSequence", ()):
        value, scheme, meaning = (item.get(key) for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
        if value and scheme and meaning:
            return Code(str(value), str(scheme), str(meaning))
    return codes.CT_UNSPECIFIED


def _evaluations(result: ScreeningResult, wording: Wording) -> sr.ContainerContentItem:
    contains = sr.RelationshipTypeValues.CONTAINS
    container = sr.ContainerContentItem(name=codes.QUALITATIVE_EVALUATIONS, relationship_type=contains)
    items: list[sr.ContentItem] = []

    def code(name: Code, value: Code) -> None:
        items.append(sr.CodeContentItem(name=name, value=value, relationship_type=contains))

    def text(name: Code, value: str) -> None:
        items.append(sr.TextContentItem(name=name, value=value, relationship_type=contains))

    reported = result.outcome is Outcome.REPORTED
    code(codes.OUTCOME, codes.OUTCOME_REPORTED if reported else codes.OUTCOME_EXCLUDED)
    if result.category is not None:
        code(codes.CATEGORY, codes.CATEGORIES[result.category])
    if result.exclusion is not None:
        code(codes.EXCLUSION, codes.slug_code(result.exclusion.code))
        text(codes.EXCLUSION_REASON, result.exclusion.reason)
    for flag in result.quality_flags:
        code(codes.FLAGS[flag.severity], codes.slug_code(flag.code))
    text(codes.IMPRESSION, wording.impression(result))
    text(codes.RECOMMENDATION, wording.next_step(result))
    text(codes.COMMENT, wording.disclaimer)
    if any(finding.network is not None for finding in result.vertebrae):
        statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
        if "investigational" in statuses:
            text(codes.COMMENT, wording.investigational)
        for sentence in wording.t_score_references(result):
            text(codes.COMMENT, sentence)
    if result.series_instance_uid is not None:
        items.append(
            sr.UIDRefContentItem(
                name=codes.SCREENED_SERIES, value=result.series_instance_uid, relationship_type=contains
            )
        )
    for model in result.models:
        text(codes.MODEL_BUNDLE, f"{model.bundle} {model.version} sha256:{model.sha256}")
    container.ContentSequence = sr.ContentSequence(items)
    return container


def report_dataset(
    content: sr.ContainerContentItem,
    evidence: Sequence[Dataset],
    *,
    series_instance_uid: str,
    instance_number: int,
    is_complete: bool,
    software_version: str,
    device_serial_number: str,
    institution: str,
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """The SR document around a content tree; class, instance and times are set by the caller, see `retarget`.

    Args:
        evidence: headers of every instance that the tree points to; patient and study are taken from the first.
    """
    document: Dataset = sr.Comprehensive3DSR(
        evidence=evidence,
        content=content,
        series_instance_uid=series_instance_uid,
        series_number=SR_SERIES_NUMBER,
        sop_instance_uid="2.25.1",
        instance_number=instance_number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=software_version,
        device_serial_number=device_serial_number,
        institution_name=institution or None,
        series_description=series_description("report"),
        is_complete=is_complete,
        is_final=False,
        is_verified=False,
        contributing_equipment=contributing_equipment,
    )
    return document


def retarget(document: Dataset, sop_class_uid: str, sop_instance_uid: str, predecessor: SeriesReference | None) -> None:
    """Make ``document`` an instance of another SR class, in place."""
    document.SOPClassUID = document.file_meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    document.SOPInstanceUID = document.file_meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    document.pop("PredecessorDocumentsSequence", None)
    if predecessor is not None:
        instance, series, study = Dataset(), Dataset(), Dataset()
        instance.ReferencedSOPClassUID = predecessor.sop_class_uid
        instance.ReferencedSOPInstanceUID = predecessor.sop_instance_uid
        series.SeriesInstanceUID = predecessor.series_instance_uid
        series.ReferencedSOPSequence = [instance]
        study.StudyInstanceUID = predecessor.study_instance_uid
        study.ReferencedSeriesSequence = [series]
        document.PredecessorDocumentsSequence = [study]
