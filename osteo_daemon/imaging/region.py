"""A region of a volume: a boolean mask on a small grid with its own affine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A set of voxels.

    Attributes:
        mask: (d, h, w) True inside.
        affine: (4, 4) homogeneous voxel index (d, h, w, 1) of this small grid to LPS millimetres.
    """

    mask: npt.NDArray[np.bool_]
    affine: npt.NDArray[np.float64]

    @property
    def volume_mm3(self) -> float:
        """Volume of the voxels inside in cubic millimetres."""
        return float(np.count_nonzero(self.mask) * abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def centre_lps_mm(self) -> npt.NDArray[np.float64]:
        """(3,) centroid of the voxels inside in LPS millimetres."""
        index = np.argwhere(self.mask).mean(axis=0)
        return np.asarray(self.affine[:3, :3] @ index + self.affine[:3, 3])
