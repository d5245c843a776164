"""Boxes of the scan around a vertebra, in the vertebra's own axes, and the muscle beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.vertebra import Vertebra

Limits = tuple[float, float]

STEP_MM = 2.0

_INSIDE = 0.9  # share of a box that must lie in the scan
_HALF_HEIGHT_MM = 6.0
_PSOAS = ((-30.0, -8.0), (28.0, 44.0), frozenset({"L3", "L4"}))
_ERECTOR = ((-95.0, -70.0), (14.0, 40.0), frozenset({"L1", "L2", "L3", "L4"}))
_LEAN_ABOVE_FAT_HU = (75.0, 300.0)  # muscle lies some 150 HU above fat; bone and enhanced vessels lie higher
_FAT_HU = -105.0  # stands in when the scan shows none
_LEAN_SHARE = 0.3


def front_mm(vertebra: Vertebra) -> float:
    """Distance from a vertebra's centre forward to the front of its body."""
    inside = np.argwhere(vertebra.body_region.mask) @ vertebra.body_region.affine[:3, :3].T
    places = inside + vertebra.body_region.affine[:3, 3] - vertebra.centre_lps_mm
    return float(-np.percentile(places @ vertebra.axes_lps[1], 1))


def sample_box(
    volume: CtVolume, vertebra: Vertebra, caudal: Limits, forward: Limits, left: Limits
) -> npt.NDArray[np.float64] | None:
    """(c, f, l) attenuation on a 2 mm grid; None when the box leaves the scan.

    Args:
        volume: the scan.
        vertebra: whose axes the box follows.
        caudal, left: limits in mm from the middle of the body.
        forward: limits in mm from the front of the body; negative is behind it.
    """
    axes = vertebra.axes_lps
    origin = vertebra.centre_lps_mm - front_mm(vertebra) * axes[1]
    ranges = [np.arange(low, high + 0.1, STEP_MM) for low, high in (caudal, forward, left)]
    grid = np.stack(np.meshgrid(ranges[0], -ranges[1], ranges[2], indexing="ij"), axis=-1)
    index = volume.to_index(origin + grid @ axes)
    last = np.asarray(volume.voxels.shape) - 1
    if np.mean(((index >= 0) & (index <= last)).all(axis=-1)) < _INSIDE:
        return None
    values = ndimage.map_coordinates(volume.voxels, np.moveaxis(index, -1, 0), order=1, mode="nearest")
    return np.asarray(values, dtype=np.float64)


def muscle_hu(volume: CtVolume, vertebrae: Sequence[Vertebra], fat_hu: float | None) -> float | None:
    """Attenuation of psoas and erector spinae: the median over the boxes of each box's lean voxels.

    What is lean is told from the scan's own fat, so a scale that is off is seen as off.
    """
    low, high = ((_FAT_HU if fat_hu is None else fat_hu) + above for above in _LEAN_ABOVE_FAT_HU)
    found: list[float] = []
    for forward, side, levels in (_PSOAS, _ERECTOR):
        for left in (side, (-side[1], -side[0])):
            for vertebra in vertebrae:
                if vertebra.level not in levels:
                    continue
                values = sample_box(volume, vertebra, (-_HALF_HEIGHT_MM, _HALF_HEIGHT_MM), forward, left)
                if values is None:
                    continue
                lean = values[(values > low) & (values < high)]
                if lean.size >= _LEAN_SHARE * values.size:
                    found.append(float(np.median(lean)))
    return float(np.median(found)) if found else None
