"""What can be read off a CT in the same way for real and virtual patients: tissue, edges, noise, texture.

Nothing here uses labels, so that both are measured alike; every spot is found by a rule (the most even disc of a box
beside the spine), whose aim the tests check on the labels that phantoms and the labelled torso have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.imaging.volume import CtVolume

F32 = npt.NDArray[np.float32]
Vec = npt.NDArray[np.float64]

_MASK_STEP_MM: Final = 2.0
_BODY_HU: Final = -300.0
_FAT_HU: Final = (-160.0, -40.0)
_SKIN_MM: Final = 4.0  # skin and its partial volume
_SHALLOW_MM: Final = 22.0
_EDGE_HU: Final = (-820.0, -280.0)  # 20 and 80 % of the way from air to fat
_ROI_RADIUS_MM, _ROI_HALF_HEIGHT_MM = 7.0, 5.0  # of the reader's ellipsoid that the reference values come from
_RAYS_DEG: Final = (0.0, 45.0, 90.0, 135.0, 180.0)  # from the left over the front to the right
_WALL_MM: Final = (12.0, 34.0)


@dataclass(frozen=True, slots=True, eq=False)
class Upright:
    """A scan along the patient axes.

    Attributes:
        hu: (D, H, W) attenuation; D runs cranially, H posteriorly, W to the left.
        spacing_mm: along (D, H, W).
        origin_mm: (z, y, x) of the first voxel's centre.
    """

    hu: F32
    spacing_mm: Vec
    origin_mm: Vec

    def index(self, lps_mm: Vec) -> Vec:
        """(d, h, w) of an LPS point."""
        return np.asarray((lps_mm[::-1] - self.origin_mm) / self.spacing_mm)


def upright(volume: CtVolume) -> Upright:
    """Reorder and flip an axis-aligned scan.

    Raises:
        ValueError: the scan is tilted against the patient axes.
    """
    matrix = volume.affine[:3, :3]
    order = [int(np.abs(matrix[row]).argmax()) for row in (2, 1, 0)]
    steps = np.array([matrix[row, axis] for row, axis in zip((2, 1, 0), order, strict=True)])
    if sorted(order) != [0, 1, 2] or np.abs(steps).sum() < 0.999 * np.abs(matrix).sum():
        raise ValueError("the scan is tilted against the patient axes")
    hu = np.transpose(volume.voxels, order)
    origin = volume.affine[[2, 1, 0], 3].astype(np.float64)
    for axis, step in enumerate(steps):
        if step < 0:
            hu = np.flip(hu, axis)
            origin[axis] += step * (hu.shape[axis] - 1)
    return Upright(np.ascontiguousarray(hu, dtype=np.float32), np.abs(steps), origin)


def measure_tissue(scan: Upright, centres_lps_mm: Mapping[str, Vec]) -> dict[str, float]:
    """Every measure that the scan allows; HU unless the name says otherwise.

    Args:
        scan: the scan.
        centres_lps_mm: (3,) centres of vertebral bodies by level; may be empty, then only skin, fat and noise of the
            fat are measured.
    """
    found = _surface(scan)
    if not centres_lps_mm:
        return found
    upper = {level: c for level, c in centres_lps_mm.items() if level in ("T11", "T12", "L1")}
    lumbar = {level: c for level, c in centres_lps_mm.items() if level in ("L1", "L2", "L3", "L4")}
    boxes = (
        ("muscle", lumbar, (18.0, 62.0), (34.0, 72.0), 6.0, (-20.0, 110.0)),
        ("muscle", lumbar, (-62.0, -18.0), (34.0, 72.0), 6.0, (-20.0, 110.0)),
        ("blood", lumbar, (-2.0, 24.0), (-48.0, -24.0), 5.0, (15.0, 450.0)),
        ("liver", upper, (-125.0, -55.0), (-70.0, 30.0), 9.0, (25.0, 160.0)),
    )
    spots: dict[str, list[_Spot]] = {}
    for name, centres, x_mm, y_mm, radius, hu in boxes:
        for centre in centres.values():
            spot = _most_even(scan, centre, x_mm, y_mm, radius, hu)
            if spot is not None:
                spots.setdefault(name, []).append(spot)
    for name, places in spots.items():
        found[f"{name}_hu"] = float(np.median([spot.mean for spot in places]))
    even = spots.get("liver", []) + spots.get("muscle", [])
    if even:
        found |= _noise(scan, even)
    if lumbar:
        found |= _bone(scan, lumbar)
    return found


def _surface(scan: Upright) -> dict[str, float]:
    """Air, subcutaneous fat, and the width of the skin's edge."""
    step = max(1, round(_MASK_STEP_MM / scan.spacing_mm[1]))
    hu = scan.hu[:, ::step, ::step]
    labels, count = ndimage.label(ndimage.binary_opening(hu > _BODY_HU, np.ones((1, 3, 3))))
    if count == 0:
        return {}
    largest = 1 + int(np.argmax(ndimage.sum_labels(labels > 0, labels, range(1, count + 1))))
    body = np.stack([ndimage.binary_fill_holes(image) for image in labels == largest])
    depth = np.stack([ndimage.distance_transform_edt(image, scan.spacing_mm[1:] * step) for image in body])
    fat = (depth > _SKIN_MM) & (depth < _SHALLOW_MM) & (hu > _FAT_HU[0]) & (hu < _FAT_HU[1])
    inner = fat & (ndimage.uniform_filter(fat.astype(np.float32), (1, 3, 3)) > 0.99)
    found: dict[str, float] = {}
    around = (hu > -1023.0) & (hu < -900.0) & ~body
    if np.count_nonzero(around) > 1000:
        found["air_hu"] = float(np.median(hu[around]))
    if np.count_nonzero(inner) > 500:
        found["fat_hu"] = float(np.median(hu[inner]))
        found["fat_sd_hu"] = float(1.4826 * np.median(np.abs(hu[inner] - found["fat_hu"])))
    widths = list(_edge_widths(scan, body, step))
    if len(widths) >= 5:
        found["skin_edge_mm"] = float(np.median(widths))
    return found


