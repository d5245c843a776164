"""Key Object Selection: the source slices that were measured, so that a viewer can jump to them."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
from highdicom import ko, sr
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.measurement_group import MANUFACTURER
from osteo_daemon.dicom.report_source import frame_number, instances
from osteo_daemon.dicom.series_description import series_description

KOS_SERIES_NUMBER = 9105
KEY_OBJECTS_CLASS_UID = str(KeyObjectSelectionDocumentStorage)


def key_objects_dataset(
    slices: Sequence[Dataset],
    observer: sr.ObserverContext,
    description: str,
    *,
    series_instance_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    institution: str,
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """A Key Object Selection (PS3.3 A.35.4, TID 2010) of source slices.

    Only source slices are selected: nothing of ours that a peer may have refused.

    Args:
        slices: cleaned headers, at least one.
    """
    evidence = instances(slices)
    content = ko.KeyObjectSelection(
        document_title=codes.OF_INTEREST,
        referenced_objects=evidence,
        observer_device_context=observer,
        description=description,
    )
    dataset: Dataset = ko.KeyObjectSelectionDocument(
        evidence=evidence,
        content=content,
        series_instance_uid=series_instance_uid,
        series_number=KOS_SERIES_NUMBER,
        sop_instance_uid=sop_instance_uid,
        instance_number=instance_number,
        manufacturer=MANUFACTURER,
        institution_name=institution or None,
        series_description=series_description("key slices"),
        contributing_equipment=contributing_equipment,
    )
    for item in dataset.ContentSequence:
        if item.ValueType == "IMAGE":
            # TID 2010 has no purpose of reference; highdicom gives one and needs it while it builds
            item.pop("ConceptNameCodeSequence", None)
            _name_frames(item.ReferencedSOPSequence[0], slices)
    return dataset


def _name_frames(reference: Dataset, slices: Sequence[Dataset]) -> None:
    """Of a multi-frame object only the frames that were measured."""
    uid = reference.ReferencedSOPInstanceUID
    numbers = [frame_number(header) for header in slices if header.SOPInstanceUID == uid]
    frames = sorted(number for number in numbers if number is not None)
    if frames:
        reference.ReferencedFrameNumber = frames
