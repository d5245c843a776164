"""Small CT series for tests: real DICOM files with chosen geometry and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_slices(
    folder: Path,
    voxels: npt.NDArray[np.integer[Any]],
    positions: Sequence[Sequence[float]],
    *,
    orientation: Sequence[float] = AXIAL,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
    study_uid: str | None = None,
    series_uid: str | None = None,
    **attributes: Any,
) -> list[Path]:
    """Write (D, H, W) HU voxels as CT images at the given Image Positions; ``attributes`` override the header's."""
    folder.mkdir(parents=True, exist_ok=True)
    study_uid, series_uid = study_uid or generate_uid(), series_uid or generate_uid()
    paths = []
    for number, (plane, position) in enumerate(zip(voxels, positions, strict=True), start=1):
        header = Dataset()
        header.SpecificCharacterSet = "ISO_IR 192"
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.SOPClassUID = CTImageStorage
        header.SOPInstanceUID = generate_uid()
        header.StudyInstanceUID = study_uid
        header.SeriesInstanceUID = series_uid
        header.StudyDate = "20260102"
        header.StudyTime = "030405"
        header.AccessionNumber = "A1"
        header.Modality = "CT"
        header.PatientName = "Test^Virtual"
        header.PatientID = "V1"
        header.PatientBirthDate = "19560101"
        header.PatientSex = "F"
        header.StudyID = "1"
        header.SeriesNumber = 3
        header.InstanceNumber = number
        header.KVP = "120"
        header.SliceThickness = "2.5"
        header.ConvolutionKernel = "B30f"
        header.FrameOfReferenceUID = "2.25.1"
        header.ImagePositionPatient = [float(value) for value in position]
        header.ImageOrientationPatient = [float(value) for value in orientation]
        header.PixelSpacing = list(spacing_mm)
        header.SamplesPerPixel = 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.Rows, header.Columns = plane.shape
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
        header.RescaleIntercept, header.RescaleSlope = "-1024", "1"
        header.PixelData = np.clip(plane + 1024, 0, 4095).astype("<u2").tobytes()
        for keyword, value in attributes.items():
            if value is None:
                del header[keyword]
            else:
                setattr(header, keyword, value)
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        path = folder / f"{series_uid[-8:]}-{number:04d}.dcm"
        header.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def column(count: int, step_mm: float, start_mm: float = 0.0) -> list[tuple[float, float, float]]:
    """Image positions of ``count`` axial slices, ``step_mm`` apart."""
    return [(-10.0, -20.0, start_mm + step_mm * index) for index in range(count)]
