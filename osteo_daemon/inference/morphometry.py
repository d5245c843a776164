"""Heights of a vertebral body: a flag for compression, never a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.imaging.region import Region

BAND_CENTRES = (0.15, 0.50, 0.85)
"""Anterior, middle and posterior height are taken at these shares of the antero-posterior extent."""

BAND_HALF_WIDTH = 0.10
MIDLINE_HALF_WIDTH_MM = 8.0
MINIMUM_VOXELS = 10

MILD_LOSS = 0.20
MODERATE_LOSS = 0.25
SEVERE_LOSS = 0.40
"""Loss of height from which Genant's grades 1, 2 and 3 begin (Genant et al., J Bone Miner Res 1993;8:1137)."""


@dataclass(frozen=True, slots=True)
class Heights:
    """Anterior, middle and posterior height of a vertebral body in mm."""

    anterior_mm: float
    middle_mm: float
    posterior_mm: float

    @property
    def mean_mm(self) -> float:
        """Mean of the three heights."""
        return (self.anterior_mm + self.middle_mm + self.posterior_mm) / 3.0

    @property
    def loss(self) -> float:
        """Wedge or biconcave loss: 1 - the lower of anterior and middle height over the posterior one, at least 0.

        A posterior height below the anterior one is no fracture: L5 is built so.
        """
        return max(0.0, 1.0 - min(self.anterior_mm, self.middle_mm) / self.posterior_mm)


def compression_losses(heights: Sequence[Heights | None]) -> list[float | None]:
    """Lost share of height of each vertebra of a column (in order), None where it could not be measured.

    The greater of the wedge or biconcave loss and of the crush loss: 1 - mean height over the mean of its neighbours'.
    """
    losses: list[float | None] = []
    for k, own in enumerate(heights):
        if own is None:
            losses.append(None)
            continue
        beside = [h.mean_mm for h in (*heights[max(0, k - 1) : k], *heights[k + 1 : k + 2]) if h is not None]
        crush = 1.0 - own.mean_mm / (sum(beside) / len(beside)) if len(beside) == 2 else 0.0
        losses.append(max(own.loss, crush))
    return losses


def compression_grades(heights: Sequence[Heights | None]) -> list[int | None]:
    """Genant-like grade by the measured loss: 0, or 1 from `MILD_LOSS`, 2 from `MODERATE_LOSS`, 3 from `SEVERE_LOSS`.

    Genant grades by eye on radiographs; this is arithmetic on a mask, for comparison and not a diagnosis.
    """
    bounds = (MILD_LOSS, MODERATE_LOSS, SEVERE_LOSS)
    return [None if loss is None else sum(loss >= bound for bound in bounds) for loss in compression_losses(heights)]


def compression_flags(heights: Sequence[Heights | None]) -> list[tuple[QualityFlag, ...]]:
    """``compression_suspected`` for each vertebra of a column: caution from grade 1, blocking (out of the average) from
    grade 2."""
    flags: list[tuple[QualityFlag, ...]] = []
    for grade in compression_grades(heights):
        severity = Severity.BLOCKING if (grade or 0) >= 2 else Severity.CAUTION
        flags.append((QualityFlag("compression_suspected", severity),) if grade else ())
    return flags


def heights(body: Region, axes_lps: npt.NDArray[np.float64]) -> Heights | None:
    """Heights near the midline from the spread of the voxels along the vertebra's axis.

    The spread of points between two parallel planes is their distance over sqrt(12); unlike the distance between the
    outermost voxels it averages over all of them and is not moved by a single one.

    Args:
        body: the vertebral body on any grid.
        axes_lps: (3, 3) unit vectors, rows: cranio-caudal, anterior to posterior, right to left.

    Returns:
        None when a band holds fewer than `MINIMUM_VOXELS` voxels.
    """
    points = np.argwhere(body.mask) @ body.affine[:3, :3].T
    if len(points) == 0:
        return None
    along, posterior, left = points @ axes_lps[0], points @ axes_lps[1], points @ axes_lps[2]
    front, back = np.percentile(posterior, (1, 99))
    midline = np.abs(left - np.median(left)) < MIDLINE_HALF_WIDTH_MM
    measured: list[float] = []
    for centre in BAND_CENTRES:
        low = front + (centre - BAND_HALF_WIDTH) * (back - front)
        high = front + (centre + BAND_HALF_WIDTH) * (back - front)
        inside = along[midline & (posterior >= low) & (posterior < high)]
        if inside.size < MINIMUM_VOXELS:
            return None
        measured.append(float(np.sqrt(12.0) * inside.std()))
    return Heights(*measured)
