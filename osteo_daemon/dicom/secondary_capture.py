"""The picture as a DICOM object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from osteo_daemon.dicom.series_description import series_description

SC_SERIES_NUMBER = 9103
SECONDARY_CAPTURE_CLASS_UID = str(SecondaryCaptureImageStorage)


def picture_dataset(
    picture: npt.NDArray[np.uint8],
    header: Dataset,
    *,
    series_instance_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    software_version: str,
    device_serial_number: str,
    institution: str,
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """The picture as a Secondary Capture in the source study (PS3.3 A.8.1)."""
    extra: dict[str, Any] = {"institution_name": institution} if institution else {}
    dataset: Dataset = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=header,
        pixel_array=picture,
        photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=hd.CoordinateSystemNames.PATIENT,
        series_instance_uid=series_instance_uid,
        series_number=SC_SERIES_NUMBER,
        sop_instance_uid=sop_instance_uid,
        instance_number=instance_number,
        manufacturer="osteo_daemon",
        manufacturer_model_name="osteo_daemon",
        software_versions=software_version,
        device_serial_number=device_serial_number,
        patient_orientation=("P", "F"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=series_description("picture"),
        contributing_equipment=contributing_equipment,
        **extra,
    )
    # without a body part the Laterality of a paired one would be asked for (PS3.3 C.7.3.1)
    dataset.BodyPartExamined = "LSPINE"
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    return dataset
