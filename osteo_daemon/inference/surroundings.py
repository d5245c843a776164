"""The patient within the field of view: air outside, adipose and lean tissue inside, what the edge cuts off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.imaging.decoding import LOWEST_HU
from osteo_daemon.imaging.volume import CtVolume

MAXIMUM_SLICES = 48
SAMPLE_STEP_MM = 2.0

_AIR_TO_TISSUE_HU = 400.0  # the two sides of a threshold differ by more where air is in view; fat and muscle by 150
_MINIMUM_VOXELS = 3000
_AIR_MARGIN_MM = 6.0  # from the skin, where voxels hold both
_FAT_DEPTH_MM = (4.0, 15.0)  # below the surface: skin is 2 mm thick
_FAT_HALF_WIDTH_HU = 40.0  # about the histogram's peak
_FAT_TO_LEAN_HU = (90.0, 230.0)  # about 150; from a scale of 0.6 to 1.5
_LEAN_HU = (-10.0, 150.0)  # peaks of lean tissue on a right scale: between fatty muscle and enhanced organs
_TRUE_AIR_HU, _TRUE_FAT_HU = -1000.0, -105.0
_HIGHEST_FAT_HU = -20.0  # without air to compare with: fluid in a patient without fat is not called fat
_FAT_SHARE = 0.1  # of the ring below the skin
_PEAK_SHARE = 0.08  # of the highest peak: lower ones are noise
_TABLE_MM = 5.0  # a table's shell is thinner than twice this
_CONTACT_MM = 25.0
"""The patient touches the field's edge when this much of the outline lies on it."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a scan shows around the spine; a value is None where there is nothing to measure it on.

    Attributes:
        air_hu: most frequent attenuation of the air outside the patient, padding left out.
        fat_hu: attenuation of even adipose tissue, under the skin where there is enough.
        lean_hu: most frequent attenuation of lean tissue, the landmark above the fat; enhanced organs move it.
        truncated_share: share of the slices in which the field of view cuts the patient off at a side.
    """

    air_hu: float | None
    fat_hu: float | None
    lean_hu: float | None
    truncated_share: float


def survey(volume: CtVolume) -> Surroundings:
    """Measure air, fat and lean tissue and see where the patient reaches the edge of the field of view.

    Nothing here assumes that the HU scale is right: air is the darker side of the histogram that reaches the border of
    the field, fat is the lower of two peaks of tissue that lie about 150 HU apart.

    Args:
        volume: the scan; H and W are taken as the plane of acquisition.
    """
    steps = (
        max(1, volume.voxels.shape[0] // MAXIMUM_SLICES),
        max(1, int(SAMPLE_STEP_MM / volume.spacing_mm[1])),
        max(1, int(SAMPLE_STEP_MM / volume.spacing_mm[2])),
    )
    sample = np.asarray(volume.voxels[:: steps[0], :: steps[1], :: steps[2]], dtype=np.float32)
    pixel_mm = float(np.mean([volume.spacing_mm[1] * steps[1], volume.spacing_mm[2] * steps[2]]))
    padding = (sample.max(axis=0) == sample.min(axis=0)) & (sample[0] <= LOWEST_HU)
    field = np.broadcast_to(~padding, sample.shape)
    threshold = _air_threshold(sample[field])
    if threshold is None:
        fat, lean = _fat_and_lean(sample, field, None, None, pixel_mm)
        return Surroundings(None, fat, lean, float(field.any(axis=(1, 2)).mean()))
    dark = (sample < threshold) & field
    outside = _touching_the_edge(dark, padding)
    body = field & ~outside
    air = _air(sample, outside, pixel_mm)
    fat, lean = _fat_and_lean(sample, body & (sample >= threshold), body, air, pixel_mm)
    return Surroundings(air, fat, lean, _truncated_share(body & (sample >= threshold), padding, pixel_mm))


def _air_threshold(values: npt.NDArray[np.floating]) -> float | None:
    """Between air and tissue (Otsu 1979: the threshold with the largest variance between its sides), or None."""
    if values.size < _MINIMUM_VOXELS:
        return None
    histogram, edges = np.histogram(np.clip(values, -3000, 3000), bins=400)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(histogram).astype(np.float64)
    above = below[-1] - below
    total = np.cumsum(histogram * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = total / below, (total[-1] - total) / above
        between = np.nan_to_num(below * above * (high - low) ** 2)
    best = int(np.argmax(between))
    if high[best] - low[best] < _AIR_TO_TISSUE_HU:
        return None
    return float(edges[best + 1])


def _touching_the_edge(dark: npt.NDArray[np.bool_], padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Dark areas that reach the edge of the field within their slice: air outside, not lungs or bowel."""
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = [[False, True, False], [True, True, True], [False, True, False]]
    labels, count = ndimage.label(dark, structure=in_plane)
    reached = np.zeros(count + 1, dtype=bool)
    reached[np.unique(labels[:, _rim(padding)])] = True
    reached[0] = False
    return np.asarray(reached[labels])


