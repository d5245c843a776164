"""The structured report: TID 1500 with one measurement group per vertebra and channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import UID, Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from osteo_daemon.dicom import codes, wording
from osteo_daemon.dicom.outline import NativeMask, slice_polyline
from osteo_daemon.dicom.uids import device_uid, tracking_uid
from osteo_daemon.domain.findings import (
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    QualityFlag,
    ScreeningResult,
    VertebraFinding,
)
from osteo_daemon.imaging.volume import CtVolume

MANUFACTURER = "osteo_daemon"
MODEL_NAME = "osteo_daemon"
SR_SERIES_NUMBER = 9101
ATTENUATION_ALGORITHM = "osteo_daemon trabecular attenuation"
SR_CLASSES: Mapping[str, str] = {
    "comprehensive-3d": str(Comprehensive3DSRStorage),
    "comprehensive": str(ComprehensiveSRStorage),
    "enhanced": str(EnhancedSRStorage),
}
"""SOP classes by the name that settings use, newest first; the same tree is legal in each."""


@dataclass(frozen=True, slots=True)
class SeriesReference:
    """An instance with the study and series it belongs to."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class SegmentReference:
    """A segment of a segmentation object that the report may point to."""

    sop_class_uid: str
    sop_instance_uid: str
    segment_number: int


@dataclass(frozen=True, slots=True, eq=False)
class ReportAnatomy:
    """Where the vertebrae lie on the source slices.

    Attributes:
        headers: cleaned headers of the source slices, in the order of the volume's D axis.
        bodies: vertebral bodies on the native grid.
        trabecular: measured regions on the native grid.
    """

    headers: Sequence[Dataset]
    volume: CtVolume | None
    bodies: Mapping[Level, NativeMask]
    trabecular: Mapping[Level, NativeMask]


def report_content(
    result: ScreeningResult,
    anatomy: ReportAnatomy,
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
    root.ContentSequence.extend(sr.LanguageOfContentItemAndDescendants(Code("en", "RFC5646", "English")))
    root.ContentSequence.extend(_observation_context(result, software_version, device_serial_number))
    root.ContentSequence.append(
        sr.CodeContentItem(
            name=codes.PROCEDURE_REPORTED,
            value=_procedure(anatomy.headers[0]),
            relationship_type=sr.RelationshipTypeValues.HAS_CONCEPT_MOD,
        )
    )
    referenced: dict[str, Dataset] = {}
    if result.vertebrae:
        measurements = sr.ContainerContentItem(
            name=codes.IMAGING_MEASUREMENTS, relationship_type=sr.RelationshipTypeValues.CONTAINS
        )
        measurements.ContentSequence = sr.ContentSequence()
        builder = _Groups(result, anatomy, network_model, segments, software_version, referenced)
        for finding in result.vertebrae:
            measurements.ContentSequence.extend(builder.attenuation(finding))
            if finding.network is not None:
                measurements.ContentSequence.extend(builder.network(finding, finding.network))
        root.ContentSequence.append(measurements)
    root.ContentSequence.append(_evaluations(result))
    if not referenced:
        middle = anatomy.headers[len(anatomy.headers) // 2]
        referenced[str(middle.SOPInstanceUID)] = middle
    return root, tuple(referenced.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    result: ScreeningResult
    anatomy: ReportAnatomy
    network_model: ModelReference | None
    segments: Mapping[Level, SegmentReference]
    software_version: str
    referenced: dict[str, Dataset]

    def attenuation(self, finding: VertebraFinding) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
        """Group of the deterministic channel: the trabecular region, its attenuation, flags, centre, confidence."""
        measurements = []
        measured, corrected = finding.attenuation_hu, finding.attenuation_hu_corrected
        if measured is not None:
            for value, derivation in (
                (measured.mean, codes.MEAN),
                (measured.median, codes.MEDIAN),
                (measured.sd, codes.STANDARD_DEVIATION),
            ):
                measurements += _number(codes.ATTENUATION, value, codes.HOUNSFIELD, derivation=derivation)
            measurements += _number(codes.VOLUME, measured.volume_mm3, codes.CUBIC_MILLIMETRE)
        if corrected is not None:
            measurements += _number(
                codes.CORRECTED_ATTENUATION,
                corrected.mean,
                codes.HOUNSFIELD,
                algorithm=sr.AlgorithmIdentification(
                    name="osteo_daemon attenuation correction",
                    version=self.software_version,
                    parameters=[f"{name}={factor!r}" for name, factor in corrected.factors.items()] or None,
                ),
            )
        measurements += _number(codes.CERTAINTY, round(100 * finding.confidence, 1), codes.PERCENT)
        for code, coordinate in zip(codes.CENTRE_LPS, finding.centre_lps_mm, strict=True):
            measurements += _number(code, coordinate, codes.MILLIMETRE)
        return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=tracking_uid(self.result.study_instance_uid, finding.level, "attenuation"),
                identifier=f"{finding.level} trabecular attenuation",
            ),
            referenced_regions=self._regions(finding, self.anatomy.trabecular),
            finding_type=codes.VERTEBRA,
            finding_sites=[sr.FindingSite(codes.VERTEBRAE[finding.level])],
            algorithm_id=sr.AlgorithmIdentification(
                name=ATTENUATION_ALGORITHM, version=self.software_version, manufacturer=MANUFACTURER
            ),
            measurements=measurements,
            qualitative_evaluations=[_flag_evaluation(flag) for flag in finding.quality_flags] or None,
        )

    def network(
        self, finding: VertebraFinding, network: NetworkFinding
    ) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
        """Group of the network channel: estimates with their status, kept apart from what was measured."""
        measurements = []
        if network.bmd_g_cm2 is not None:
            measurements += _number(codes.BMD, network.bmd_g_cm2, codes.G_PER_CM2)
        if network.t_score is not None:
            measurements += _number(codes.T_SCORE, network.t_score, codes.UNITY)
        for name, probability in (network.class_probabilities or {}).items():
            measurements += _number(codes.CLASS_PROBABILITIES[name], round(100 * probability, 1), codes.PERCENT)
        model = self.network_model
        parameters = [f"sha256={model.sha256}"] if model is not None else []
        parameters += [f"status={network.status}"]
        parameters += [f"level {name}={value!r}" for name, value in network.level_probabilities.items()]
        parameters += [f"expert {number}={value!r}" for number, value in enumerate(network.expert_weights)]
        segment = self.segments.get(finding.level)
        return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=tracking_uid(self.result.study_instance_uid, finding.level, "network"),
                identifier=f"{finding.level} network estimate, {network.status}",
            ),
            referenced_segment=None if segment is None else self._segment(segment),
            referenced_regions=None if segment is not None else self._regions(finding, self.anatomy.bodies),
            finding_type=codes.VERTEBRA,
            finding_sites=[sr.FindingSite(codes.VERTEBRAE[finding.level])],
            algorithm_id=sr.AlgorithmIdentification(
                name=model.bundle if model is not None else "network",
                version=model.version if model is not None else self.software_version,
                parameters=parameters,
                manufacturer=MANUFACTURER,
            ),
            measurements=measurements or None,
            qualitative_evaluations=[
                sr.QualitativeEvaluation(codes.NETWORK_STATUS, codes.NETWORK_STATUSES[network.status])
            ],
        )

    def _segment(self, segment: SegmentReference) -> sr.ReferencedSegment:
        return sr.ReferencedSegment(
            sop_class_uid=segment.sop_class_uid,
            sop_instance_uid=segment.sop_instance_uid,
            segment_number=segment.segment_number,
            source_series=sr.SourceSeriesForSegmentation(str(self.anatomy.headers[0].SeriesInstanceUID)),
        )

    def _regions(self, finding: VertebraFinding, masks: Mapping[Level, NativeMask]) -> list[sr.ImageRegion]:
        native = masks.get(finding.level)
        if native is None:
            # nothing was outlined: the centre alone, so that a reader still finds the level
            index = np.zeros(3)
            if self.anatomy.volume is not None:
                index = self.anatomy.volume.to_index(finding.centre_lps_mm)
            d = int(np.clip(np.rint(index[0]), 0, len(self.anatomy.headers) - 1))
            points = np.array([[index[2] + 0.5, index[1] + 0.5]])
            return [self._image_region(d, sr.GraphicTypeValues.POINT, points)]
        slices = [native.middle_slice]
        if len(self.result.vertebrae) == 1:
            # one outline in a whole report makes PixelMed's validator take every group for a planar one (TID 1410)
            slices += sorted(set(native.slices) - set(slices), key=lambda d: abs(d - slices[0]))[:1]
        return [self._image_region(d, sr.GraphicTypeValues.POLYLINE, slice_polyline(native, d)) for d in slices]

    def _image_region(
        self, d: int, graphic_type: sr.GraphicTypeValues, points: npt.NDArray[np.float64]
    ) -> sr.ImageRegion:
        header = self.anatomy.headers[d]
        self.referenced[str(header.SOPInstanceUID)] = header
        return sr.ImageRegion(
            graphic_type=graphic_type,
            graphic_data=points,
            source_image=sr.SourceImageForRegion(
                referenced_sop_class_uid=str(header.SOPClassUID), referenced_sop_instance_uid=str(header.SOPInstanceUID)
            ),
        )


