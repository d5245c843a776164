"""Can this scan's numbers be trusted: calibration against air and fat, contrast, noise, tube voltage.

Everything is measured in the image; the header is asked only for the tube voltage, which no image shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from scipy import ndimage

from osteo_daemon.domain.findings import Attenuation, CorrectedAttenuation, QualityFlag, Severity
from osteo_daemon.domain.references import KVP_TO_120
from osteo_daemon.imaging.volume import CtVolume

AIR_HU = (-1030.0, -950.0)
"""Air around the patient reads -1000 HU by definition (PS3.3 C.11.1.1.2); scatter and padding move it a little."""

FAT_HU = (-130.0, -75.0)
"""Adipose tissue reads about -95 to -115 HU between 80 and 140 kVp; outside, the scale is off."""

ENHANCED_VESSEL_HU = 100.0
"""Unenhanced blood reads 35 to 60 HU; a great vessel above this value holds contrast agent."""

HIGH_NOISE_HU = 60.0
"""Noise above which a 5 ml trabecular mean is no longer better than a few HU."""

KVP_TOLERANCE = 5.0

_VESSEL_SMOOTHING_MM = 4.0
_VESSEL_HALF_DEPTH_MM = 22.0
_VESSEL_HALF_WIDTH_MM = 26.0
_VESSEL_HALF_HEIGHT_MM = 6.0
_BODY_HALF_DEPTH_MM = 17.0


@dataclass(frozen=True, slots=True)
class ScanQuality:
    """Measured scan quality; a value is None where the image holds nothing to measure it on.

    Attributes:
        air_hu: median attenuation of the air around the patient.
        fat_hu: attenuation of the adipose tissue's histogram peak.
        vessel_hu: median over the levels of the brightest 4 mm blob in front of the spine: aorta or vena cava.
        noise_hu: robust standard deviation of the voxel noise in fat and soft tissue.
    """

    air_hu: float | None
    fat_hu: float | None
    vessel_hu: float | None
    noise_hu: float | None
    quality_flags: tuple[QualityFlag, ...]


def assess(
    volume: CtVolume, centres_lps_mm: Sequence[npt.NDArray[np.float64]], axes_lps: Sequence[npt.NDArray[np.float64]]
) -> ScanQuality:
    """Measure air, fat, vessels and noise.

    Args:
        volume: the scan.
        centres_lps_mm: (3,) centres of the vertebral bodies.
        axes_lps: (3, 3) axes of each, rows cranial to caudal, anterior to posterior, right to left.
    """
    sample = volume.voxels[:, ::2, ::2]
    air, fat, noise = _air(sample), _fat(sample), _noise(volume.voxels)
    vessel = _vessel(volume, centres_lps_mm, axes_lps)
    flags = []
    if (air is not None and not AIR_HU[0] <= air <= AIR_HU[1]) or (
        fat is not None and not FAT_HU[0] <= fat <= FAT_HU[1]
    ):
        flags.append(QualityFlag("calibration_out_of_range", Severity.BLOCKING))
    elif fat is None:
        flags.append(QualityFlag("calibration_unchecked", Severity.CAUTION))
    if vessel is not None and vessel > ENHANCED_VESSEL_HU:
        flags.append(QualityFlag("contrast_enhanced", Severity.CAUTION))
    if noise is not None and noise > HIGH_NOISE_HU:
        flags.append(QualityFlag("high_noise", Severity.CAUTION))
    return ScanQuality(air, fat, vessel, noise, tuple(flags))


def _air(sample: npt.NDArray[np.floating]) -> float | None:
    # -1024 is padding raised to the lowest value, not measured air
    air = sample[(sample > -1023.0) & (sample < -900.0)]
    return float(np.median(air)) if air.size > 10_000 else None


def _fat(sample: npt.NDArray[np.floating]) -> float | None:
    histogram, edges = np.histogram(sample, bins=90, range=(-200.0, -20.0))
    if histogram.sum() < 10_000:
        return None
    smooth = ndimage.gaussian_filter1d(histogram.astype(np.float64), 3.0)
    peak = int(np.argmax(smooth))
    return float((edges[peak] + edges[peak + 1]) / 2) if 0 < peak < smooth.size - 1 else None


def _noise(voxels: npt.NDArray[np.floating]) -> float | None:
    middle = voxels[voxels.shape[0] // 4 : -(voxels.shape[0] // 4) or None : 4]
    # second differences cancel gradients; their variance is 6 times the noise's when neighbours are independent
    second = middle[:, :, :-4:2] - 2 * middle[:, :, 2:-2:2] + middle[:, :, 4::2]
    tissue = (np.abs(middle[:, :, 2:-2:2] + 30.0) < 130.0) & (np.abs(second) < 400.0)
    if np.count_nonzero(tissue) < 10_000:
        return None
    return float(1.4826 * np.median(np.abs(second[tissue])) / 6**0.5)


def _vessel(
    volume: CtVolume, centres: Sequence[npt.NDArray[np.float64]], axes: Sequence[npt.NDArray[np.float64]]
) -> float | None:
    step_mm = 2.0
    found: list[float] = []
    for centre, frame in zip(centres, axes, strict=True):
        # a box in front of the body, in its axes: rows of `frame` run caudal, posterior, left
        caudal = np.arange(-_VESSEL_HALF_HEIGHT_MM, _VESSEL_HALF_HEIGHT_MM + 1, step_mm)
        forward = _BODY_HALF_DEPTH_MM + np.arange(0.0, 2 * _VESSEL_HALF_DEPTH_MM + 1, step_mm)
        left = np.arange(-_VESSEL_HALF_WIDTH_MM, _VESSEL_HALF_WIDTH_MM + 1, step_mm)
        grid = np.stack(np.meshgrid(caudal, -forward, left, indexing="ij"), axis=-1)
        index = volume.to_index(centre + grid @ frame)
        values = ndimage.map_coordinates(volume.voxels, np.moveaxis(index, -1, 0), order=1, mode="nearest")
        blobs = ndimage.gaussian_filter(np.minimum(values, 500.0), _VESSEL_SMOOTHING_MM / step_mm)
        found.append(float(blobs[blobs.shape[0] // 2, 3:-3, 3:-3].max()))
    return float(np.median(found)) if found else None


def tube_voltage(header: Dataset) -> float | None:
    """KVP (0018,0060) in kV, or None when absent or not a number."""
    try:
        value = float(header.KVP)
    except (AttributeError, TypeError, ValueError):
        return None
    return value if value > 0 else None


def correct(attenuation: Attenuation, kvp: float | None) -> tuple[CorrectedAttenuation | None, tuple[QualityFlag, ...]]:
    """Attenuation as it would read at 120 kVp, and what to say about it.

    Returns:
        None with no flag at 120 kVp; None with ``kvp_unknown`` or ``kvp_uncorrected`` (both caution) where no published
        factor applies; the corrected value otherwise.
    """
    if kvp is None:
        return None, (QualityFlag("kvp_unknown", Severity.CAUTION),)
    nearest = min(KVP_TO_120, key=lambda known: abs(known - kvp))
    if abs(nearest - kvp) > KVP_TOLERANCE:
        return None, (QualityFlag("kvp_uncorrected", Severity.CAUTION),)
    factor = KVP_TO_120[nearest]
    if factor == 1.0:
        return None, ()
    return CorrectedAttenuation(round(attenuation.mean * factor, 1), {f"kvp_{nearest}_to_120": factor}), ()
