"""The same vertebra with another trabecular density, and what that does to its BMD.

Among patients density goes along with thin cortex and coarse texture, so a network may read those instead of the
trabecular bone. The simulator knows the cause: `train.truth.SBMD_PER_MG` g/cm2 for every mg/cm3 of the core, whatever
the shell looks like. Training on vertebrae whose core alone was changed teaches that slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from osteo_daemon.phantom.calibration import SLOPE_120_HU_PER_MG_CM3, kvp_ratio
from train.truth import SBMD_PER_MG

F32 = npt.NDArray[np.float32]

CHANGE_MG_CM3: Final = (-50.0, 60.0)
LEAST_MG_CM3: Final = 12.0
_PARTIAL: Final = 0.4
"""Share of changes inside an ellipsoid only, as a reader would draw it, instead of the whole core."""
_RADII_MM: Final = ((8.5, 11.0), (9.5, 13.0), (13.0, 19.0))
"""Half axes (caudal, posterior, left) of that ellipsoid."""
_TEXTURE: Final = 0.5
"""Share of changes that scale the texture with the density, as more bone would; the rest adds a constant."""
_SCALE: Final = (0.6, 1.6)


@dataclass(frozen=True, slots=True)
class DensityChange:
    """A change of the trabecular core.

    Attributes:
        mg_cm3: added density.
        texture_scale: factor on the core's fluctuation around its mean.
        radii_mm: half axes of the changed ellipsoid; None changes the whole core.
    """

    mg_cm3: float
    texture_scale: float = 1.0
    radii_mm: tuple[float, float, float] | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, density_mg_cm3: float) -> DensityChange:
        """A random change for a vertebra of this density."""
        low = max(CHANGE_MG_CM3[0], LEAST_MG_CM3 - density_mg_cm3)
        change = float(rng.uniform(min(low, 0.0), CHANGE_MG_CM3[1]))
        scale = 1.0
        if rng.random() < _TEXTURE:
            scale = float(np.clip((density_mg_cm3 + change) / max(density_mg_cm3, LEAST_MG_CM3), *_SCALE))
        radii = tuple(float(rng.uniform(*limits)) for limits in _RADII_MM)
        return cls(change, scale, (radii[0], radii[1], radii[2]) if rng.random() < _PARTIAL else None)

    @property
    def sbmd_g_cm2(self) -> float:
        """What the change adds to the sBMD."""
        return SBMD_PER_MG * self.mg_cm3

    def apply(self, hu: F32, core: F32, kvp: float, spacing_mm: float) -> F32:
        """Change one VOI.

        Args:
            hu: (D, H, W) HU.
            core: (D, H, W) share of trabecular bone in each voxel, 0 to 1.
            kvp: of the scan: a voltage sees density at its own slope.
            spacing_mm: of the voxels.
        """
        if self.radii_mm is not None:
            core = core * _ellipsoid(hu.shape, self.radii_mm, spacing_mm)
        added = np.float32(self.mg_cm3 * SLOPE_120_HU_PER_MG_CM3 * kvp_ratio(kvp))
        changed = hu + core * added
        total = float(core.sum())
        if self.texture_scale != 1.0 and total > 0:
            mean = np.float32((core * hu).sum() / total)
            changed += np.float32(self.texture_scale - 1.0) * core * (hu - mean)
        return np.asarray(changed, dtype=np.float32)


def _ellipsoid(shape: tuple[int, ...], radii_mm: tuple[float, float, float], spacing_mm: float) -> F32:
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    parts = [
        ((axis - (n - 1) / 2.0) * spacing_mm / radius) ** 2
        for axis, n, radius in zip(axes, shape, radii_mm, strict=True)
    ]
    return np.asarray((parts[0] + parts[1] + parts[2]) <= 1.0, dtype=np.float32)
