"""From painted attenuation to reconstructed slices: point spread, noise, field of view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.phantom.canvas import F32, Vec
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner

if TYPE_CHECKING:
    from osteo_daemon.phantom.body import Body

_HALO_MM = 1.2
"""Width of the smooth version that unsharp masking subtracts."""
_STREAK_HU = 4.5
_STREAK_SOFTNESS_MM = 1.0
_STREAK_FLOOR_HU = -700.0
_OWN_SHARE, _NEXT_SHARE = 0.961, 0.277
"""A slice's noise is this mixture of its own field and the next slice's: a correlation of 0.27 between neighbours, as
measured on a real helical series of 4.25 mm."""


def _axis_blur(values: F32, sigma_px: float, axis: int) -> F32:
    if sigma_px < 0.15:
        return values
    blurred = ndimage.gaussian_filter1d(values, sigma_px, axis=axis, mode="nearest", truncate=3.0)
    return np.asarray(blurred, dtype=np.float32)


def blur_slices(hu: F32, scanner: Scanner) -> F32:
    """In-plane point spread of the kernel. Partial volume of the grid itself is already in ``hu``.

    Args:
        hu: (D, H, W).
    """
    shape = scanner.shape
    sigma = float(np.hypot(shape.blur_mm, scanner.motion_mm)) / scanner.pixel_spacing_mm
    hu = _axis_blur(_axis_blur(hu, sigma, 1), sigma, 2)
    if shape.sharpen > 0:
        wide = _HALO_MM / scanner.pixel_spacing_mm
        hu = hu + np.float32(shape.sharpen) * (hu - _axis_blur(_axis_blur(hu, wide, 1), wide, 2))
    return hu


def add_streaks(hu: F32, metal: npt.NDArray[np.bool_], patient: VirtualPatient, scanner: Scanner) -> None:
    """Bright and dark streaks that leave metal, in place, in the slices that hold any.

    A look-alike, no simulation of beam hardening: the metal's image is filtered by a random function of direction, so
    that streaks run straight from it in the same directions in all slices.

    Args:
        hu: (D, H, W).
        metal: (D, H, W) where metal stands.
    """
    rows = np.flatnonzero(metal.any(axis=(1, 2)))
    if rows.size == 0:
        return
    ky = np.fft.fftfreq(hu.shape[1], scanner.pixel_spacing_mm)[:, None]
    kx = np.fft.rfftfreq(hu.shape[2], scanner.pixel_spacing_mm)[None, :]
    angle = np.arctan2(ky, kx)
    rng = patient.rng("streaks", scanner.seed)
    pattern = np.zeros_like(angle)
    for order in range(1, 15):
        pattern += rng.standard_normal() * np.cos(2 * order * angle + rng.uniform(0, 2 * np.pi))
    response = pattern / np.sqrt(28.0) / (np.hypot(ky, kx) + 0.012)
    for row in rows:
        spectrum = np.fft.rfft2(metal[row].astype(np.float32)) * response
        streaks = np.fft.irfft2(spectrum, s=hu.shape[1:]) * (scanner.pixel_spacing_mm**2 / _STREAK_SOFTNESS_MM)
        body = (hu[row] > _STREAK_FLOOR_HU) & ~metal[row]
        hu[row] += np.where(body, np.clip(streaks * _STREAK_HU, -500.0, 700.0), 0.0).astype(np.float32)


def noise_level(body: Body, scanner: Scanner, y: Vec, x: Vec) -> F32:
    """(H, W) noise SD relative to the middle of the torso: falls towards the skin, low in the air around."""
    a, b, middle = body.girth_mm
    rho2 = (x[None, :] / a) ** 2 + ((y[:, None] - middle) / b) ** 2
    profile = 0.28 + 0.72 / (1.0 + (rho2 / 1.35) ** 2)
    return np.asarray(profile * scanner.noise_hu * scanner.shape.noise_gain * body.girth_factor, dtype=np.float32)


def _coloured(rng: np.random.Generator, shape: tuple[int, int], sigma_px: float) -> F32:
    """Unit-variance noise with CT's character: short correlation, little power at the lowest frequencies."""
    white = rng.standard_normal(shape, dtype=np.float32)
    # a wider patient is seen with fewer photons sideways: noise is streakier along x
    near = _axis_blur(_axis_blur(white, sigma_px * 0.75, 0), sigma_px * 1.2, 1)
    far = _axis_blur(_axis_blur(near, sigma_px * 1.8, 0), sigma_px * 1.8, 1)
    band = near - np.float32(0.55) * far
    return np.asarray(band / np.float32(band.std()), dtype=np.float32)


