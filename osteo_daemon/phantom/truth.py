"""What a region of a scan would read without scanner: the truth beside a measured value.

Three numbers may be called the true attenuation of a vertebra and they differ by several HU: the set mean of its whole
trabecular core (`TrueVertebra.trabecular_hu_true`), the mean and the median of the bone under exactly the voxels that
were measured, and what the patient's density says (`osteo_daemon.phantom.calibration.trabecular_hu`). The bone is
denser near the endplates and behind than in the anterior middle, and its texture is skewed, so the choice of the region
and the choice of the median each move the number; only what is left beside the truth under the region is an error of
scanner and reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osteo_daemon.phantom.canvas import Vec
from osteo_daemon.phantom.labels import core_mask
from osteo_daemon.phantom.study import PhantomStudy


@dataclass(frozen=True, slots=True)
class RegionTruth:
    """The bone under a region.

    Attributes:
        mean_hu, median_hu: of the voxels' own attenuation, before point spread, noise and miscalibration.
        core_share: share of the region within the vertebra's true trabecular core.
        voxels: of the scan, under the region.
    """

    mean_hu: float
    median_hu: float
    core_share: float
    voxels: int


def region_truth(study: PhantomStudy, level: str, mask: npt.NDArray[np.bool_], affine: Vec) -> RegionTruth:
    """True attenuation under a region.

    Args:
        study: rendered with ``ideal=True``.
        level: the vertebra whose core the region should lie in.
        mask: (D, H, W) region on a grid of its own; at least one voxel.
        affine: (4, 4) maps its indices to LPS mm.

    Raises:
        ValueError: the study keeps no ideal attenuation, the region is empty or leaves the scan.
    """
    if study.ideal_hu is None:
        raise ValueError("render the study with ideal=True")
    index = np.argwhere(mask)
    if not len(index):
        raise ValueError("the region is empty")
    lps = index @ affine[:3, :3].T + affine[:3, 3]
    place = np.rint((lps - study.affine[:3, 3]) @ np.linalg.inv(study.affine[:3, :3]).T).astype(np.intp)
    if (place < 0).any() or (place >= study.ideal_hu.shape).any():
        raise ValueError("the region leaves the scan")
    where = tuple(place.T)
    values = study.ideal_hu[where].astype(np.float64)
    core = core_mask(study.labels, level)[where]
    return RegionTruth(float(values.mean()), float(np.median(values)), float(core.mean()), len(values))


def core_truth(study: PhantomStudy, level: str) -> RegionTruth:
    """The same for the whole true core of a vertebra, on the study's own grid.

    Raises:
        ValueError: the study keeps no ideal attenuation or the core is not in it.
    """
    return region_truth(study, level, core_mask(study.labels, level), study.affine)
