"""One measurement group (TID 1411) per vertebra and channel: what was measured, and what the network estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.outline import NativeMask, slice_polyline
from osteo_daemon.dicom.report_source import frame_number
from osteo_daemon.dicom.uids import tracking_uid
from osteo_daemon.domain.findings import (
    Level,
    ModelReference,
    NetworkFinding,
    QualityFlag,
    ScreeningResult,
    VertebraFinding,
)
from osteo_daemon.imaging.volume import CtVolume

MANUFACTURER = "osteo_daemon"
ATTENUATION_ALGORITHM = "osteo_daemon trabecular attenuation"


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


@dataclass(frozen=True, slots=True, eq=False)
class MeasurementGroups:
    """Builds the groups of one report.

    Attributes:
        result: as reported (rounded).
        network_model: the bundle behind the network values.
        segments: body segments to refer to; empty when no segmentation accompanies the report.
        referenced: headers of the slices that groups pointed to so far, by SOP Instance UID and frame; grows
            with each group.
    """

    result: ScreeningResult
    anatomy: ReportAnatomy
    network_model: ModelReference | None
    segments: Mapping[Level, SegmentReference]
    software_version: str
    referenced: dict[tuple[str, int | None], Dataset]

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
            if measured.voxel_count is not None:
                measurements += _number(codes.VOXEL_COUNT, measured.voxel_count, codes.UNITY)
            if measured.standard_error is not None:
                measurements += _number(codes.STANDARD_ERROR, measured.standard_error, codes.HOUNSFIELD)
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
        if finding.heights_mm is not None:
            for code, height in zip(codes.HEIGHTS, finding.heights_mm, strict=True):
                measurements += _number(code, height, codes.MILLIMETRE)
        if finding.compression_grade is not None:
            measurements += _number(codes.COMPRESSION_GRADE, finding.compression_grade, codes.UNITY)
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
        estimates = codes.ESTIMATES[network.status]
        if network.bmd_g_cm2 is not None:
            measurements += _number(estimates.bmd, network.bmd_g_cm2, codes.G_PER_CM2)
        if network.bmd_interval_90_g_cm2 is not None:
            for code, limit in zip(estimates.interval_90, network.bmd_interval_90_g_cm2, strict=True):
                measurements += _number(code, limit, codes.G_PER_CM2)
        model = self.network_model
        name, version = ("network", self.software_version) if model is None else (model.bundle, model.version)
        if network.t_score is not None:
            reference = network.t_score_reference
            measurements += _number(
                estimates.t_score,
                network.t_score,
                codes.UNITY,
                algorithm=None
                if reference is None
                else sr.AlgorithmIdentification(name=name, version=version, parameters=[f"reference={reference}"]),
            )
        for name, probability in (network.class_probabilities or {}).items():
            measurements += _number(estimates.class_probabilities[name], round(100 * probability, 1), codes.PERCENT)
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
                name=name,
                version=version,
                parameters=parameters,
                manufacturer=MANUFACTURER,
            ),
            measurements=measurements or None,
            qualitative_evaluations=[
                sr.QualitativeEvaluation(codes.NETWORK_STATUS, codes.NETWORK_STATUSES[network.status]),
                *(
                    sr.QualitativeEvaluation(codes.WITHHELD[value], codes.slug_code(reason))
                    for value, reason in network.withheld.items()
                ),
                *(_flag_evaluation(flag) for flag in network.quality_flags),
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
        frame = frame_number(header)
        self.referenced[str(header.SOPInstanceUID), frame] = header
        return sr.ImageRegion(
            graphic_type=graphic_type,
            graphic_data=points,
            source_image=sr.SourceImageForRegion(
                referenced_sop_class_uid=str(header.SOPClassUID),
                referenced_sop_instance_uid=str(header.SOPInstanceUID),
                referenced_frame_numbers=None if frame is None else [frame],
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