def _edge_widths(scan: Upright, body: npt.NDArray[np.bool_], step: int) -> Iterator[float]:
    """20-80 % widths (mm) of the skin's edge, from both flanks at the body's middle, one slice in two."""
    for d in range(0, len(body), 2):
        rows = np.flatnonzero(body[d].any(axis=1))
        if rows.size < 10:
            continue
        row = int(rows[rows.size // 2])
        columns = np.flatnonzero(body[d, row])
        for column, way in ((columns[0], 1), (columns[-1], -1)):
            middle = int(column) * step
            reach = round(12.0 / scan.spacing_mm[2])
            first, last = middle - reach, middle + reach
            if first < 0 or last >= scan.hu.shape[2]:
                continue
            profile = scan.hu[d, row * step, first : last + 1][::way]
            above = np.flatnonzero(profile > _EDGE_HU[1])
            if above.size == 0 or above[0] < 2:
                continue
            rise = profile[: above[0] + 1]
            below = np.flatnonzero(rise < _EDGE_HU[0])
            if below.size == 0:
                continue
            start, end = int(below[-1]), int(above[0])
            low = start + (_EDGE_HU[0] - profile[start]) / (profile[start + 1] - profile[start])
            high = end - (profile[end] - _EDGE_HU[1]) / (profile[end] - profile[end - 1])
            yield float(high - low) * float(scan.spacing_mm[2])


@dataclass(frozen=True, slots=True)
class _Spot:
    """An even disc: slice, row and column of its middle, radius in mm, mean HU."""

    d: int
    h: int
    w: int
    radius_mm: float
    mean: float


def _most_even(
    scan: Upright, centre: Vec, x_mm: tuple[float, float], y_mm: tuple[float, float], radius_mm: float,
    hu_range: tuple[float, float],
) -> _Spot | None:  # fmt: skip
    """The disc with the least spread in a box beside a vertebra, in the slice of its centre."""
    d, h, w = scan.index(centre)
    slice_ = round(float(d))
    sy, sx = scan.spacing_mm[1:]
    rows = np.arange(round(h + y_mm[0] / sy), round(h + y_mm[1] / sy) + 1)
    columns = np.arange(round(w + x_mm[0] / sx), round(w + x_mm[1] / sx) + 1)
    rows, columns = (
        rows[(rows >= 0) & (rows < scan.hu.shape[1])],
        columns[(columns >= 0) & (columns < scan.hu.shape[2])],
    )
    if not 0 <= slice_ < len(scan.hu) or rows.size == 0 or columns.size == 0:
        return None
    margin = int(np.ceil(radius_mm / min(sy, sx))) + 1
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    image = scan.hu[slice_, top : rows[-1] + margin + 1, left : columns[-1] + margin + 1].astype(np.float64)
    disc = _disc(radius_mm, sy, sx).astype(np.float64)
    disc /= disc.sum()
    mean = ndimage.correlate(image, disc, mode="constant", cval=-1000.0)
    spread = ndimage.correlate(image**2, disc, mode="constant", cval=1e6) - mean**2
    inside = np.ix_(rows - top, columns - left)
    allowed = (mean[inside] > hu_range[0]) & (mean[inside] < hu_range[1])
    if not allowed.any():
        return None
    best = np.unravel_index(np.where(allowed, spread[inside], np.inf).argmin(), allowed.shape)
    place = rows[best[0]], columns[best[1]]
    return _Spot(slice_, int(place[0]), int(place[1]), radius_mm, float(mean[place[0] - top, place[1] - left]))


def _disc(radius_mm: float, sy: float, sx: float) -> npt.NDArray[np.bool_]:
    ny, nx = int(radius_mm / sy), int(radius_mm / sx)
    y, x = np.ogrid[-ny : ny + 1, -nx : nx + 1]
    return np.asarray((y * sy) ** 2 + (x * sx) ** 2 <= radius_mm**2)


def _noise(scan: Upright, spots: list[_Spot]) -> dict[str, float]:
    """SD of even discs beside their own plane, and the correlation of neighbours along row, column and slice."""
    sy, sx = scan.spacing_mm[1:]
    sds: list[float] = []
    across: list[float] = []
    down: list[float] = []
    next_slice: list[float] = []
    for spot in spots:
        disc = _disc(spot.radius_mm, sy, sx)
        ny, nx = disc.shape[0] // 2, disc.shape[1] // 2
        window = (slice(spot.h - ny, spot.h + ny + 1), slice(spot.w - nx, spot.w + nx + 1))
        if disc.sum() < 20 or scan.hu[spot.d][window].shape != disc.shape:
            continue
        here = _flat(scan.hu[spot.d][window], disc)
        sds.append(float(here[disc].std(ddof=3)))
        variance = float((here[disc] ** 2).mean())
        for shift, found in (((0, 1), across), ((1, 0), down)):
            both = disc[shift[0] :, shift[1] :] & disc[: disc.shape[0] - shift[0], : disc.shape[1] - shift[1]]
            one, two = here[shift[0] :, shift[1] :], here[: here.shape[0] - shift[0], : here.shape[1] - shift[1]]
            found.append(float((one * two)[both].mean()) / variance)
        if spot.d + 1 < len(scan.hu):
            above = _flat(scan.hu[spot.d + 1][window], disc)
            if above[disc].std() < 1.5 * here[disc].std():  # the same even tissue
                next_slice.append(float((here * above)[disc].mean() / (here[disc].std() * above[disc].std())))
    named = {"noise_sd_hu": sds, "noise_correlation_x": across, "noise_correlation_y": down}
    found_values = {name: float(np.median(values)) for name, values in named.items() if values}
    if len(next_slice) >= 3:
        found_values["noise_correlation_z"] = float(np.median(next_slice))
    return found_values


def _flat(image: F32, disc: npt.NDArray[np.bool_]) -> Vec:
    """An image less its best plane over a disc, zero outside it."""
    y, x = np.nonzero(disc)
    terms = np.stack([np.ones_like(y), y, x], axis=1).astype(np.float64)
    values = image[disc].astype(np.float64)
    flat = np.zeros(disc.shape)
    flat[disc] = values - terms @ np.linalg.lstsq(terms, values, rcond=None)[0]
    return flat


def _bone(scan: Upright, centres: Mapping[str, Vec]) -> dict[str, float]:
    """Trabecular mean, spread and correlation in the reader's region of interest; peak of the cortical wall."""
    means, sds, texture, walls = [], [], [], []
    lag = max(1, round(2.0 / float(scan.spacing_mm[2])))
    for centre in centres.values():
        index = scan.index(centre)
        reach = np.array([_ROI_HALF_HEIGHT_MM, _ROI_RADIUS_MM, _ROI_RADIUS_MM])
        low = np.floor(index - reach / scan.spacing_mm).astype(int)
        high = np.ceil(index + reach / scan.spacing_mm).astype(int) + 1
        if (low < 0).any() or (high > scan.hu.shape).any():
            continue
        box = scan.hu[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        grid = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1)
        roi = np.square((grid - index) * scan.spacing_mm / reach).sum(axis=-1) <= 1.0
        values = box[roi]
        means.append(float(values.mean()))
        sds.append(float(values.std(ddof=1)))
        flat = np.where(roi, box - values.mean(), 0.0)
        both = roi[..., lag:] & roi[..., :-lag]
        texture.append(float((flat[..., lag:] * flat[..., :-lag])[both].mean() / values.var()))
        walls += [_wall(scan, index, np.radians(angle)) for angle in _RAYS_DEG]
    if not means:
        return {}
    return {
        "trabecular_hu": float(np.median(means)),
        "trabecular_sd_hu": float(np.median(sds)),
        "trabecular_sd_over_mean": float(np.median(np.array(sds) / np.maximum(means, 30.0))),
        "trabecular_correlation_2mm": float(np.median(texture)),
        "cortical_peak_hu": float(np.median(walls)),
    }


def _wall(scan: Upright, index: Vec, angle: float) -> float:
    """Highest attenuation along a ray from the middle of a body through its wall."""
    along = np.arange(*_WALL_MM, 0.5)
    places = [
        np.full_like(along, index[0]),
        index[1] - along * np.sin(angle) / scan.spacing_mm[1],
        index[2] + along * np.cos(angle) / scan.spacing_mm[2],
    ]
    return float(ndimage.map_coordinates(scan.hu, places, order=1, mode="nearest").max())
