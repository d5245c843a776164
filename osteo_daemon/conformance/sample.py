"""The smallest study that gives every object: a block of numbers with two bodies in it, made up, of nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from types import MappingProxyType

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from osteo_daemon.dicom.report_forms import SENDING_ORDER
from osteo_daemon.dicom.report_objects import ReportRequest, build_report_objects
from osteo_daemon.dicom.report_source import ReportSource
from osteo_daemon.dicom.uids import derived_uid
from osteo_daemon.domain.findings import (
    Attenuation,
    Category,
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    ScreeningResult,
    VertebraFinding,
)
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.settings import SiteSettings

_SLICES, _SIZE, _STEP_MM, _PIXEL_MM = 24, 48, 5.0, 2.0
_CENTRES: Mapping[Level, int] = MappingProxyType({Level.L1: 16, Level.L2: 8})
SOURCE_ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        "SpecificCharacterSet": "ISO_IR 192",
        "StudyDate": "20260105",
        "StudyTime": "101500",
        "SeriesDate": "20260105",
        "SeriesTime": "101600",
        "StudyID": "17",
        "StudyDescription": "ABDOMEN",
        "AccessionNumber": "ACC17",
        "ReferringPhysicianName": "Example^Referrer",
        "Manufacturer": "Maker",
        "ManufacturerModelName": "Scanner",
        "PatientName": "Example^Patient",
        "PatientID": "EXAMPLE",
        "PatientBirthDate": "19560101",
        "PatientSex": "F",
        "PatientAge": "070Y",
        "Modality": "CT",
    }
)
"""What the made-up source says; a value of it in a result was copied from there."""

SOURCE_UIDS: Mapping[str, str] = MappingProxyType(
    {
        "StudyInstanceUID": derived_uid("sample", "study"),
        "SeriesInstanceUID": derived_uid("sample", "series"),
        "FrameOfReferenceUID": derived_uid("sample", "frame"),
    }
)
"""Its UIDs."""


@dataclass(frozen=True, slots=True)
class _Regions:
    body: Region
    trabecular: Region | None


def sample_objects() -> Mapping[str, Dataset]:
    """One finished object of each kind, as it would be sent."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[:3, :3] = np.array([[0.0, 0.0, _PIXEL_MM], [0.0, _PIXEL_MM, 0.0], [_STEP_MM, 0.0, 0.0]])
    volume = CtVolume(np.full((_SLICES, _SIZE, _SIZE), 40.0, dtype=np.float32), affine)
    regions = {
        level: _Regions(_block(volume, centre, 3, 8), _block(volume, centre, 2, 5))
        for level, centre in _CENTRES.items()
    }
    models = (ModelReference("spine-localizer", "0", "0" * 64), ModelReference("osteo-moe", "0", "0" * 64))
    result = ScreeningResult(
        study_instance_uid=SOURCE_UIDS["StudyInstanceUID"],
        series_instance_uid=SOURCE_UIDS["SeriesInstanceUID"],
        outcome=Outcome.REPORTED,
        exclusion=None,
        category=Category.REDUCED,
        vertebrae=tuple(_finding(level, volume, centre) for level, centre in _CENTRES.items()),
        models=models,
    )
    request = ReportRequest(
        result=result,
        source=ReportSource(tuple(_header(number, volume) for number in range(_SLICES))),
        volume=volume,
        regions=regions,
        site=SiteSettings(institution="Example Hospital"),
        software_version="0",
        created=datetime(2026, 1, 6, 12, tzinfo=UTC),
        network_bundle="osteo-moe",
    )
    built = build_report_objects(request, ("comprehensive-3d+seg",), frozenset(SENDING_ORDER))
    return {entry.kind: pydicom.dcmread(BytesIO(entry.data)) for entry in built.objects}


def _block(volume: CtVolume, centre: int, slices: int, pixels: int) -> Region:
    mask = np.ones((2 * slices + 1, 2 * pixels, 2 * pixels), dtype=bool)
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps([centre - slices, _SIZE // 2 - pixels, _SIZE // 2 - pixels])
    return Region(mask, affine)


def _finding(level: Level, volume: CtVolume, centre: int) -> VertebraFinding:
    x, y, z = (float(value) for value in volume.to_lps([centre, _SIZE / 2, _SIZE / 2]))
    return VertebraFinding(
        level=level,
        centre_lps_mm=(x, y, z),
        confidence=0.9,
        attenuation_hu=Attenuation(120.0, 119.0, 20.0, 4000.0, voxel_count=200, standard_error=1.5),
        attenuation_hu_corrected=None,
        network=NetworkFinding(
            status="investigational",
            bmd_g_cm2=0.9,
            t_score=-1.2,
            class_probabilities={"normal": 0.25, "osteopenia": 0.5, "osteoporosis": 0.25},
            level_probabilities={"L1": 0.9, "L2": 0.1},
            expert_weights=(0.5, 0.5),
        ),
        heights_mm=(26.0, 25.5, 27.0),
        compression_grade=0,
    )


def _header(number: int, volume: CtVolume) -> Dataset:
    header = Dataset()
    for keyword, value in (*SOURCE_ATTRIBUTES.items(), *SOURCE_UIDS.items()):
        setattr(header, keyword, value)
    header.SOPClassUID = CTImageStorage
    header.SOPInstanceUID = derived_uid("sample", "slice", str(number))
    header.SeriesNumber, header.InstanceNumber = 3, number + 1
    header.PixelSpacing = [_PIXEL_MM, _PIXEL_MM]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [float(value) for value in volume.to_lps([number, 0, 0])]
    header.SliceThickness = _STEP_MM
    header.Rows = header.Columns = _SIZE
    return header
