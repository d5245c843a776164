"""A curved sagittal view of the spine, sampled from the volume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.dicom.outline import NativeMask
from osteo_daemon.imaging.volume import CtVolume

_VIEW_HEIGHT_MM = 300.0  # at most; less when the spine found is shorter
_VIEW_HEIGHT_MINIMUM_MM = 200.0  # shows the neighbours that tell which level it is
_VIEW_STEP_MM = 0.6
_MARGIN_MM = 35.0


@dataclass(frozen=True, slots=True, eq=False)
class SagittalView:
    """A curved sagittal reformation.

    Attributes:
        pixels: (rows, columns) HU; rows run cranial to caudal, columns anterior to posterior, square pixels of
            ``step_mm``.
        z_top_mm, y_left_mm: LPS coordinates of the first row's and column's centres.
        x_at_row_mm: (rows,) LPS x at which each row was sampled.
    """

    pixels: npt.NDArray[np.float32]
    z_top_mm: float
    y_left_mm: float
    x_at_row_mm: npt.NDArray[np.float64]
    step_mm: float = _VIEW_STEP_MM

    def points_lps(self) -> npt.NDArray[np.float64]:
        """(rows, columns, 3) LPS coordinates of the pixels' centres."""
        rows, columns = self.pixels.shape
        points = np.empty((rows, columns, 3))
        points[..., 0] = self.x_at_row_mm[:, None]
        points[..., 1] = self.y_left_mm + self.step_mm * np.arange(columns)[None, :]
        points[..., 2] = (self.z_top_mm - self.step_mm * np.arange(rows))[:, None]
        return points


def sagittal_view(volume: CtVolume, centres_lps_mm: npt.ArrayLike) -> SagittalView:
    """Reformat through vertebral centres: each height is sampled in the sagittal plane that meets the spine there.

    Only the left-right curve is straightened, so lengths and angles in the sagittal plane stay true.

    Args:
        centres_lps_mm: (n, 3) at least one centre.
    """
    centres = np.asarray(centres_lps_mm, dtype=np.float64).reshape(-1, 3)
    centres = centres[np.argsort(centres[:, 2])]
    top, bottom = centres[-1, 2] + _MARGIN_MM, centres[0, 2] - _MARGIN_MM
    height = max(min(top - bottom, _VIEW_HEIGHT_MM), _VIEW_HEIGHT_MINIMUM_MM)
    middle = (top + bottom) / 2
    rows = round(height / _VIEW_STEP_MM)
    z = middle + height / 2 - _VIEW_STEP_MM * np.arange(rows)
    width = round(height * 0.62 / _VIEW_STEP_MM)
    # the spine lies in the posterior half of the view: bodies in the middle, canal and processes behind
    y_left = float(np.median(centres[:, 1])) - 0.52 * width * _VIEW_STEP_MM
    view = SagittalView(
        pixels=np.zeros((rows, width), dtype=np.float32),
        z_top_mm=float(z[0]),
        y_left_mm=y_left,
        x_at_row_mm=np.interp(z, centres[:, 2], centres[:, 0]),
    )
    index = volume.to_index(view.points_lps())
    pixels = ndimage.map_coordinates(
        volume.voxels, np.moveaxis(index, -1, 0), order=1, mode="constant", cval=-1024.0, output=np.float32
    )
    return SagittalView(pixels, view.z_top_mm, view.y_left_mm, view.x_at_row_mm)


def region_on_view(native: NativeMask, volume: CtVolume, view: SagittalView) -> npt.NDArray[np.bool_]:
    """(rows, columns) where the view cuts a region."""
    index = np.moveaxis(volume.to_index(view.points_lps()), -1, 0)
    shifted = index - np.array(native.origin, dtype=np.float64)[:, None, None]
    padded = np.pad(native.mask, 1).astype(np.float32)
    # linear interpolation of the mask, cut at one half, rounds off the slice steps
    return np.asarray(ndimage.map_coordinates(padded, shifted + 1, order=1, mode="constant", cval=0.0) > 0.5)
