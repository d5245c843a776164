"""Trabecular attenuation of a vertebral body: the deterministic channel.

The region decides the number (in a labelled torso erosion alone moves L1 from 163 to 111 HU), so it is defined here, in
millimetres, and nowhere else. On that torso the means of T12-L5 change by at most 4 HU between 4 and 6 mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.domain.findings import Attenuation, QualityFlag, Severity
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume

EROSION_MM = 5.0
"""Distance of the trabecular region from the body's surface: cortex, endplates and their edges stay outside."""

POSTERIOR_SHARE = 0.3
"""This share of the body's antero-posterior extent, at the back, is left out: the basivertebral veins enter there."""

OUTLIER_SPREADS = 3.0
"""Voxels further above the median than this many robust standard deviations are sclerosis or cortex, not marrow."""

MINIMUM_VOLUME_MM3 = 1000.0
"""A smaller region holds too few independent samples of the texture for a mean: 1 ml at 30 HU noise."""

CORRELATION_REACH_MM = 6.0
"""Voxels further apart than this count as independent: noise and trabecular texture are correlated over 1 to 3 mm, and
what varies more slowly is a difference between regions of the bone, not an error of its mean."""

_MAD_TO_SD = 1.4826


@dataclass(frozen=True, slots=True)
class RegionRules:
    """What makes the region; other values than the product's serve to study their effect (`benchmarks.region`)."""

    erosion_mm: float = EROSION_MM
    posterior_share: float = POSTERIOR_SHARE
    outlier_spreads: float = OUTLIER_SPREADS


PRODUCT_RULES = RegionRules()


@dataclass(frozen=True, slots=True)
class Measurement:
    """Attenuation of one vertebra.

    Attributes:
        attenuation: None when the region is too small.
        body: the vertebral body on the volume's native grid.
        trabecular: the measured voxels on the same grid.
        standard_error_hu: of the mean, see `standard_error`; NaN when nothing was measured.
        voxel_count: measured voxels.
    """

    attenuation: Attenuation | None
    body: Region
    trabecular: Region
    standard_error_hu: float
    voxel_count: int
    quality_flags: tuple[QualityFlag, ...]


def measure(
    volume: CtVolume, body: Region, axes_lps: npt.NDArray[np.float64], rules: RegionRules = PRODUCT_RULES
) -> Measurement:
    """Measure the trabecular attenuation within a vertebral body on the volume's own voxels.

    The signed distance to the body's surface is computed on the mask's grid in millimetres and sampled at the native
    voxel centres, so the region doesn't depend on slice spacing, tilt or orientation.

    Args:
        volume: the scan.
        body: the vertebral body on any grid.
        axes_lps: (3, 3) unit vectors, rows: cranial to caudal, anterior to posterior, right to left.
        rules: the product's, but in studies of them.
    """
    depth_mm, origin = _depth_on_native_grid(volume, body)
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps(origin)
    inside = depth_mm > 0
    corner = tuple(slice(start, start + size) for start, size in zip(origin, depth_mm.shape, strict=True))
    hounsfield = volume.voxels[corner]
    native_body = Region(inside, affine)
    core = (depth_mm >= rules.erosion_mm) & ~_posterior(inside, affine, axes_lps, rules.posterior_share)
    flags: list[QualityFlag] = []
    if not core.any():
        flags.append(QualityFlag("region_too_small", Severity.BLOCKING))
        return Measurement(None, native_body, Region(core, affine), float("nan"), 0, tuple(flags))
    values = hounsfield[core]
    median = float(np.median(values))
    spread = _MAD_TO_SD * float(np.median(np.abs(values - median)))
    core &= hounsfield <= median + rules.outlier_spreads * max(spread, 1.0)
    values = hounsfield[core].astype(np.float64)
    trabecular = Region(core, affine)
    if trabecular.volume_mm3 < MINIMUM_VOLUME_MM3:
        flags.append(QualityFlag("region_too_small", Severity.BLOCKING))
        return Measurement(None, native_body, trabecular, float("nan"), values.size, tuple(flags))
    error = standard_error(hounsfield, core, affine)
    attenuation = Attenuation(
        mean=round(float(values.mean()), 1),
        median=round(float(np.median(values)), 1),
        sd=round(float(values.std(ddof=1)), 1),
        volume_mm3=round(trabecular.volume_mm3, 1),
        voxel_count=int(values.size),
        standard_error=round(error, 2),
    )
    return Measurement(attenuation, native_body, trabecular, error, values.size, tuple(flags))


