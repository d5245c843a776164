"""A scan of a virtual patient as a series of CT images."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from osteo_daemon.phantom.scanner import Phase
from osteo_daemon.phantom.study import PhantomStudy

_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:osteo-daemon:phantom")
_INTERCEPT: Final = -1024
_AGENT: Final[dict[Phase, str]] = {"native": "", "arterial": "IOHEXOL", "portal": "IOHEXOL", "delayed": "IOHEXOL"}


@dataclass(frozen=True, slots=True)
class SeriesIdentity:
    """Everything in the headers that is not geometry or acquisition.

    Attributes:
        patient_name, patient_id, accession_number: None makes them from the patient's seed.
        study_date, study_time: DA and TM values.
        study_instance_uid: None makes it from patient, scanner and ``salt``.
        salt: changes every UID made here, for several studies of one scan.
        series_number: distinguishes series of one study (part of the series' UID).
        series_description: None describes kernel and phase.
        contrast_agent: whether ContrastBolusAgent is filled for an enhanced phase (real series often leave it empty).
    """

    patient_name: str | None = None
    patient_id: str | None = None
    accession_number: str | None = None
    study_date: str = "20260105"
    study_time: str = "101500"
    study_instance_uid: str | None = None
    salt: str = ""
    series_number: int = 2
    series_description: str | None = None
    contrast_agent: bool = True


def phantom_uid(*parts: object) -> UID:
    """A UID of the form 2.25 (PS3.5 B.2) that depends on nothing but ``parts``."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, chr(31).join(str(part) for part in parts)).int}")


def write_series(study: PhantomStudy, folder: Path, identity: SeriesIdentity | None = None) -> list[Path]:
    """Write a scan as CT Image Storage, Explicit VR Little Endian, one file a slice.

    Args:
        study: voxels along the patient axes, D cranially.
        folder: made when missing; files are named ``IM0001.dcm`` on, from the head down.
        identity: names and dates; None takes the defaults.

    Returns:
        The files, in InstanceNumber order. The same study and identity give the same bytes.
    """
    who = identity if identity is not None else SeriesIdentity()
    folder.mkdir(parents=True, exist_ok=True)
    base = _series_header(study, who)
    count = len(study.voxels)
    paths = []
    for number in range(1, count + 1):
        index = count - number
        path = folder / f"IM{number:04d}.dcm"
        _slice(study, base, index, number).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _decimal(value: float) -> str:
    """A DS value: at most 16 characters."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text[:16]


def _series_header(study: PhantomStudy, who: SeriesIdentity) -> Dataset:
    patient, scanner = study.patient, study.scanner
    key = (patient, scanner, who.salt, who.study_date, who.study_time)
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = who.study_date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = who.study_time
    ds.AccessionNumber = who.accession_number if who.accession_number is not None else f"PH{patient.seed % 10**8:08d}"
    ds.Modality = "CT"
    ds.Manufacturer = "osteo_daemon phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "CT abdomen (virtual patient)"
    ds.SeriesDescription = who.series_description or f"{scanner.shape.name} {scanner.phase}"
    ds.ManufacturerModelName = scanner.manufacturer_like
    ds.PatientName = who.patient_name or f"Phantom^{'Female' if patient.sex == 'F' else 'Male'}{patient.seed}"
    ds.PatientID = who.patient_id or f"PHANTOM-{patient.seed}"
    year = int(who.study_date[:4]) - patient.age_years
    ds.PatientBirthDate = f"{year:04d}0101"
    ds.PatientSex = patient.sex
    ds.PatientAge = f"{patient.age_years:03d}Y"
    ds.BodyPartExamined = "ABDOMEN"
    if scanner.phase != "native":
        ds.ContrastBolusAgent = _AGENT[scanner.phase] if who.contrast_agent else ""
    ds.ScanOptions = "HELICAL MODE"
    ds.SliceThickness = _decimal(scanner.slice_thickness_mm)
    ds.KVP = _decimal(scanner.kvp)
    ds.DataCollectionDiameter = _decimal(scanner.matrix * scanner.pixel_spacing_mm)
    ds.ReconstructionDiameter = _decimal(scanner.matrix * scanner.pixel_spacing_mm)
    ds.SoftwareVersions = "1"
    ds.GantryDetectorTilt = "0"
    ds.RotationDirection = "CW"
    ds.ExposureTime = "600"
    ds.XRayTubeCurrent = "200"
    ds.ConvolutionKernel = scanner.shape.name
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = who.study_instance_uid or phantom_uid("study", *key)
    ds.SeriesInstanceUID = phantom_uid("series", *key, who.series_number, ds.StudyInstanceUID, study.affine.tolist())
    ds.StudyID = "1"
    ds.SeriesNumber = str(who.series_number)
    ds.AcquisitionNumber = "1"
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.FrameOfReferenceUID = phantom_uid("frame", *key)
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = study.voxels.shape[1:]
    ds.PixelSpacing = [_decimal(scanner.pixel_spacing_mm)] * 2
    ds.BitsAllocated = 16
    ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 1
    if scanner.padding_hu is not None and scanner.padding_hu < _INTERCEPT:
        ds.add_new("PixelPaddingValue", "SS", int(scanner.padding_hu) - _INTERCEPT)
    ds.WindowCenter, ds.WindowWidth = "40", "400"
    ds.RescaleIntercept = str(_INTERCEPT)
    ds.RescaleSlope = "1"
    ds.RescaleType = "HU"
    return ds


def _slice(study: PhantomStudy, base: Dataset, index: int, number: int) -> FileDataset:
    uid = phantom_uid("image", base.SeriesInstanceUID, number)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = phantom_uid("implementation")
    meta.ImplementationVersionName = "OSTEO_PHANTOM"
    ds: Any = FileDataset(f"IM{number:04d}.dcm", Dataset(base), file_meta=meta, preamble=b"\0" * 128)
    ds.SOPInstanceUID = uid
    ds.InstanceNumber = str(number)
    origin = study.affine @ np.array([index, 0.0, 0.0, 1.0])
    ds.ImagePositionPatient = [_decimal(float(v)) for v in origin[:3]]
    ds.SliceLocation = _decimal(float(origin[2]))
    stored = study.voxels[index].astype(np.int32) - _INTERCEPT
    ds.PixelData = stored.astype("<i2").tobytes()
    return ds  # type: ignore[no-any-return]