def _number(
    name: Code,
    value: float,
    unit: Code,
    *,
    derivation: Code | None = None,
    algorithm: sr.AlgorithmIdentification | None = None,
) -> list[sr.Measurement]:
    # a NUM cannot hold "not a number": what is not known is left out
    if not math.isfinite(value):
        return []
    return [sr.Measurement(name=name, value=value, unit=unit, derivation=derivation, algorithm_id=algorithm)]


def _flag_evaluation(flag: QualityFlag) -> sr.QualitativeEvaluation:
    return sr.QualitativeEvaluation(codes.FLAGS[flag.severity], codes.slug_code(flag.code))


def _observation_context(
    result: ScreeningResult, software_version: str, device_serial_number: str
) -> sr.ObservationContext:
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=Code("121007", "DCM", "Device"),
            observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                uid=device_uid(software_version, tuple(model.sha256 for model in result.models)),
                name=MODEL_NAME,
                manufacturer_name=MANUFACTURER,
                model_name=f"{MODEL_NAME} {software_version}",
                serial_number=device_serial_number,
            ),
        )
    )


def _procedure(header: Dataset) -> Code:
    # what was done to the patient, never what the algorithm did
    for item in header.get("ProcedureCodeSequence", ()):
        value, scheme, meaning = (item.get(key) for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
        if value and scheme and meaning:
            return Code(str(value), str(scheme), str(meaning))
    return codes.CT_UNSPECIFIED


def _evaluations(result: ScreeningResult) -> sr.ContainerContentItem:
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
    text(codes.COMMENT, wording.DISCLAIMER)
    if any(finding.network is not None for finding in result.vertebrae):
        statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
        if "investigational" in statuses:
            text(codes.COMMENT, wording.INVESTIGATIONAL)
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
        series_description=wording.series_description("report"),
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
