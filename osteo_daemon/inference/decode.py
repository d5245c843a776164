"""From the network's output to named vertebrae with their bodies and remarks (docs/localizer.md)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible
from osteo_daemon.inference.body import describe_body
from osteo_daemon.inference.canonical import CanonicalVolume
from osteo_daemon.inference.column import Column, count_column, find_s1
from osteo_daemon.inference.discs import disc_contrast
from osteo_daemon.inference.morphometry import compression_flags, compression_grades
from osteo_daemon.inference.naming import (
    LEVELS_FROM_SACRUM,
    N_MEASURED,
    NO_ANCHOR,
    RIB_ONLY,
    S1_AND_RIB,
    S1_ONLY,
    Naming,
    last_rib,
    name_column,
)
from osteo_daemon.inference.ribs import rib_evidence
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.inference.vertebra import Localization, Vertebra
from osteo_daemon.network.localizer import SpineClass

_NEARLY_WHOLE = 0.85  # height over that of the vertebra below: a body that only touches the edge of the scan
_VERTEBRA_MM3 = 8000.0  # one small vertebral body: less than this of body voxels is no spine
_FEWEST_ABOVE_S1 = 3
"""Fewer vertebrae than this between S1 and a pair of ribs don't exist: then it is no sacrum."""

_SHARE_OF_CONFIDENCE = {S1_AND_RIB: 1.0, S1_ONLY: 0.9, RIB_ONLY: 0.7, NO_ANCHOR: 0.6}
"""One anchor is wrong in about one person of ten, who has another number of vertebrae (Konin and Walz, AJNR Am J
Neuroradiol 2010;31:1778: 4-30 % have a transitional lumbosacral vertebra)."""
_UNCERTAIN_CONFIDENCE = 0.5
_SCOLIOSIS_DEGREES = 10.0  # Cobb angle that defines scoliosis


def decode(maps: SpineMaps, canonical: CanonicalVolume) -> Localization:
    """Count and name the vertebrae in the network's output.

    Raises:
        NotEligible: ``no_lumbar_vertebra`` without a column, ``insufficient_coverage`` with fewer than two lumbar
            vertebrae in view.
    """
    spacing = canonical.spacing_mm
    if np.count_nonzero(maps.probabilities[SpineClass.BODY] > 0.5) * spacing**3 < _VERTEBRA_MM3:
        raise NotEligible(ExclusionCode.NO_LUMBAR_VERTEBRA, "no vertebral bodies in view")
    s1 = find_s1(maps, spacing)
    column = count_column(maps, s1, spacing)
    evidence = rib_evidence(maps, canonical, column) if column is not None else ()
    if s1 is not None and (place := last_rib(evidence)) and place[1] is not None and place[1] < _FEWEST_ABOVE_S1:
        s1 = None
        column = count_column(maps, None, spacing)
        evidence = rib_evidence(maps, canonical, column) if column is not None else ()
    if column is None:
        raise NotEligible(ExclusionCode.INSUFFICIENT_COVERAGE, "no whole lumbar vertebra in view")
    contrast = disc_contrast(canonical, column)
    naming = name_column(column.gaps_mm, column.agreement, contrast, evidence, on_s1=s1 is not None)
    vertebrae = _vertebrae(maps, canonical, column, s1, naming)
    if sum(v.level.startswith("L") for v in vertebrae) < 2:
        raise NotEligible(ExclusionCode.INSUFFICIENT_COVERAGE, "fewer than two lumbar vertebrae in view")
    flags = list(naming.flags)
    if coronal_angle(vertebrae) > _SCOLIOSIS_DEGREES:
        flags.append(QualityFlag("scoliosis", Severity.CAUTION))
    return Localization(
        vertebrae=tuple(vertebrae[::-1]), flags=tuple(flags), anchor=naming.anchor, alternative=naming.alternative
    )


