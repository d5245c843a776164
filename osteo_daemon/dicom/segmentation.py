"""The segmentation object: vertebral bodies and trabecular regions as binary segments on the source slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
import numpy as np
from highdicom import seg
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.outline import NativeMask
from osteo_daemon.dicom.report_source import frame_number
from osteo_daemon.dicom.series_description import series_description
from osteo_daemon.dicom.uids import derived_uid, tracking_uid
from osteo_daemon.domain.findings import Level

SEG_SERIES_NUMBER = 9102
SEGMENTATION_CLASS_UID = str(SegmentationStorage)
_REFERENCED_INSTANCE = Tag("ReferencedSOPInstanceUID")
# Okabe and Ito's colours: told apart with every common colour vision deficiency
_COLOURS = {
    Level.T10: "#999999",
    Level.T11: "#CC79A7",
    Level.T12: "#F0E442",
    Level.L1: "#0072B2",
    Level.L2: "#E69F00",
    Level.L3: "#009E73",
    Level.L4: "#D55E00",
    Level.L5: "#56B4E9",
    Level.S1: "#BBBBBB",
}


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One segment to write: a vertebral body, or the trabecular region in it."""

    level: Level
    trabecular: bool
    native: NativeMask

    @property
    def label(self) -> str:
        """Segment Label (0062,0005)."""
        return f"{self.level} trabecular region" if self.trabecular else f"{self.level} vertebral body"


def plan_segments(bodies: Mapping[Level, NativeMask], trabecular: Mapping[Level, NativeMask]) -> tuple[Segment, ...]:
    """Segments in the order of their numbers: the bodies cranial to caudal, then the regions."""
    return tuple(
        Segment(level, is_trabecular, masks[level])
        for is_trabecular, masks in ((False, bodies), (True, trabecular))
        for level in Level
        if level in masks
    )


def segmentation_dataset(
    segments: Sequence[Segment],
    headers: Sequence[Dataset],
    *,
    series_instance_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    software_version: str,
    device_serial_number: str,
    institution: str,
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """A DICOM segmentation (PS3.3 A.51), binary and sparse: only slices that a segment touches have frames.

    Args:
        segments: at least one.
        headers: cleaned headers of all source slices, in the order of the volume's D axis.
    """
    used = sorted({d for segment in segments for d in segment.native.slices})
    rows, columns = int(headers[used[0]].Rows), int(headers[used[0]].Columns)
    frame_of = {d: frame for frame, d in enumerate(used)}
    pixels = np.zeros((len(used), rows, columns, len(segments)), dtype=np.uint8)
    for number, segment in enumerate(segments):
        d0, h0, w0 = segment.native.origin
        _, height, width = segment.native.mask.shape
        for d in segment.native.slices:
            pixels[frame_of[d], h0 : h0 + height, w0 : w0 + width, number] = segment.native.mask[d - d0]
    algorithm = hd.AlgorithmIdentificationSequence(
        name="osteo_daemon", family=codes.ARTIFICIAL_INTELLIGENCE, version=software_version
    )
    source, frames = _as_single_images([headers[d] for d in used])
    dataset: Dataset = seg.Segmentation(
        source_images=source,
        pixel_array=pixels,
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(number, segment, headers[0], algorithm) for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=series_instance_uid,
        series_number=SEG_SERIES_NUMBER,
        sop_instance_uid=sop_instance_uid,
        instance_number=instance_number,
        manufacturer="osteo_daemon",
        manufacturer_model_name="osteo_daemon",
        software_versions=software_version,
        device_serial_number=device_serial_number,
        institution_name=institution or None,
        content_label="VERTEBRAE",
        content_description="Vertebral bodies and measured trabecular regions",
        content_creator_name=None,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        series_description=series_description("regions"),
        contributing_equipment=contributing_equipment,
    )
    _refer_to_frames(dataset, frames)
    _fix_dimension_uid(dataset, derived_uid("dimensions", sop_instance_uid))
    return dataset


def _description(
    number: int, segment: Segment, header: Dataset, algorithm: hd.AlgorithmIdentificationSequence
) -> seg.SegmentDescription:
    what = "attenuation" if segment.trabecular else "network"
    vertebra = codes.VERTEBRAE[segment.level]
    return seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.label,
        segmented_property_category=codes.SPATIAL_CONCEPT if segment.trabecular else codes.ANATOMICAL_STRUCTURE,
        segmented_property_type=codes.TRABECULAR_REGION if segment.trabecular else vertebra,
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking_uid(str(header.StudyInstanceUID), segment.level, what),
        tracking_id=segment.label,
        anatomic_regions=[vertebra] if segment.trabecular else None,
        display_color=hd.color.CIELabColor.from_string(_COLOURS[segment.level]),
    )


def _as_single_images(slices: Sequence[Dataset]) -> tuple[list[Dataset], dict[str, Dataset]]:
    """Slices with each frame under a UID of its own, and the frames by that UID.

    highdicom takes one multi-frame object, whole. A stack may be a part of one, or lie in several.
    """
    images, frames = [], dict[str, Dataset]()
    for header in slices:
        number = frame_number(header)
        if number is None:
            images.append(header)
            continue
        image = Dataset()
        image.update(header)
        # new elements: setting the attribute would change those that all headers share
        image.add_new("SOPClassUID", "UI", CTImageStorage)
        image.add_new("SOPInstanceUID", "UI", derived_uid("frame", str(header.SOPInstanceUID), str(number)))
        frames[str(image.SOPInstanceUID)] = header
        images.append(image)
    return images, frames


def _refer_to_frames(dataset: Dataset, frames: Mapping[str, Dataset]) -> None:
    """Put the frames themselves where `_as_single_images` had stand-ins, each object once among the instances."""
    if not frames:
        return

    def visit(parent: Dataset, element: DataElement) -> None:
        if element.tag == _REFERENCED_INSTANCE and (frame := frames.get(str(element.value))) is not None:
            element.value = frame.SOPInstanceUID
            parent.ReferencedSOPClassUID = frame.SOPClassUID
            parent.ReferencedFrameNumber = frame_number(frame)

    dataset.walk(visit)
    for series in dataset.ReferencedSeriesSequence:
        items = {str(item.ReferencedSOPInstanceUID): item for item in series.ReferencedInstanceSequence}
        for item in items.values():
            item.pop("ReferencedFrameNumber", None)
        series.ReferencedInstanceSequence = list(items.values())


def _fix_dimension_uid(dataset: Dataset, uid: str) -> None:
    # highdicom draws a random one; the same input must give the same bytes
    for item in dataset.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = uid
    for item in dataset.DimensionIndexSequence:
        item.DimensionOrganizationUID = uid
