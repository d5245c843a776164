"""A CT volume with its true geometry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, eq=False)
class CtVolume:
    """CT attenuation on a regular grid.

    Attributes:
        voxels: (D, H, W) attenuation in HU.
        affine: (4, 4) maps homogeneous voxel indices ``(d, h, w, 1)`` (centre of the voxel) to LPS millimetres
            (the DICOM patient coordinate system, PS3.3 C.7.6.2.1.1). Rotation, tilt and anisotropic spacing all stand
            in it; nothing else may assume an orientation.
    """

    voxels: FloatArray
    affine: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or self.affine.shape != (4, 4):
            raise ValueError(f"need (D, H, W) voxels and a (4, 4) affine, got {self.voxels.shape} {self.affine.shape}")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along D, H and W in millimetres."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic millimetres."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def to_lps(self, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(..., 3) voxel indices (d, h, w), fractions allowed, to (..., 3) LPS millimetres."""
        points = np.asarray(index, dtype=np.float64)
        return points @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, lps_mm: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(..., 3) LPS millimetres to (..., 3) fractional voxel indices (d, h, w)."""
        points = np.asarray(lps_mm, dtype=np.float64) - self.affine[:3, 3]
        return points @ np.linalg.inv(self.affine[:3, :3]).T