def _vertebrae(
    maps: SpineMaps, canonical: CanonicalVolume, column: Column, s1: npt.NDArray[np.bool_] | None, naming: Naming
) -> list[Vertebra]:
    """S1 and the named vertebrae above it, caudal to cranial; above T12 only those with a certain name."""
    spacing = canonical.spacing_mm
    vertebrae = []
    if s1 is not None:
        s1_centre = np.argwhere(s1).mean(axis=0) * spacing
        up = column.discs[0].normal
        sacral = describe_body("S1", maps, canonical, SpineClass.S1_BODY, s1_centre, up, None, 1.0)
        vertebrae = [] if sacral is None else [sacral]
    for k in range(len(column.agreement)):
        level, certain = naming.level(k), naming.certain[k]
        if level is None and k + naming.offset < 0:
            continue
        if level is None or not (certain or k + naming.offset < N_MEASURED):
            break
        lower, upper = column.discs[k], column.discs[k + 1]
        up = lower.normal + upper.normal
        confidence = float(np.clip(column.agreement[k], 0.0, 1.0)) * _SHARE_OF_CONFIDENCE[naming.anchor]
        if not certain:
            confidence *= _UNCERTAIN_CONFIDENCE
        body = describe_body(
            level,
            maps,
            canonical,
            SpineClass.BODY,
            (lower.point + upper.point) / 2,
            up / np.linalg.norm(up),
            (lower, upper),
            confidence,
        )
        if body is None or body.body_region.volume_mm3 < _VERTEBRA_MM3 / 2:
            if vertebrae and vertebrae[-1].level != "S1":
                break
            continue
        vertebrae.append(replace(body, level_certain=certain, flags=(*_name_flags(naming, k), *body.flags)))
    return flagged_column(vertebrae)


def _name_flags(naming: Naming, number: int) -> list[QualityFlag]:
    """Doubt about one vertebra's name, and fusion.

    Where the two anchors disagree every name is one off or none: that is said of the study, and no vertebra is kept out
    of the average.
    """
    flags = []
    if not naming.certain[number]:
        severity = Severity.CAUTION if naming.alternative else Severity.BLOCKING
        flags.append(QualityFlag("level_uncertain", severity))
    if number in naming.fused:
        flags.append(QualityFlag("fused_vertebra", naming.fused[number]))
    return flags


def flagged_column(vertebrae: list[Vertebra]) -> list[Vertebra]:
    """Vertebrae, caudal to cranial, with what takes neighbours to tell: compression, and a cut uppermost one."""
    measured = [v.heights for v in vertebrae]
    grades, compressed = compression_grades(measured), compression_flags(measured)
    flagged = [
        replace(v, flags=v.flags + more, compression_grade=grade)
        for v, more, grade in zip(vertebrae, compressed, grades, strict=True)
    ]
    if len(flagged) > 2 and flagged[-1].height_mm > _NEARLY_WHOLE * flagged[-2].height_mm:
        flagged[-1] = replace(flagged[-1], flags=tuple(_milder_if_truncated(flag) for flag in flagged[-1].flags))
    return flagged


def coronal_angle(vertebrae: list[Vertebra]) -> float:
    """Cobb angle in degrees of T12-L5: seen from the front, the largest angle between two of their bodies.

    A body's direction is its mid-surface, halfway between its endplates. On virtual patients it is steadier than the
    planes of the discs or the line through the centres. A body that the scan cuts has none.
    """
    whole = [
        v
        for v in vertebrae
        if v.level in LEVELS_FROM_SACRUM[:N_MEASURED] and all(f.code != "vertebra_truncated" for f in v.flags)
    ]
    up = np.array([-v.axes_lps[0] for v in whole])
    if len(up) < 3:
        return 0.0
    tilts = np.degrees(np.arctan2(up[:, 0], up[:, 2]))
    return float(tilts.max() - tilts.min())


def _milder_if_truncated(flag: QualityFlag) -> QualityFlag:
    return QualityFlag(flag.code, Severity.CAUTION) if flag.code == "vertebra_truncated" else flag
