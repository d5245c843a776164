"""Which series of a study is screened: judged by content and geometry, never by BodyPartExamined.

The attribute is wrong too often to be asked: it names the breast on abdominal PET/CT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.kernel import KernelClass, classify_kernel
from osteo_daemon.imaging.series import MINIMUM_RUN, Slice, Stack, split_stacks

MINIMUM_COVERAGE_MM = 80.0
"""Two lumbar vertebrae with their discs are about 75 mm tall; a shorter stack can't hold two whole ones."""

MAXIMUM_THICKNESS_MM = 6.0
"""Slices up to 5 mm are the published practice for trabecular attenuation; above, endplates enter every slice."""

MAXIMUM_OBLIQUITY_DEGREES = 35.0
"""Gantry tilt stays below 30 degrees; a stack further off the patient's axis is a reformation."""

MINIMUM_EVEN_SHARE = 0.75
"""Below this share of a series on one even grid, with other spacings beside it, the geometry is not trusted."""

_DERIVED_WORDS = frozenset(
    {
        "LOCALIZER",
        "MPR",
        "MIP",
        "MINIP",
        "REFORMATTED",
        "VRT",
        "3D",
        "VNC",
        "VNCA",
        "MONO",
        "MONOENERGETIC",
        "VMI",
        "IODINE",
    }
)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A series that isn't screened, and why."""

    series_instance_uid: str
    code: ExclusionCode
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A stack that may be screened, with what its acquisition says against it."""

    stack: Stack
    quality_flags: tuple[QualityFlag, ...]


# How far a rejected series came: the study's exclusion is that of the series that came furthest.
_PROGRESS = (
    ExclusionCode.NO_CT_SERIES,
    ExclusionCode.DERIVED_SERIES,
    ExclusionCode.INSUFFICIENT_COVERAGE,
    ExclusionCode.UNEVEN_GEOMETRY,
    ExclusionCode.SLICES_TOO_THICK,
    ExclusionCode.UNSUITABLE_KERNEL,
)


def select_series(series: dict[str, list[Slice]]) -> tuple[list[Candidate], list[Rejection]]:
    """Candidates, the best first, and every rejected series with its reason.

    A series is refused for a derived image type, an oblique or uneven stack, short coverage, thick slices or a sharp
    kernel. Order of the others: known soft kernel, no contrast agent named, thinner slices, longer coverage.

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
    furthest = max(rejections, key=lambda rejection: _PROGRESS.index(rejection.code))
    return NotEligible(furthest.code, furthest.reason)


def _preference(candidate: Candidate) -> tuple[bool, bool, float, float]:
    header = candidate.stack.header
    kernel = classify_kernel(texts(header, "ConvolutionKernel"))
    enhanced = bool(str(header.get("ContrastBolusAgent") or "").strip())
    return (kernel is not KernelClass.SOFT, enhanced, _thickness_mm(candidate.stack), -candidate.stack.coverage_mm)


def _judge(uid: str, slices: Sequence[Slice]) -> Candidate | Rejection:
    image_type = [value.upper() for value in texts(slices[0].header, "ImageType")]
    words = {word for value in image_type for word in value.replace("_", " ").split()}
    if image_type[:1] == ["DERIVED"] or words & _DERIVED_WORDS:
        named = "\\".join(image_type) or "none"
        return Rejection(uid, ExclusionCode.DERIVED_SERIES, f"only derived or localizer images (image type {named})")
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
        reason = f"edge-enhancing reconstruction kernel {' '.join(kernel_names)}; a soft-tissue kernel is needed"
        return Rejection(uid, ExclusionCode.UNSUITABLE_KERNEL, reason)
    flags = []
    if kernel is KernelClass.UNKNOWN:
        flags.append(QualityFlag("kernel_unknown", Severity.CAUTION))
    if stack.cut_slices:
        flags.append(QualityFlag("slice_gap", Severity.CAUTION))
    return Candidate(stack, tuple(flags))


def _thickness_mm(stack: Stack) -> float:
    try:
        thickness = float(stack.header.get("SliceThickness") or 0.0)
    except (TypeError, ValueError):
        thickness = 0.0
    return max(thickness, stack.spacing_mm)


def texts(header: Dataset, keyword: str) -> list[str]:
    """The values of a text attribute, none when it is absent or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]