def add_noise(hu: F32, level: F32, patient: VirtualPatient, scanner: Scanner, first: int) -> None:
    """Add noise in place to the slices from ``first`` on; neighbours share a quarter of it, as in interpolated helices.

    Args:
        hu: (D, H, W).
        level: (H, W) standard deviation in HU.
    """
    sigma = scanner.shape.noise_blur_mm * scanner.noise_grain / scanner.pixel_spacing_mm
    plane = (hu.shape[1], hu.shape[2])
    fields = (_coloured(patient.rng("noise", scanner.seed, first + i), plane, sigma) for i in range(len(hu) + 1))
    own = next(fields)
    for image, following in zip(hu, fields, strict=True):
        image += (np.float32(_OWN_SHARE) * own + np.float32(_NEXT_SHARE) * following) * level
        own = following


def finish(hu: F32, scanner: Scanner, x: Vec, y: Vec, middle_y: float) -> npt.NDArray[np.int16]:
    """Miscalibration, padding outside the reconstruction circle, rounding to whole HU."""
    if scanner.hu_scale != 1.0 or scanner.hu_offset != 0.0:
        hu = (hu + np.float32(1000.0)) * np.float32(scanner.hu_scale) + np.float32(scanner.hu_offset - 1000.0)
    out = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    if scanner.padding_hu is not None:
        radius = 0.5 * scanner.matrix * scanner.pixel_spacing_mm
        outside = (x[None, :] - scanner.truncate_mm) ** 2 + (y[:, None] - middle_y) ** 2 > radius**2
        out[:, outside] = int(scanner.padding_hu)
    return out


def blur_voi(hu: F32, scanner: Scanner, spacing_mm: float, axes: Vec) -> F32:
    """Point spread of kernel and slice, and of the resampling, on a box in vertebral axes.

    Args:
        hu: (D, H, W) along the vertebra's cranial, posterior and left directions.
        axes: (3, 3) of the vertebra, columns left, posterior, cranial in LPS.
    """
    variance_plane = scanner.shape.blur_mm**2 + scanner.motion_mm**2 + (scanner.pixel_spacing_mm**2) / 12.0
    variance_z = (scanner.slice_thickness_mm**2) / 12.0 + (scanner.spacing_mm[0] ** 2) / 24.0
    for axis, column in enumerate((2, 1, 0)):
        along_z = float(axes[2, column]) ** 2
        variance = along_z * variance_z + (1.0 - along_z) * variance_plane
        # the painted edge already carries the box's own voxel
        variance = max(variance - spacing_mm**2 / 12.0, 0.0)
        hu = _axis_blur(hu, float(np.sqrt(variance)) / spacing_mm, axis)
    if scanner.shape.sharpen > 0:
        wide = _HALO_MM / spacing_mm
        hu = hu + np.float32(scanner.shape.sharpen) * (hu - _axis_blur(_axis_blur(hu, wide, 1), wide, 2))
    return hu


def noise_voi(
    rng: np.random.Generator, shape: tuple[int, int, int], scanner: Scanner, spacing_mm: float, girth_factor: float
) -> F32:
    """(D, H, W) noise as it looks after resampling a series to the box."""
    white = rng.standard_normal(shape, dtype=np.float32)
    sigma = max(scanner.shape.noise_blur_mm * scanner.noise_grain, 0.4 * scanner.pixel_spacing_mm) / spacing_mm
    along_z = 0.36 * scanner.spacing_mm[0] / spacing_mm
    near = _axis_blur(_axis_blur(_axis_blur(white, along_z, 0), sigma * 0.75, 1), sigma * 1.2, 2)
    far = _axis_blur(_axis_blur(near, sigma * 1.8, 1), sigma * 1.8, 2)
    band = near - np.float32(0.55) * far
    gain = scanner.noise_hu * scanner.shape.noise_gain * girth_factor
    return np.asarray(band * np.float32(gain / band.std()), dtype=np.float32)
