"""The volume of interest (VOI) around one vertebra, on its own grid in vertebral axes.

Used alike by training and by inference, so that both see the same resampling. Numpy and scipy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.volume import CtVolume

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

SUPINE_AXES_LPS: Final[tuple[tuple[float, float, float], ...]] = ((0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
"""Rows: caudal, posterior, left of an upright column in LPS; what to pass when the vertebra's tilt is not known."""

STORED_RANGE_HU: Final = (-1024.0, 3071.0)
"""HU outside the 12 bits of a CT scanner are padding or overflow."""

_ORTHONORMAL_TOLERANCE: Final = 1e-3
_SPLINE_MARGIN_VOXELS: Final = 4
_GAUSSIAN_TRUNCATE: Final = 3.0


@dataclass(frozen=True, slots=True)
class VoiSpec:
    """The grid of a VOI; travels with the weights in a bundle's configs/inference.json.

    The defaults hold the body of the largest lumbar vertebra (about 55 mm wide, 38 mm deep, 32 mm high) with the
    neighbouring endplates, the canal and the pedicles, whose shape tells the level. At 1 mm the grid keeps what a
    0.7-1 mm reconstruction resolves of the trabecular texture; a cube of 64 mm would cost 2.4 times as much for muscle
    and fat.

    Attributes:
        shape: (D, H, W) voxels along the caudal, posterior and left axes of the vertebra; even, so that the
            centre lies between the two middle voxels.
        spacing_mm: isotropic distance between voxel centres.
        interpolation_order: of the spline (scipy), 1 linear to 3 cubic.
    """

    shape: tuple[int, int, int] = (40, 48, 56)
    spacing_mm: float = 1.0
    interpolation_order: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(n < 8 or n % 8 for n in self.shape):
            raise ValueError(f"shape must hold three multiples of 8, got {self.shape}")
        if not 0.25 <= self.spacing_mm <= 4.0:
            raise ValueError(f"spacing_mm must lie between 0.25 and 4, got {self.spacing_mm}")
        if self.interpolation_order not in (1, 2, 3):
            raise ValueError(f"interpolation_order must be 1, 2 or 3, got {self.interpolation_order}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VoiSpec:
        """Read the values of a bundle.

        Raises:
            BundleError: a key is unknown or missing, or a value is out of range.
        """
        try:
            return cls(**{**values, "shape": tuple(values["shape"])})
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"configs/inference.json has an unusable voi: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Voi:
    """One vertebra on the grid of a `VoiSpec`.

    Attributes:
        hu: (D, H, W) float32 HU, not windowed: the network windows for its image path and needs true HU beside it.
        coverage: share of the grid inside the scan; the rest repeats the scan's edge.
    """

    hu: Float32Array
    coverage: float


def extract_voi(
    volume: CtVolume,
    centre_lps_mm: npt.ArrayLike,
    axes_lps: npt.ArrayLike = SUPINE_AXES_LPS,
    spec: VoiSpec | None = None,
) -> Voi:
    """Resample ``volume`` onto the vertebra's own grid.

    Along every source axis that is finer than the grid the scan is first smoothed with a Gaussian of
    ``sigma = sqrt((grid / source)^2 - 1) / 2`` source voxels, so that noise and texture above the grid's Nyquist
    frequency do not fold back (a box of the grid's width takes the place of one of the voxel's width, each seen as a
    Gaussian of half its width). Axes coarser than the grid are only interpolated.

    Args:
        volume: the scan.
        centre_lps_mm: (3,) centre of the vertebral body in LPS millimetres.
        axes_lps: (3, 3) unit vectors in LPS, by row: caudal, posterior and left axis of the vertebra.
        spec: the grid; the default one when None.

    Raises:
        ValueError: a value is not finite, the axes are not orthonormal, or the grid lies outside the scan.
    """
    spec = VoiSpec() if spec is None else spec
    centre = np.asarray(centre_lps_mm, dtype=np.float64)
    axes = np.asarray(axes_lps, dtype=np.float64)
    if centre.shape != (3,) or axes.shape != (3, 3) or not (np.isfinite(centre).all() and np.isfinite(axes).all()):
        raise ValueError(f"need a finite (3,) centre and (3, 3) axes, got shapes {centre.shape} and {axes.shape}")
    if np.abs(axes @ axes.T - np.eye(3)).max() > _ORTHONORMAL_TOLERANCE:
        raise ValueError("the axes of a vertebra must be orthonormal rows")

    inverse = np.linalg.inv(volume.affine[:3, :3])
    step = (inverse @ axes.T) * spec.spacing_mm  # columns: one grid step along D, H, W in source voxels
    origin = volume.to_index(centre) - step @ ((np.asarray(spec.shape, dtype=np.float64) - 1.0) / 2.0)
    corners = origin + _corners(spec.shape) @ step.T
    limit = np.asarray(volume.voxels.shape, dtype=np.float64)
    if (corners.max(axis=0) < -0.5).any() or (corners.min(axis=0) > limit - 0.5).any():
        raise ValueError("the VOI lies outside the scan")

    sigma = _anti_alias_sigma(volume.spacing_mm, spec.spacing_mm)
    margin = np.ceil(np.asarray(sigma) * _GAUSSIAN_TRUNCATE) + _SPLINE_MARGIN_VOXELS
    low = np.clip(np.floor(corners.min(axis=0)) - margin, 0, limit - 1).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + margin + 1, low + 1, limit).astype(int)
    block = volume.voxels[low[0] : high[0], low[1] : high[1], low[2] : high[2]].astype(np.float32)
    block = np.clip(np.nan_to_num(block, nan=STORED_RANGE_HU[0]), *STORED_RANGE_HU)
    if any(sigma):
        block = ndimage.gaussian_filter(block, sigma, mode="nearest", truncate=_GAUSSIAN_TRUNCATE)
    resampled = ndimage.affine_transform(
        block,
        step,
        offset=origin - low,
        output_shape=spec.shape,
        output=np.float32,
        order=spec.interpolation_order,
        mode="nearest",
    )
    return Voi(
        hu=np.clip(resampled, *STORED_RANGE_HU).astype(np.float32, copy=False),
        coverage=_coverage(origin, step, spec.shape, limit),
    )


def _anti_alias_sigma(source_mm: tuple[float, float, float], grid_mm: float) -> tuple[float, float, float]:
    first, second, third = (0.5 * math.sqrt(max(0.0, (grid_mm / source) ** 2 - 1.0)) for source in source_mm)
    return first, second, third


def _corners(shape: tuple[int, int, int]) -> Float64Array:
    """(8, 3) grid indices of the corners."""
    ends = [(0.0, n - 1.0) for n in shape]
    return np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(8, 3)


def _coverage(origin: Float64Array, step: Float64Array, shape: tuple[int, int, int], limit: Float64Array) -> float:
    """Share of a grid of every fourth point that lies inside the scan's voxels."""
    points = np.stack(np.meshgrid(*(np.arange(0, n, 4) + 1.5 for n in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    index = origin + points @ step.T
    return float(((index >= -0.5) & (index <= limit - 0.5)).all(axis=1).mean())
