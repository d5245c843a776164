"""From a screening to what is archived of it: voxels, numbers and acquisition; the identity apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from osteo_daemon.archive.key import Identity
from osteo_daemon.archive.record import MARGIN_VOXELS, Acquisition, StudyVois, VertebraRecord, to_int16
from osteo_daemon.domain.findings import SEGMENTATION_SOURCE, VertebraFinding
from osteo_daemon.imaging.acquisition import scanner_of
from osteo_daemon.imaging.image_kind import texts
from osteo_daemon.imaging.preprocess import VoiSpec, extract_voi
from osteo_daemon.imaging.slices import PARSE_ERRORS
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.patient import Patient
from osteo_daemon.inference.quality import tube_voltage
from osteo_daemon.inference.screening import Screening
from osteo_daemon.inference.vertebra import Vertebra

OLDEST_YEARS = 90
"""Older patients are archived as of this age: there are so few of them that an age tells who they are (45 CFR
164.514(b)(2)(i)(C))."""

_KERNEL_LENGTH = 16  # VR SH, PS3.5 6.2


def capture(screening: Screening) -> tuple[StudyVois, Identity] | None:
    """What is archived of a screening; None when no vertebra was measured.

    Raises:
        ValueError: a vertebra's VOI lies outside the scan.
    """
    volume = screening.volume
    if volume is None or not screening.vertebrae:
        return None
    spec = screening.voi or VoiSpec()
    findings = {str(finding.level): finding for finding in screening.result.vertebrae}
    chosen = [vertebra for vertebra in screening.vertebrae if str(vertebra.level) in findings]
    vois, records = [], []
    for vertebra in chosen:
        hu, record = _vertebra(volume, vertebra, findings[str(vertebra.level)], spec)
        vois.append(hu)
        records.append(record)
    header = screening.headers[0]
    study = StudyVois(
        hu=np.stack(vois),
        spacing_mm=spec.spacing_mm,
        order=spec.interpolation_order,
        acquisition=_acquisition(screening, header, volume),
        vertebrae=tuple(records),
        flags=tuple(sorted({flag.code for flag in screening.result.quality_flags})),
    )
    return study, identity_of(header)


def identity_of(header: Dataset) -> Identity:
    """Whose study it is."""
    keywords = (
        "PatientID",
        "IssuerOfPatientID",
        "PatientBirthDate",
        "StudyInstanceUID",
        "AccessionNumber",
        "StudyDate",
    )
    return Identity(*(str(header.get(keyword) or "").strip() for keyword in keywords))


def _vertebra(
    volume: CtVolume, vertebra: Vertebra, finding: VertebraFinding, spec: VoiSpec
) -> tuple[Any, VertebraRecord]:
    first, second, third = (n + 2 * MARGIN_VOXELS for n in spec.shape)
    wider = replace(spec, shape=(first, second, third))
    hu = to_int16(extract_voi(volume, vertebra.centre_lps_mm, vertebra.axes_lps, wider).hu)
    coverage = extract_voi(volume, vertebra.centre_lps_mm, vertebra.axes_lps, spec).coverage
    features: dict[str, float] = {}
    if finding.attenuation_hu is not None:
        measured = finding.attenuation_hu
        features |= {
            "mean_hu": measured.mean,
            "median_hu": measured.median,
            "sd_hu": measured.sd,
            "volume_mm3": measured.volume_mm3,
        }
        if measured.standard_error is not None:
            features["standard_error_hu"] = measured.standard_error
    if finding.attenuation_hu_corrected is not None:
        features["corrected_hu"] = finding.attenuation_hu_corrected.mean
    if finding.heights_mm is not None:
        features |= dict(
            zip(("height_anterior_mm", "height_middle_mm", "height_posterior_mm"), finding.heights_mm, strict=True)
        )
    if finding.compression_grade is not None:
        features["compression_grade"] = float(finding.compression_grade)
    return hu, VertebraRecord(
        level=str(vertebra.level),
        coverage=round(coverage, 4),
        confidence=finding.confidence,
        blocked=finding.blocked,
        flags=tuple(sorted({flag.code for flag in finding.quality_flags})),
        features={name: round(float(value), 4) for name, value in features.items()},
    )


def _acquisition(screening: Screening, header: Dataset, volume: CtVolume) -> Acquisition:
    scanner, patient = scanner_of(header), Patient.of(header)
    model = screening.result.models[0]
    first, second, third = volume.spacing_mm
    quality = screening.manifest.get("scan_quality", {})
    return Acquisition(
        manufacturer=scanner.manufacturer,
        model=scanner.model,
        kernel=_kernel(header),
        kernel_class=scanner.kernel,
        kvp=tube_voltage(header),
        thickness_mm=_number(header.get("SliceThickness")),
        spacing_mm=(round(first, 4), round(second, 4), round(third, 4)),
        phase=str(quality.get("contrast_phase") or ""),
        age_years=None if patient.age_years is None else min(patient.age_years, OLDEST_YEARS),
        sex=patient.sex,
        # of a segmentation the version is a UID
        source=model.bundle if model.bundle == SEGMENTATION_SOURCE else f"{model.bundle} {model.version}",
    )


def _kernel(header: Dataset) -> str:
    try:
        values = texts(header, "ConvolutionKernel")
    except PARSE_ERRORS:
        return ""
    return "" if not values else str(values[0]).strip()[:_KERNEL_LENGTH]


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
