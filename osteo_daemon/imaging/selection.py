"""Which series of a study is screened: judged by content and geometry, never by BodyPartExamined.

The attribute is wrong too often to be asked: it names the breast on abdominal PET/CT.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.enhanced import MULTI_FRAME_CT
from osteo_daemon.imaging.image_kind import named_enhanced, quoted, texts, why_derived
from osteo_daemon.imaging.kernel import KernelClass, classify_kernel
from osteo_daemon.imaging.series import MINIMUM_RUN, split_stacks
from osteo_daemon.imaging.slices import Slice, Stack

MINIMUM_COVERAGE_MM = 80.0
"""Two lumbar vertebrae with their discs are about 75 mm tall; a shorter stack can't hold two whole ones."""

MAXIMUM_THICKNESS_MM = 6.0
"""Slices up to 5 mm are the published practice for trabecular attenuation; above, endplates enter every slice."""

MAXIMUM_OBLIQUITY_DEGREES = 35.0
"""Gantry tilt stays below 30 degrees; a stack further off the patient's axis is a reformation."""

MAXIMUM_FIELD_MM = 1000.0
"""No scanner's bore is wider: a larger field of view comes from a wrong pixel spacing."""

MAXIMUM_COVERAGE_MM = 2500.0
"""No patient is longer."""

MINIMUM_EVEN_SHARE = 0.75
"""Below this share of a series on one even grid, with other spacings beside it, the geometry is not trusted."""

LUMBAR_COVERAGE_MM = 200.0
"""Sacrum to twelfth thoracic vertebra: five lumbar vertebrae with their discs of about 35 mm and the edges of both
neighbours. Longer series come before thinner ones that are shorter than this."""