def standard_error(
    hounsfield: npt.NDArray[np.floating], region: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]
) -> float:
    """Standard error in HU of the mean over a region whose voxels are correlated.

    The variance of a mean is the sum of the covariances of all pairs of voxels over the squared count. Covariances are
    estimated from the region itself, for displacements up to `CORRELATION_REACH_MM`; by subtracting the region's own
    mean a share of the correlation is lost, so each is raised by the variance of the mean found so far (two rounds).
    Never below the error of independent voxels.

    Args:
        hounsfield: (d, h, w) attenuation.
        region: (d, h, w) measured voxels, at least two.
        affine: (4, 4) of that grid to LPS millimetres.
    """
    inside = np.argwhere(region)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    window = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    weight = region[window].astype(np.float64)
    count = float(weight.sum())
    deviation = np.where(region[window], hounsfield[window].astype(np.float64), 0.0)
    deviation -= weight * (deviation.sum() / count)
    shape = [2 * size for size in weight.shape]
    products = np.fft.irfftn(np.abs(np.fft.rfftn(deviation, shape, axes=(0, 1, 2))) ** 2, shape, axes=(0, 1, 2))
    pairs = np.round(np.fft.irfftn(np.abs(np.fft.rfftn(weight, shape, axes=(0, 1, 2))) ** 2, shape, axes=(0, 1, 2)))
    lags = np.stack(np.meshgrid(*(np.fft.fftfreq(size, 1 / size) for size in shape), indexing="ij"), axis=-1)
    near = np.linalg.norm(lags @ affine[:3, :3].T, axis=-1) <= CORRELATION_REACH_MM
    independent = float(products[0, 0, 0]) / (count - 1) / count
    covariances, counted = float(products[near].sum()), float(pairs[near].sum())
    variance = independent
    for _ in range(2):
        variance = max(independent, (covariances + counted * variance) / count**2)
    return float(variance**0.5)


def _cubic(body: Region) -> Region:
    """The body on nearly cubic voxels, no longer than its shortest edge, with axes at right angles.

    A mask on thick or tilted slices would otherwise be eroded by up to half a slice too little.
    """
    linear = body.affine[:3, :3]
    spacing = np.linalg.norm(linear, axis=0)
    cosines = linear / spacing
    step = float(spacing.min())
    if np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-3):
        factors = np.round(spacing / step).astype(int)
        mask = body.mask
        for axis, factor in enumerate(factors):
            mask = np.repeat(mask, int(factor), axis=axis)
        affine = body.affine.copy()
        affine[:3, :3] = linear / factors
        affine[:3, 3] = body.affine[:3, 3] + linear @ ((1.0 / factors - 1.0) / 2.0)
        return Region(mask, affine)
    corners = np.array(np.meshgrid(*((-0.5, size - 0.5) for size in body.mask.shape), indexing="ij")).reshape(3, -1)
    places = linear @ corners + body.affine[:3, 3:]
    low = places.min(axis=1)
    size = np.ceil((places.max(axis=1) - low) / step).astype(int) + 1
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = low
    to_mask = np.linalg.inv(body.affine) @ affine
    mask = ndimage.affine_transform(
        body.mask.astype(np.uint8), to_mask[:3, :3], to_mask[:3, 3], output_shape=tuple(size), order=0
    )
    return Region(mask > 0, affine)


def _depth_on_native_grid(volume: CtVolume, body: Region) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Distance to the body's surface in mm, positive inside, on the native voxels around it, and their first index."""
    body = _cubic(body)
    spacing = np.linalg.norm(body.affine[:3, :3], axis=0)
    padded = np.pad(body.mask, 1)
    # half a voxel is taken off on either side: the surface lies between the last voxel inside and the first outside
    half = float(spacing.min()) / 2
    distance = np.maximum(ndimage.distance_transform_edt(padded, sampling=spacing) - half, 0.0) - np.maximum(
        ndimage.distance_transform_edt(~padded, sampling=spacing) - half, 0.0
    )
    corners = np.array(np.meshgrid(*((-1, size) for size in body.mask.shape), indexing="ij")).reshape(3, -1).T
    native = volume.to_index(corners @ body.affine[:3, :3].T + body.affine[:3, 3])
    shape = np.asarray(volume.voxels.shape)
    first = np.clip(np.floor(native.min(axis=0)).astype(np.int64), 0, shape - 1)
    last = np.clip(np.ceil(native.max(axis=0)).astype(np.int64) + 1, first + 1, shape)
    # native index -> mask index (shifted by the padding of one)
    to_mask = np.linalg.inv(body.affine) @ volume.affine
    offset = to_mask[:3, :3] @ first + to_mask[:3, 3] + 1
    depth = ndimage.affine_transform(
        distance, to_mask[:3, :3], offset, output_shape=tuple(last - first), order=1, mode="constant", cval=-1.0
    )
    return depth, first


def _posterior(
    inside: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64], axes_lps: npt.NDArray[np.float64], share: float
) -> npt.NDArray[np.bool_]:
    """Voxels in the posterior share of the body, by their position along the antero-posterior axis."""
    along = axes_lps[1] @ affine[:3, :3]
    d, h, w = np.ogrid[tuple(slice(0, size) for size in inside.shape)]
    position = d * along[0] + h * along[1] + w * along[2]
    within = position[inside]
    if within.size == 0:
        return np.zeros(inside.shape, dtype=bool)
    front, back = np.percentile(within, (1, 99))
    return np.asarray(position > back - share * (back - front))
