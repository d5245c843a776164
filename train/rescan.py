"""The same vertebra as a coarser series would show it: thick slices at a tilt, coarse pixels, both.

The phantom blurs a VOI by its slices but samples it on the VOI's own grid. A real series is sampled on its slices, at
any angle to the vertebra and with any phase, and interpolated from there; this module does that to a finished VOI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

F32 = npt.NDArray[np.float32]
Vec = npt.NDArray[np.float64]

_SLICES_ONLY: Final = 0.45
_CUBES: Final = 0.35
"""Shares of thick slices with fine pixels, and of coarse cubes; the rest has both coarse. Assumptions."""
SLICE_MM: Final = (2.5, 5.5)
CUBE_MM: Final = (2.0, 5.2)
PIXEL_MM: Final = (1.5, 3.0)
TILT_DEG: Final = (12.0, 5.0, 5.0)
"""SD of the slices' tilt about the left, posterior and caudal axis of the vertebra."""
BLUR_SHARE: Final = (0.29, 0.5)
"""SD of the Gaussian that stands for a coarse voxel, as a share of its edge: 0.29 has a box's variance, 0.5 is what
resampling software commonly uses."""


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """Where a coarse series has its samples.

    Attributes:
        spacing_mm: (3,) across slices, posterior, left.
        turn: (3, 3) its columns are the lattice's directions in the VOI's (caudal, posterior, left) axes.
        phase: (3,) shift of the samples as a share of the spacing, -0.5 to 0.5.
        blur_share: SD of the voxel's Gaussian over its edge.
    """

    spacing_mm: Vec
    turn: Vec
    phase: Vec
    blur_share: float


def draw_lattice(rng: np.random.Generator, fine_mm: float) -> Lattice:
    """A random coarse series; ``fine_mm`` is the spacing of axes that stay fine."""
    kind = rng.random()
    slice_mm, cube_mm, pixel_mm = rng.uniform(*SLICE_MM), rng.uniform(*CUBE_MM), rng.uniform(*PIXEL_MM)
    if kind < _SLICES_ONLY:
        spacing = np.array([slice_mm, fine_mm, fine_mm])
    elif kind < _SLICES_ONLY + _CUBES:
        spacing = np.full(3, cube_mm)
    else:
        spacing = np.array([slice_mm, pixel_mm, pixel_mm])
    left, posterior, caudal = np.radians(TILT_DEG) * rng.standard_normal(3)
    return Lattice(spacing, _rotation(caudal, posterior, left), rng.uniform(-0.5, 0.5, 3), rng.uniform(*BLUR_SHARE))


def rescan(voxels: F32, lattice: Lattice, spacing_mm: float) -> F32:
    """(D, H, W) voxels of ``spacing_mm``, smoothed, sampled on the lattice and interpolated back to their own grid."""
    shape = np.array(voxels.shape)
    # along each axis of the VOI the variances of the tilted voxel add up
    sd_mm = np.where(lattice.spacing_mm > spacing_mm, lattice.blur_share * lattice.spacing_mm, 0.0)
    sigma = np.sqrt(np.square(lattice.turn) @ np.square(sd_mm)) / spacing_mm
    smooth = ndimage.gaussian_filter(voxels, sigma, mode="nearest", truncate=3.0)
    step = lattice.turn * (lattice.spacing_mm / spacing_mm)
    inverse = np.linalg.inv(step)
    reach = np.abs(inverse) @ ((shape - 1) / 2.0)
    count = 2 * np.ceil(reach + 1.0).astype(int) + 1
    origin = (shape - 1) / 2.0 - step @ ((count - 1) / 2.0 - lattice.phase)
    series = ndimage.affine_transform(
        smooth, step, offset=origin, output_shape=tuple(count), order=1, mode="nearest", output=np.float32
    )
    back = ndimage.affine_transform(
        series, inverse, offset=-inverse @ origin, output_shape=voxels.shape, order=1, mode="nearest", output=np.float32
    )
    return np.asarray(back)


def _rotation(caudal: float, posterior: float, left: float) -> Vec:
    """Turns about the (caudal, posterior, left) axes, in radians."""
    ca, sa, cb, sb, cc, sc = (f(a) for a in (caudal, posterior, left) for f in (np.cos, np.sin))
    about_caudal = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_posterior = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_left = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return np.asarray(about_caudal @ about_posterior @ about_left)