class NotChosen(StrEnum):
    """Why a series that could be screened was not: no reason to exclude a study."""

    NOT_PREFERRED = "not_preferred"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A series that isn't screened, and why."""

    series_instance_uid: str
    code: ExclusionCode | NotChosen
    reason: str

    def to_json(self) -> dict[str, str]:
        """As the manifest keeps it."""
        return {"series_instance_uid": self.series_instance_uid, "code": self.code.value, "reason": self.reason}


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A stack that may be screened, with what its acquisition says against it."""

    stack: Stack
    quality_flags: tuple[QualityFlag, ...]


_COSINE_TOLERANCE = 0.01

# How far a rejected series came: the study's exclusion is that of the series that came furthest.
_PROGRESS = (
    ExclusionCode.NO_CT_SERIES,
    ExclusionCode.DERIVED_SERIES,
    ExclusionCode.INSUFFICIENT_COVERAGE,
    ExclusionCode.UNEVEN_GEOMETRY,
    ExclusionCode.SLICES_TOO_THICK,
    ExclusionCode.UNSUITABLE_KERNEL,
    ExclusionCode.CALIBRATION_OUT_OF_RANGE,
)


def select_series(series: dict[str, list[Slice]]) -> tuple[list[Candidate], list[Rejection]]:
    """Candidates, the best first, and every rejected series with its reason.

    A series is refused for derived images, an oblique or uneven stack, short coverage, thick slices, a sharp kernel or
    images without a HU scale. Order of the others: known soft kernel, no contrast agent named, covers the lumbar spine,
    thinner slices, longer coverage.

    Args:
        series: CT slices by SeriesInstanceUID.

    Returns:
        No candidate when nothing can be screened; `refusal` then says why.
    """
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    for uid, slices in series.items():
        outcome = _judge(uid, slices)
        if isinstance(outcome, Rejection):
            rejections.append(outcome)
        else:
            candidates.append(outcome)
    return sorted(candidates, key=_preference), rejections


def refusal(rejections: Sequence[Rejection]) -> NotEligible:
    """Why no series was screened: code and reason of the series that came furthest."""
    if not rejections:
        return NotEligible(ExclusionCode.NO_CT_SERIES, "the study holds no CT image with a position in the patient")
    furthest = max(rejections, key=lambda rejection: _PROGRESS.index(ExclusionCode(rejection.code)))
    return NotEligible(furthest.code, furthest.reason)


def other_series(headers: Sequence[tuple[Path, Dataset]], ct_series: Collection[str]) -> list[Rejection]:
    """Series that hold no CT image with a position: dose reports, secondary captures, PET.

    Args:
        headers: every object of the study.
        ct_series: UIDs of the series that hold usable CT images.
    """
    others: dict[str, UID] = {}
    for _, header in headers:
        others.setdefault(str(header.get("SeriesInstanceUID") or ""), UID(str(header.SOPClassUID)))
    return [
        Rejection(uid, ExclusionCode.NO_CT_SERIES, _why_not_ct(sop_class))
        for uid, sop_class in others.items()
        if uid not in ct_series
    ]


def _why_not_ct(sop_class: UID) -> str:
    if sop_class == CTImageStorage:
        return "CT images without a position in the patient"
    if sop_class in MULTI_FRAME_CT:
        return "multi-frame CT without a position in the patient for each frame"
    return f"no CT images ({sop_class.name})"


def not_preferred(candidate: Candidate, chosen: Candidate, why: str = "") -> Rejection:
    """A series that could be screened, and what another one has that it lacks.

    Args:
        candidate: the series that was not taken.
        chosen: the one that was.
        why: what was found out about ``candidate`` after the headers.
    """
    names = (
        "its kernel is not known to be soft",
        "its headers name contrast agent",
        "it is short",
        "its slices are thicker",
        "it covers less",
    )
    pairs = zip(names, _preference(candidate), _preference(chosen), strict=True)
    reason = why or next((name for name, own, other in pairs if own > other), "another series is as good")
    uid = candidate.stack.series_instance_uid
    return Rejection(uid, NotChosen.NOT_PREFERRED, f"{reason}; {chosen.stack.series_instance_uid} was screened")


def _preference(candidate: Candidate) -> tuple[bool, bool, bool, float, float]:
    header, coverage_mm = candidate.stack.header, candidate.stack.coverage_mm
    kernel = classify_kernel(texts(header, "ConvolutionKernel"))
    return (
        kernel is not KernelClass.SOFT,
        named_enhanced(header),
        coverage_mm < LUMBAR_COVERAGE_MM,
        _thickness_mm(candidate.stack),
        -coverage_mm,
    )


def _judge(uid: str, slices: Sequence[Slice]) -> Candidate | Rejection:
    reasons = [why_derived(item.header) for item in slices]
    original = [item for item, reason in zip(slices, reasons, strict=True) if reason is None]
    if not original:
        return Rejection(uid, ExclusionCode.DERIVED_SERIES, next(reason for reason in reasons if reason))
    slices = original  # a localizer among them is left out
    stacks = split_stacks(slices)
    if len(slices) < MINIMUM_RUN:
        return Rejection(uid, ExclusionCode.INSUFFICIENT_COVERAGE, f"{len(slices)} images; a volume needs more")
    if not stacks:
        return Rejection(uid, ExclusionCode.UNEVEN_GEOMETRY, f"{len(slices)} slices without an even spacing")
    stack = stacks[0]
    spacings = {round(other.spacing_mm, 1) for other in stacks}
    if len(spacings) > 1 and len(stack.slices) < MINIMUM_EVEN_SHARE * len(slices):
        shown = ", ".join(f"{spacing:.1f}" for spacing in sorted(spacings))
        return Rejection(uid, ExclusionCode.UNEVEN_GEOMETRY, f"slice spacing changes within the series ({shown} mm)")
    if implausible := _why_implausible(stack):
        return Rejection(uid, ExclusionCode.UNEVEN_GEOMETRY, implausible)
    obliquity = math.degrees(math.acos(min(1.0, abs(stack.affine[2, 0]) / stack.spacing_mm)))
    if obliquity > MAXIMUM_OBLIQUITY_DEGREES:
        return Rejection(
            uid, ExclusionCode.DERIVED_SERIES, f"not axial ({obliquity:.0f} degrees off the patient's axis)"
        )
    if stack.coverage_mm < MINIMUM_COVERAGE_MM:
        reason = f"covers {stack.coverage_mm:.0f} mm along the body, {MINIMUM_COVERAGE_MM:.0f} mm are needed"
        return Rejection(uid, ExclusionCode.INSUFFICIENT_COVERAGE, reason)
    thickness = _thickness_mm(stack)
    if thickness > MAXIMUM_THICKNESS_MM:
        reason = f"slices of {thickness:.1f} mm, at most {MAXIMUM_THICKNESS_MM:.0f} mm are measured"
        return Rejection(uid, ExclusionCode.SLICES_TOO_THICK, reason)
    kernel_names = texts(stack.header, "ConvolutionKernel")
    kernel = classify_kernel(kernel_names)
    if kernel is KernelClass.SHARP:
        reason = (
            f"edge-enhancing reconstruction kernel {quoted(' '.join(kernel_names))}; a soft-tissue kernel is needed"
        )
        return Rejection(uid, ExclusionCode.UNSUITABLE_KERNEL, reason)
    if not all(_has_scale(item.header) for item in stack.slices):
        reason = "no Rescale Slope and Intercept: the values have no HU scale"
        return Rejection(uid, ExclusionCode.CALIBRATION_OUT_OF_RANGE, reason)
    flags = []
    if kernel is KernelClass.UNKNOWN:
        flags.append(QualityFlag("kernel_unknown", Severity.CAUTION))
    if stack.cut_slices:
        flags.append(QualityFlag("slice_gap", Severity.CAUTION))
    return Candidate(stack, tuple(flags))


def _why_implausible(stack: Stack) -> str | None:
    """What is wrong with a grid that no scan of a patient has; None when nothing is."""
    cosines = np.asarray(stack.header.ImageOrientationPatient, dtype=np.float64)
    row, column = cosines[:3], cosines[3:]
    if abs(row @ row - 1) > _COSINE_TOLERANCE or abs(column @ column - 1) > _COSINE_TOLERANCE:
        return "the image orientation holds no unit vectors"
    if abs(row @ column) > _COSINE_TOLERANCE:
        return "rows and columns are not at right angles"
    header = stack.header
    field_mm = max(
        int(header.Rows) * float(header.PixelSpacing[0]), int(header.Columns) * float(header.PixelSpacing[1])
    )
    if field_mm > MAXIMUM_FIELD_MM:
        return f"a field of view of {field_mm:.0f} mm: the pixel spacing cannot be right"
    if stack.coverage_mm > MAXIMUM_COVERAGE_MM:
        return f"{stack.coverage_mm:.0f} mm along the body: the slice positions cannot be right"
    return None


def _thickness_mm(stack: Stack) -> float:
    try:
        thickness = float(stack.header.get("SliceThickness") or 0.0)
    except (TypeError, ValueError):
        thickness = 0.0
    return max(thickness, stack.spacing_mm)


def _has_scale(header: Dataset) -> bool:
    try:
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    except (AttributeError, TypeError, ValueError):
        return False
    return math.isfinite(slope) and math.isfinite(intercept) and slope > 0
