"""Trabecular texture of set mean.

The field is a model, not a reconstruction of trabeculae: what CT resolves of cancellous bone is the fluctuation of bone
fraction over a millimetre, skewed towards bright strands, longer along the load axis, on top of slower regional
variation. With age and loss of density the strands thin out: correlation lengths and vertical anisotropy grow and the
relative spread rises, while the absolute spread falls (directions after micro-CT studies of ageing; sizes are
assumptions set so that a 7 mm ROI on 5 mm slices shows the SD of about 30 HU seen on real vertebrae of 150-178 HU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

from osteo_daemon.phantom.canvas import F32, Vec

STEP_MM: Final = 0.8
"""Grid of the stored texture; finer structure is below what a body CT resolves."""


@dataclass(frozen=True, slots=True)
class TextureShape:
    """Character of the texture.

    Attributes:
        fine_mm, coarse_mm: correlation lengths (standard deviation of the smoothing Gaussian) across the load axis.
        anisotropy: factor on the fine length along the load axis.
        skew: strength of the exponential transform of the fine part.
        spread: SD of the whole field relative to the mean bone part, before any scanner blur.
        coarse_share: share of the variance in the slow part.
    """

    fine_mm: float
    coarse_mm: float
    anisotropy: float
    skew: float
    spread: float
    coarse_share: float


def texture_of(density_mg_cm3: float, ageing: float, length: float = 1.0, spread: float = 1.0) -> TextureShape:
    """Texture for a density and an age (0 at 25 years, 1 at 90), times the factors ``length`` and ``spread``."""
    loss = float(np.clip(1.0 - density_mg_cm3 / 180.0, 0.0, 1.0))
    return TextureShape(
        fine_mm=0.54 * (1.0 + 0.45 * loss + 0.15 * ageing) * length,
        coarse_mm=3.2 * (1.0 + 0.3 * loss) * length,
        anisotropy=1.35 + 0.5 * loss + 0.25 * ageing,
        skew=0.25 + 0.5 * loss,
        spread=(0.29 + 0.26 * loss) * spread,
        coarse_share=0.22,
    )


def _smooth(noise: F32, sigma_mm: tuple[float, float, float]) -> F32:
    smoothed = ndimage.gaussian_filter(noise, [s / STEP_MM for s in sigma_mm], mode="wrap", truncate=3.0)
    return np.asarray(smoothed / smoothed.std(), dtype=np.float32)


def _enlarge(field: F32, size: list[int]) -> F32:
    """Linear interpolation of a coarse field to a finer grid, axis by axis."""
    for axis, n in enumerate(size):
        place = np.linspace(0, field.shape[axis] - 1.001, n, dtype=np.float32)
        low = place.astype(np.intp)
        share = (place - low).reshape([-1 if k == axis else 1 for k in range(3)])
        below, above = np.take(field, low, axis=axis), np.take(field, low + 1, axis=axis)
        field = below + share * (above - below)
    return field


@dataclass(frozen=True, slots=True, eq=False)
class Texture:
    """HU offsets around the set mean, on a grid in vertebral axes centred at the body.

    Attributes:
        values: (nz, ny, nx) HU, at `STEP_MM`.
    """

    values: F32

    def sample(self, x: F32, y: F32, z: F32) -> F32:
        """(n,) offsets at local positions in mm (left, posterior, cranial)."""
        half = [(n - 1) / 2.0 for n in self.values.shape]
        index = np.stack([z / STEP_MM + half[0], y / STEP_MM + half[1], x / STEP_MM + half[2]])
        return np.asarray(ndimage.map_coordinates(self.values, index, order=1, mode="nearest"), dtype=np.float32)


def draw_texture(
    rng: np.random.Generator,
    shape: TextureShape,
    mean_hu: float,
    extent_mm: tuple[float, float, float],
    voxel_mm: float,
) -> F32:
    """Offsets with the given character, before centring.

    Args:
        rng: the vertebra's own generator.
        shape: see `texture_of`.
        mean_hu: attenuation the spread is relative to (floored: an empty vertebra still has strands).
        extent_mm: size of the body along (cranial, posterior, left).
        voxel_mm: edge of the voxels it will be sampled at; the field is averaged over it beforehand.
    """
    size = [int(np.ceil(e / STEP_MM)) + 3 for e in extent_mm]
    fine = _smooth(
        rng.standard_normal(size, dtype=np.float32), (shape.fine_mm * shape.anisotropy, shape.fine_mm, shape.fine_mm)
    )
    fine = np.exp(np.float32(shape.skew) * fine)
    fine = (fine - fine.mean()) / fine.std()
    small = [n // 4 + 2 for n in size]
    coarse = ndimage.gaussian_filter(rng.standard_normal(small, dtype=np.float32), shape.coarse_mm / (4 * STEP_MM))
    coarse = _enlarge(coarse / coarse.std(), size)
    field = np.sqrt(1.0 - shape.coarse_share) * fine + np.sqrt(shape.coarse_share) * coarse
    field = np.asarray(field * (shape.spread * max(mean_hu, 60.0)), dtype=np.float32)
    average_mm = np.sqrt(max(voxel_mm**2 - STEP_MM**2, 0.0) / 12.0)
    if average_mm > 0.2:
        field = np.asarray(ndimage.gaussian_filter(field, average_mm / STEP_MM, truncate=3.0))
    return field


def texture_positions(values: F32) -> tuple[Vec, Vec, Vec]:
    """Local coordinates (cranial, posterior, left) of the texture's grid lines."""
    z, y, x = ((np.arange(n) - (n - 1) / 2.0) * STEP_MM for n in values.shape)
    return z, y, x
