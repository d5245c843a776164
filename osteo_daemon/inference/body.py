"""The body of one vertebra: mask, axes, heights, and remarks on its shape and content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.imaging.region import Region
from osteo_daemon.inference.canonical import CanonicalVolume, grid_affine
from osteo_daemon.inference.column import DiscPlane, largest_component
from osteo_daemon.inference.morphometry import heights
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.inference.vertebra import Points, Vertebra
from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]

MASK_SPACING_MM = 1.5
_BOX_MM = 48.0  # half the edge of the box that holds any vertebral body
_METAL_HU = 1300.0  # mean of a 3 mm voxel: denser than any cortex
_METAL_MM3 = 300.0
_CEMENT_HU = 600.0  # well inside the body, where no healthy bone is as dense
_CEMENT_DEPTH_MM = 5.0
_CEMENT_MM3 = 250.0
_CORE_MM = 10.5
_LARGEST_TURN_DEGREES = 25.0  # between the planes of the discs and the body's own endplates


def body_region(
    maps: SpineMaps,
    channel: SpineClass,
    centre: Floats,
    limits: tuple[DiscPlane, DiscPlane] | None,
    canonical: CanonicalVolume,
) -> tuple[Region, Floats] | None:
    """A body's mask at 1.5 mm and its (n, 3) voxel places in the internal frame (mm, z y x); None when it is empty.

    The probability is interpolated, not the label, so the surface is finer than the network's voxels.
    """
    spacing = canonical.spacing_mm
    shape = np.array(maps.probabilities.shape[1:])
    low = np.maximum(0.0, np.floor((centre - _BOX_MM) / spacing) * spacing)
    high = np.minimum((shape - 1) * spacing, centre + _BOX_MM)
    axes = [np.arange(a, b + 1e-6, MASK_SPACING_MM) for a, b in zip(low, high, strict=True)]
    if any(len(axis) < 2 for axis in axes):
        return None
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    first = np.floor(low / spacing).astype(int)
    last = np.ceil(high / spacing).astype(int) + 1
    window = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    index = np.moveaxis(places / spacing - first, -1, 0)
    probability = ndimage.map_coordinates(maps.probabilities[channel][window], index, order=1, mode="constant")
    mask = probability > 0.5
    if limits is not None:
        mask &= (limits[0].distance(places) > 0) & (limits[1].distance(places) < 0)
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(mask))
    mask = largest_component(mask)
    if not mask.any():
        return None
    inside = np.argwhere(mask)
    begin, end = inside.min(axis=0), inside.max(axis=0) + 1
    cut = mask[begin[0] : end[0], begin[1] : end[1], begin[2] : end[2]]
    corner = low + begin * MASK_SPACING_MM
    origin_lps = canonical.origin_lps_mm + corner[::-1]
    return Region(np.ascontiguousarray(cut), grid_affine(origin_lps, MASK_SPACING_MM)), places[mask]


def body_axes(maps: SpineMaps, centre: Floats, up: Floats, spacing_mm: float) -> Floats:
    """(3, 3) rows cranial to caudal, anterior to posterior, right to left, in LPS; turned towards the spinal canal."""
    reach = int(42 / spacing_mm)
    index = np.round(centre / spacing_mm).astype(int)
    low = np.maximum(index - reach, 0)
    window = tuple(slice(int(a), int(b)) for a, b in zip(low, index + reach + 1, strict=True))
    canal = (np.argwhere(maps.probabilities[SpineClass.CANAL][window] > 0.5) + low) * spacing_mm
    offset = canal - centre
    near = np.abs(offset @ up) < 9.0
    back = np.array([0.0, 1.0, 0.0])
    if np.count_nonzero(near) >= 10:
        towards = offset[near].mean(axis=0)
        towards = towards - (towards @ up) * up
        towards /= np.linalg.norm(towards)
        if towards @ back > np.cos(np.radians(35)):
            back = towards
    back = back - (back @ up) * up
    back /= np.linalg.norm(back)
    down_lps, back_lps = -up[::-1], back[::-1]
    return np.stack([down_lps, back_lps, np.cross(down_lps, back_lps)])


def level_axes(places: Floats, centre: Floats, axes_lps: Floats) -> Floats:
    """Turn a body's axes (3, 3) until its mid-surface, halfway between the endplates, is level in its own frame.

    Args:
        places: (n, 3) voxel places of the mask at 1.5 mm, internal frame.
        centre: (3,) centroid of the mask, internal frame.
        axes_lps: (3, 3) from `body_axes`.
    """
    for _ in range(3):
        local = (places - centre) @ axes_lps[:, ::-1].T
        # the rims of a body that leans hold its top or its bottom only and would tilt the mid-surface
        local = local[(np.abs(local[:, 1]) < _CORE_MM) & (np.abs(local[:, 2]) < _CORE_MM)]
        cells, member = np.unique(np.round(local[:, 1:] / 3.0).astype(int), axis=0, return_inverse=True)
        member = member.ravel()
        filled = np.bincount(member)
        middle = np.bincount(member, weights=local[:, 0]) / filled
        whole = filled > 0.6 * np.median(filled)  # a cell at the edge of the core is cut
        if np.count_nonzero(whole) < 12:
            return axes_lps
        design = np.column_stack([cells[whole] * 3.0, np.ones(np.count_nonzero(whole))])
        slope, *_ = np.linalg.lstsq(design, middle[whole], rcond=None)
        down = axes_lps[0] - slope[0] * axes_lps[1] - slope[1] * axes_lps[2]
        down /= np.linalg.norm(down)
        back = axes_lps[1] - (axes_lps[1] @ down) * down
        back /= np.linalg.norm(back)
        axes_lps = np.stack([down, back, np.cross(down, back)])
    return axes_lps


def content_flags(canonical: CanonicalVolume, places: Floats, centre: Floats) -> list[QualityFlag]:
    """Metal and cement in and around a body, and a body cut by the edge of the scan."""
    spacing = canonical.spacing_mm
    shape = np.array(canonical.hu.shape)
    index = np.round(centre / spacing).astype(int)
    reach = np.array([round(v / spacing) for v in (14.0, 40.0, 32.0)])
    window = tuple(slice(max(0, int(c - r)), int(c + r + 1)) for c, r in zip(index, reach, strict=True))
    flags = []
    if np.count_nonzero(canonical.hu[window] > _METAL_HU) * spacing**3 > _METAL_MM3:
        flags.append(QualityFlag("implant", Severity.BLOCKING))
    voxels = np.clip(np.round(places / spacing).astype(int), 0, shape - 1)
    body = np.zeros(shape, dtype=bool)
    body[voxels[:, 0], voxels[:, 1], voxels[:, 2]] = True
    core = canonical.hu[window][ndimage.distance_transform_edt(body[window]) * spacing > _CEMENT_DEPTH_MM]
    if (
        core.size
        and np.count_nonzero(core > max(_CEMENT_HU, float(np.median(core)) + 300.0)) * spacing**3 > _CEMENT_MM3
    ):
        flags.append(QualityFlag("cement_or_dense_focus", Severity.BLOCKING))
    rim = np.clip(np.round(places / spacing).astype(int)[:, None] + np.array([[[-1, 0, 0], [1, 0, 0]]]), 0, shape - 1)
    rim = rim.reshape(-1, 3)
    if not canonical.seen[rim[:, 0], rim[:, 1], rim[:, 2]].all() or voxels[:, 0].max() >= shape[0] - 1:
        flags.append(QualityFlag("vertebra_truncated", Severity.BLOCKING))
    return flags


def describe_body(
    level: str,
    maps: SpineMaps,
    canonical: CanonicalVolume,
    channel: SpineClass,
    guess: Floats,
    up: Floats,
    limits: tuple[DiscPlane, DiscPlane] | None,
    confidence: float,
) -> Vertebra | None:
    """The vertebra around ``guess`` (3,) (internal frame) between two disc planes; None when the mask is empty."""
    found = body_region(maps, channel, guess, limits, canonical)
    if found is None:
        return None
    region, places = found
    centre = places.mean(axis=0)
    axes = body_axes(maps, centre, up, canonical.spacing_mm)
    if limits is not None:
        turned = level_axes(places, centre, axes)
        if turned[0] @ axes[0] > np.cos(np.radians(_LARGEST_TURN_DEGREES)):
            axes = turned
    up = -axes[0][::-1]
    along = (places - centre) @ up
    core = along[np.linalg.norm((places - centre) - along[:, None] * up, axis=1) < 10.0]
    core = core if len(core) else along
    top, bottom = float(core.max()) + MASK_SPACING_MM / 2, float(core.min()) - MASK_SPACING_MM / 2
    flags = content_flags(canonical, places, centre) if limits is not None else []
    measured = heights(region, axes) if limits is not None else None

    def lps(point: Floats) -> Points:
        return np.asarray(point[::-1] + canonical.origin_lps_mm)

    return Vertebra(
        level=level,
        centre_lps_mm=lps(centre),
        axes_lps=axes,
        confidence=confidence,
        body_region=region,
        level_certain=True,
        height_mm=top - bottom,
        heights=measured,
        superior_lps_mm=lps(centre + top * up),
        inferior_lps_mm=lps(centre + bottom * up),
        flags=tuple(flags),
    )