def _rim(padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(H, W) pixels at the edge of the field: beside padding or at the border of the image."""
    framed = np.pad(padding, 1, constant_values=True)
    return np.asarray(ndimage.binary_dilation(framed, iterations=2)[1:-1, 1:-1] & ~padding)


def _air(sample: npt.NDArray[np.float32], outside: npt.NDArray[np.bool_], pixel_mm: float) -> float | None:
    reach = max(1, round(_AIR_MARGIN_MM / pixel_mm))
    plane = np.ones((1, 2 * reach + 1, 2 * reach + 1), dtype=bool)
    values = sample[ndimage.binary_erosion(outside, plane, border_value=1)]
    values = values[values != LOWEST_HU]  # padding and clipped noise; a background that was erased says nothing
    if values.size < _MINIMUM_VOXELS:
        return None
    histogram, edges = np.histogram(values, bins=np.arange(values.min() - 2, values.max() + 8, 4.0))
    smooth = ndimage.gaussian_filter1d(histogram.astype(np.float64), 2.0)
    peak = int(np.argmax(smooth))
    near = values[np.abs(values - (edges[peak] + edges[peak + 1]) / 2) <= _FAT_HALF_WIDTH_HU]
    return float(np.median(near))


def _fat_and_lean(
    sample: npt.NDArray[np.float32],
    tissue: npt.NDArray[np.bool_],
    body: npt.NDArray[np.bool_] | None,
    air_hu: float | None,
    pixel_mm: float,
) -> tuple[float | None, float | None]:
    smooth = ndimage.uniform_filter(sample, (1, 3, 3))
    values = smooth[tissue]
    if values.size < _MINIMUM_VOXELS:
        return None, None
    step = 4.0
    low, high = np.percentile(values, (0.1, 99.5))
    histogram, edges = np.histogram(values, bins=np.arange(low - step, high + 2 * step, step))
    counts = ndimage.gaussian_filter1d(histogram.astype(np.float64), 2.5)
    inner = np.flatnonzero((counts[1:-1] > counts[:-2]) & (counts[1:-1] >= counts[2:])) + 1
    peaks = [int(i) for i in inner if counts[i] >= _PEAK_SHARE * counts.max()]
    places = {i: float((edges[i] + edges[i + 1]) / 2) for i in peaks}
    pairs = [
        (counts[i] + counts[j], places[i], places[j])
        for i in peaks
        for j in peaks
        if _FAT_TO_LEAN_HU[0] <= places[j] - places[i] <= _FAT_TO_LEAN_HU[1]
        and _one_scale(air_hu, places[i], places[j])
    ]
    if not pairs:
        return None, None
    _, fat, lean = max(pairs)
    near = tissue & (np.abs(smooth - fat) <= _FAT_HALF_WIDTH_HU)
    if body is not None:
        depth = np.stack([ndimage.distance_transform_edt(plane) for plane in body]) * pixel_mm
        ring = tissue & (depth >= _FAT_DEPTH_MM[0]) & (depth <= _FAT_DEPTH_MM[1])
        skin = near & ring
        if np.count_nonzero(skin) < _FAT_SHARE * np.count_nonzero(ring):
            return None, None
        near = skin if np.count_nonzero(skin) >= _MINIMUM_VOXELS else near
    # the even half: elsewhere a voxel holds skin, septa or muscle too
    spread = ndimage.uniform_filter(sample**2, (1, 3, 3))[near] - smooth[near] ** 2
    return float(np.median(smooth[near][spread <= np.median(spread)])), lean


def _one_scale(air_hu: float | None, fat_hu: float, lean_hu: float) -> bool:
    """Whether one scale, right or wrong, leads from air over this fat to this lean tissue.

    Fluid and an enhanced liver lie as far apart as fat and muscle, but fluid is no fat on the scale that air begins.
    """
    if air_hu is None:
        return fat_hu < _HIGHEST_FAT_HU
    stretch = (fat_hu - air_hu) / (_TRUE_FAT_HU - _TRUE_AIR_HU)
    low, high = (air_hu + (lean - _TRUE_AIR_HU) * stretch for lean in _LEAN_HU)
    return low <= lean_hu <= high


def _truncated_share(tissue: npt.NDArray[np.bool_], padding: npt.NDArray[np.bool_], pixel_mm: float) -> float:
    reach = max(1, round(_TABLE_MM / pixel_mm))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    thick = np.stack([ndimage.binary_opening(np.pad(plane, reach, mode="edge"), disc) for plane in tissue])
    thick = thick[:, reach:-reach, reach:-reach]
    outermost = np.pad(padding, 1, constant_values=True)
    outermost = ndimage.binary_dilation(outermost)[1:-1, 1:-1] & ~padding
    contact_mm = np.count_nonzero(thick & outermost, axis=(1, 2)) * pixel_mm
    return float(np.mean(contact_mm > _CONTACT_MM))
