"""How a disc stands out in the scan itself: the network draws discs by the rhythm of the column, even through bone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.inference.canonical import CanonicalVolume
from osteo_daemon.inference.column import Column

Floats = npt.NDArray[np.float64]

_RADIUS_MM = 9.5
_REACH_MM = 10  # endplates lie within this of the middle of a disc
_MIDDLE_MM = 2


def disc_contrast(canonical: CanonicalVolume, column: Column) -> Floats:
    """(n planes,) brightest endplate less darkest disc along the column's axis in HU, NaN for the outermost planes.

    Means over 19 mm across the axis. Where two bodies have grown together there is neither endplate nor disc.
    """
    contrast = np.full(len(column.discs), np.nan)
    steps = np.arange(-9.0, 9.1, 3.0)
    inside = [(u, v) for u in steps for v in steps if u * u + v * v <= _RADIUS_MM**2]
    along = np.arange(-_REACH_MM, _REACH_MM + 1)
    for k in range(1, len(column.discs) - 1):
        plane = column.discs[k]
        across = np.cross(plane.normal, [0.0, 0.0, 1.0])
        across /= np.linalg.norm(across)
        other = np.cross(plane.normal, across)
        spread = np.array([u * across + v * other for u, v in inside])
        places = plane.point + along[:, None, None] * plane.normal + spread[None]
        index = (places / canonical.spacing_mm).reshape(-1, 3).T
        values = ndimage.map_coordinates(canonical.hu, index, order=1, mode="nearest").reshape(len(along), -1)
        profile = values.mean(axis=1)
        middle = profile[_REACH_MM - _MIDDLE_MM : _REACH_MM + _MIDDLE_MM + 1]
        contrast[k] = float(profile.max() - middle.min())
    return contrast
