"""Screened studies to make reports from: a synthetic spine of known geometry, and variations of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from osteo_daemon.dicom.report_objects import ReportRequest
from osteo_daemon.dicom.report_source import ReportSource
from osteo_daemon.domain.findings import (
    Attenuation,
    Category,
    CorrectedAttenuation,
    Exclusion,
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    QualityFlag,
    ScreeningResult,
    Severity,
    VertebraFinding,
)
from osteo_daemon.imaging.enhanced import frame_headers
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.settings import SiteSettings
from tests.enhanced_ct import enhanced_dataset

STUDY_UID = "1.2.826.0.1.3680043.9.7433.77.1"
SERIES_UID = f"{STUDY_UID}.2"
CREATED = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
MODELS = (
    ModelReference("spine-localizer", "0.1.0", "a" * 64),
    ModelReference("osteo-moe", "0.2.0", "b" * 64),
)
LEVELS = (Level.T12, Level.L1, Level.L2, Level.L3, Level.L4, Level.L5)
ACRIN_CENTRES = {
    # slice index from caudal, row, column: ../shared/data/README.md
    Level.T12: (75, 316, 241),
    Level.L1: (67, 313, 241),
    Level.L2: (59, 309, 241),
    Level.L3: (51, 307, 241),
    Level.L4: (42, 306, 241),
    Level.L5: (34, 310, 241),
}
BODY_RADII_MM = (13.0, 15.0, 21.0)
TRABECULAR_RADII_MM = (8.0, 9.0, 13.0)


@dataclass(frozen=True)
class Regions:
    """Regions of one vertebra."""

    body: Region
    trabecular: Region | None


def ellipsoid(volume: CtVolume, centre: Sequence[float], radii_mm: Sequence[float]) -> Region:
    """An ellipsoid along the axes of the volume, as a region on a sub-grid of it."""
    spacing, middle = np.array(volume.spacing_mm), np.array(centre, dtype=float)
    reach = np.ceil(np.array(radii_mm) / spacing).astype(int) + 1
    low = np.maximum(np.floor(middle).astype(int) - reach, 0)
    high = np.minimum(np.floor(middle).astype(int) + reach + 2, volume.voxels.shape)
    axes = [np.arange(start, stop) for start, stop in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    mask = (((grid - middle) * spacing / np.array(radii_mm)) ** 2).sum(axis=-1) <= 1
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps(low)
    return Region(mask, affine)


def measured(volume: CtVolume, region: Region) -> Attenuation:
    """Attenuation of a region on a sub-grid of the volume."""
    d, h, w = np.rint(volume.to_index(region.affine[:3, 3])).astype(int)
    size = region.mask.shape
    values = volume.voxels[d : d + size[0], h : h + size[1], w : w + size[2]][region.mask]
    return Attenuation(
        float(values.mean()),
        float(np.median(values)),
        float(values.std()),
        region.volume_mm3,
        voxel_count=values.size,
        standard_error=1.234,
    )


def slice_header(d: int, affine: npt.NDArray[np.float64], shape: Sequence[int], **attributes: Any) -> Dataset:
    """The header of native slice ``d`` of a volume with this affine."""
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    header.SOPInstanceUID = f"{SERIES_UID}.{d + 1}"
    header.StudyInstanceUID, header.SeriesInstanceUID = STUDY_UID, SERIES_UID
    header.FrameOfReferenceUID = f"{STUDY_UID}.9"
    header.Modality, header.Manufacturer, header.ManufacturerModelName = "CT", "Maker", "Scanner"
    header.StudyDate, header.StudyTime, header.StudyID = "20260105", "101500", "17"
    header.SeriesDate, header.SeriesTime = "20260105", "101600"
    header.AccessionNumber, header.ReferringPhysicianName = "ACC17", "House^Gregory"
    header.PatientName, header.PatientID = "Doe^Jane", "P-17"
    header.PatientBirthDate, header.PatientSex, header.PatientAge = "19560101", "F", "070Y"
    header.SeriesNumber, header.InstanceNumber = 3, d + 1
    row_step, column_step = affine[:3, 1], affine[:3, 2]
    spacing = [float(np.linalg.norm(row_step)), float(np.linalg.norm(column_step))]
    header.PixelSpacing = [round(value, 6) for value in spacing]
    orientation = [*(column_step / spacing[1]), *(row_step / spacing[0])]
    header.ImageOrientationPatient = [round(float(value), 6) for value in orientation]
    header.ImagePositionPatient = [round(float(value), 4) for value in affine[:3, 3] + d * affine[:3, 0]]
    header.SliceThickness = round(float(np.linalg.norm(affine[:3, 0])), 4)
    header.Rows, header.Columns = shape[1], shape[2]
    for keyword, value in attributes.items():
        if value is None:
            del header[keyword]
        else:
            setattr(header, keyword, value)
    return header


def _finding(level: Level, number: int, volume: CtVolume, centre: Sequence[float], regions: Regions) -> VertebraFinding:
    assert regions.trabecular is not None
    attenuation = measured(volume, regions.trabecular)
    x, y, z = (float(value) for value in volume.to_lps(centre))
    return VertebraFinding(
        level=level,
        centre_lps_mm=(x, y, z),
        confidence=0.97 - 0.011 * number,
        attenuation_hu=attenuation,
        attenuation_hu_corrected=CorrectedAttenuation(attenuation.mean * 1.073, {"tube_voltage_to_120": 1.073}),
        network=NetworkFinding(
            status="investigational",
            bmd_g_cm2=0.91234 + 0.01 * number,
            t_score=-1.26,
            class_probabilities={"normal": 0.2512, "osteopenia": 0.5, "osteoporosis": 0.2488},
            level_probabilities={"L1": 0.9, "L2": 0.1},
            expert_weights=(0.25, 0.3333, 0.4167),
            bmd_interval_90_g_cm2=(0.7512, 1.0734),
            t_score_reference="NHANES 2005-14, women 21-30 y, sBMD",
            quality_flags=(QualityFlag("network_out_of_distribution", Severity.CAUTION),) if number == 3 else (),
        ),
        quality_flags=(QualityFlag("level_disagreement", Severity.INFO),) if number == 2 else (),
        heights_mm=(26.04, 25.5, 27.0),
        compression_grade=number % 2,
    )


def synthetic_case(
    *, columns_left: bool = True, cranial_first: bool = False, tilt_degrees: float = 0.0, **attributes: Any
) -> ReportRequest:
    """A spine of six ellipsoid vertebrae of 150 HU in 40 HU, 46 slices of 96 x 96 at 5 x 2 x 2 mm."""
    shape = (46, 96, 96)
    tilt = np.deg2rad(tilt_degrees)
    affine = np.eye(4)
    affine[:3, 0] = [0.0, 0.0, -5.0 if cranial_first else 5.0]
    affine[:3, 1] = [0.0, 2.0 * np.cos(tilt), 2.0 * np.sin(tilt)]
    affine[:3, 2] = [2.0 if columns_left else -2.0, 0.0, 0.0]
    affine[:3, 3] = [-96.0 if columns_left else 96.0, -60.0, 400.0 if cranial_first else -100.0]
    random = np.random.default_rng(7)
    voxels = random.normal(40.0, 12.0, shape).astype(np.float32)
    volume = CtVolume(voxels, affine)
    regions: dict[Level, Regions] = {}
    findings = []
    for number, level in enumerate(LEVELS):
        d = 4.0 + 7.2 * number if cranial_first else 41.0 - 7.2 * number
        centre = (d, 45.0 + number, 47.5)
        body = ellipsoid(volume, centre, BODY_RADII_MM)
        low = np.rint(volume.to_index(body.affine[:3, 3])).astype(int)
        window = tuple(slice(start, start + size) for start, size in zip(low, body.mask.shape, strict=True))
        voxels[window][body.mask] += 110.0
        regions[level] = Regions(body, ellipsoid(volume, centre, TRABECULAR_RADII_MM))
        findings.append(_finding(level, number, volume, centre, regions[level]))
    headers = [slice_header(d, affine, shape, **attributes) for d in range(shape[0])]
    return _request(headers, volume, regions, findings)


def acrin_case(folder: Path) -> ReportRequest:
    """The real reference series with ellipsoids at its known centres."""
    slices = sorted(
        (pydicom.dcmread(path) for path in folder.rglob("*.dcm")), key=lambda item: float(item.ImagePositionPatient[2])
    )
    affine = np.eye(4)
    first, last = (np.array(item.ImagePositionPatient, dtype=float) for item in (slices[0], slices[-1]))
    affine[:3, 0] = (last - first) / (len(slices) - 1)
    affine[:3, 1] = [0.0, float(slices[0].PixelSpacing[0]), 0.0]
    affine[:3, 2] = [float(slices[0].PixelSpacing[1]), 0.0, 0.0]
    affine[:3, 3] = first
    voxels = np.stack([item.pixel_array * float(item.RescaleSlope) + float(item.RescaleIntercept) for item in slices])
    volume = CtVolume(voxels.astype(np.float32), affine)
    for item in slices:
        del item.PixelData
    regions, findings = {}, []
    for number, (level, centre) in enumerate(ACRIN_CENTRES.items()):
        regions[level] = Regions(
            ellipsoid(volume, centre, BODY_RADII_MM), ellipsoid(volume, centre, TRABECULAR_RADII_MM)
        )
        findings.append(_finding(level, number, volume, centre, regions[level]))
    request = _request(slices, volume, regions, findings)
    result = dataclasses.replace(
        request.result,
        study_instance_uid=str(slices[0].StudyInstanceUID),
        series_instance_uid=str(slices[0].SeriesInstanceUID),
    )
    return dataclasses.replace(request, result=result)


def with_result(request: ReportRequest, **changes: Any) -> ReportRequest:
    """The request with another result."""
    return dataclasses.replace(request, result=dataclasses.replace(request.result, **changes))


def short_case(**attributes: Any) -> ReportRequest:
    """One vertebra of the synthetic spine: less to validate where the header is what matters."""
    request = synthetic_case(**attributes)
    return with_result(request, vertebrae=request.result.vertebrae[2:3])


def indeterminate_case() -> ReportRequest:
    """A level without a region or a number, flags that block, nothing from the network."""
    request = synthetic_case()
    blocked = (QualityFlag("implant", Severity.BLOCKING), QualityFlag("region_too_small", Severity.BLOCKING))
    findings = [
        dataclasses.replace(finding, network=None, attenuation_hu_corrected=None)
        if finding.level is Level.L1
        else dataclasses.replace(
            finding, network=None, attenuation_hu_corrected=None, attenuation_hu=None, quality_flags=blocked
        )
        for finding in request.result.vertebrae[1:3]
    ]
    regions = {Level.L1: request.regions[Level.L1]}
    request = with_result(
        request,
        category=Category.INDETERMINATE,
        vertebrae=tuple(findings),
        quality_flags=(QualityFlag("calibration_unchecked", Severity.CAUTION),),
        models=MODELS[:1],
    )
    return dataclasses.replace(request, regions=regions)


def withheld_case() -> ReportRequest:
    """Age and sex are not known: T-score and classes are withheld."""
    request = short_case(PatientSex="", PatientAge=None, PatientBirthDate="")
    findings = tuple(
        dataclasses.replace(
            finding,
            network=dataclasses.replace(
                finding.network,
                t_score=None,
                class_probabilities=None,
                t_score_reference=None,
                withheld={"t_score": "age_missing", "class": "age_missing"},
            ),
        )
        for finding in request.result.vertebrae
        if finding.network is not None
    )
    flags = (QualityFlag("age_missing", Severity.CAUTION), QualityFlag("sex_missing", Severity.CAUTION))
    return with_result(request, vertebrae=findings, category=Category.REDUCED, quality_flags=flags)


def excluded_case() -> ReportRequest:
    """A study that was not screened."""
    request = synthetic_case()
    result = ScreeningResult(
        study_instance_uid=STUDY_UID,
        series_instance_uid=None,
        outcome=Outcome.EXCLUDED,
        exclusion=Exclusion("unsuitable_kernel", "the only series with enough coverage has a lung kernel"),
        category=None,
        models=MODELS[:1],
    )
    return dataclasses.replace(request, result=result, regions={}, volume=None)


def excluded_source_case(header: Dataset, code: str = "unsuitable_kernel") -> ReportRequest:
    """A study that was not screened, with any one object of it as its source."""
    result = ScreeningResult(
        study_instance_uid=str(header.StudyInstanceUID),
        series_instance_uid=None,
        outcome=Outcome.EXCLUDED,
        exclusion=Exclusion(code, "for a reason"),
        category=None,
        models=MODELS[:1],
    )
    return dataclasses.replace(excluded_case(), result=result, source=ReportSource([header]))


def enhanced_header() -> Dataset:
    """The header of an Enhanced CT image: many frames, geometry in functional groups alone (PS3.3 A.38.1)."""
    header = slice_header(0, np.diag([5.0, 2.0, 2.0, 1.0]), (46, 96, 96), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        del header[keyword]
    header.NumberOfFrames = 46
    return header


def enhanced_case() -> ReportRequest:
    """One vertebra in a stack that lies in two Enhanced CT objects, the frames against the order of the volume."""
    request = short_case(KVP="120", ConvolutionKernel="B30f", RescaleIntercept="-1024", RescaleSlope="1")
    headers = request.source.headers
    assert request.volume is not None
    # the second object begins in the middle of the vertebra
    cut = int(request.volume.to_index(request.result.vertebrae[0].centre_lps_mm)[0])
    objects = [enhanced_dataset(headers[first:last][::-1]) for first, last in ((0, cut), (cut, None))]
    frames = [frame for dataset in objects for frame in frame_headers(dataset)[::-1]]
    return dataclasses.replace(request, source=ReportSource(frames))


def encoded_name_case(character_set: str | list[str], name: str) -> ReportRequest:
    """The source carries a name in this character set, as a scanner would have written it."""
    request = short_case()
    return dataclasses.replace(
        request, source=ReportSource([_re_read(header, character_set, name) for header in request.source.headers])
    )


def _re_read(header: Dataset, character_set: str | list[str], name: str) -> Dataset:
    copy = Dataset()
    copy.update(header)
    copy.SpecificCharacterSet = character_set
    copy.PatientName = name
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, _with_meta(copy, ExplicitVRLittleEndian), enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def _with_meta(dataset: Dataset, transfer_syntax_uid: str) -> Dataset:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax_uid
    return dataset


def _request(
    headers: Iterable[Dataset], volume: CtVolume, regions: Mapping[Level, Regions], findings: Sequence[VertebraFinding]
) -> ReportRequest:
    result = ScreeningResult(
        study_instance_uid=STUDY_UID,
        series_instance_uid=SERIES_UID,
        outcome=Outcome.REPORTED,
        exclusion=None,
        category=Category.NOT_FLAGGED,
        vertebrae=tuple(findings),
        quality_flags=(QualityFlag("kvp_uncorrected", Severity.CAUTION),),
        models=MODELS,
        durations_s={"decode": 1.25},
    )
    return ReportRequest(
        result=result,
        source=ReportSource(headers),
        volume=volume,
        regions=regions,
        site=SiteSettings(institution="Test Hospital", timezone_offset="+0100"),
        software_version="0.1.0",
        created=CREATED,
        network_bundle="osteo-moe",
    )
