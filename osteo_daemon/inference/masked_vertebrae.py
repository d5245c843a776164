"""Vertebrae from masks that somebody else made: brought to the CT, cut to their bodies, measured and doubted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from osteo_daemon.domain.findings import Level, QualityFlag, Severity
from osteo_daemon.errors import VertebraeUnusable
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.body import MASK_SPACING_MM, content_flags, level_axes
from osteo_daemon.inference.body_cut import SMALLEST_BODY_MM3, CutBody, cut_body, thickest_point
from osteo_daemon.inference.canonical import CanonicalVolume, grid_affine, resample_canonical
from osteo_daemon.inference.decode import coronal_angle, flagged_column
from osteo_daemon.inference.morphometry import heights
from osteo_daemon.inference.vertebra import Localization, Vertebra

Floats = npt.NDArray[np.float64]

ANCHOR = "labels"
"""`Localization.anchor` of vertebrae whose names came with their masks."""

LARGEST_EXTENT_MM = 250.0
"""Of one vertebra with all its processes, twice over: a larger mask is something else and would take the memory."""

_CONTENT_SPACING_MM = 3.0  # grid on which metal and cement are looked for, as for the localiser
_CLOSEST_MM, _FARTHEST_MM = 12.0, 62.0  # between the centres of neighbouring bodies
_MARGIN_MM = 3.0 + MASK_SPACING_MM / 4  # a quarter: no sample falls on the face of a voxel of 1.5 or 3 mm
_LARGEST_TURN_DEGREES = 25.0
_SCOLIOSIS_DEGREES = 10.0
_BONE_HU = (-60.0, 1300.0)  # fatty marrow to cortex
_SMALLEST_BONE_SHARE = 0.9


def localize_masks(regions: Mapping[Level, Region], volume: CtVolume) -> Localization:
    """Bodies, axes, centres and flags of vertebrae that are given as masks.

    Every mask is carried to a grid of 1.5 mm along the patient's axes by its signed distance, so that a surface between
    two slices lies between them. Bodies are cut out of whole vertebrae (`body_cut`); a level whose body can't be cut is
    left out. Confidence is the share of the body that holds bone-like attenuation.

    Args:
        regions: masks of bodies or whole vertebrae, T10 to L5, each on a grid of its own.
        volume: the scan that they belong to.

    Raises:
        VertebraeUnusable: fewer than two lumbar bodies, or names that don't follow each other along the column.
    """
    canonical = resample_canonical(volume, _CONTENT_SPACING_MM, torch.device("cpu"))
    # what is smaller than any body is a fragment at the edge of the scan: it tells no direction either
    whole = {
        level: _cropped(regions[level])
        for level in Level
        if level in regions and regions[level].volume_mm3 > SMALLEST_BODY_MM3
    }
    for level, region in whole.items():
        if (_extent_mm(region) > LARGEST_EXTENT_MM).any():
            raise VertebraeUnusable(f"{level} spans more than {LARGEST_EXTENT_MM:.0f} mm")
    grids = {level: on_patient_grid(region) for level, region in whole.items()}
    guesses = {
        level: thickest_point(grid.mask, MASK_SPACING_MM) + _origin(grid) for level, grid in grids.items()
    }  # cranial to caudal, mm (z, y, x) in LPS
    _check_order(guesses)
    bodies, reasons = _cut_all(grids, {level: (guess, _along(level, guesses)) for level, guess in guesses.items()})
    # once more along the column of the bodies and level with their endplates: the thickest point of a mask that the
    # scan cuts may lie in its arch, and the line between centres leans otherwise than a body at the end of the row
    centres = {level: body.centre + _origin(grids[level]) for level, body in bodies.items()}
    again = {
        level: (centres[level], -_axes(replace(body, up=_along(level, centres)))[0][::-1])
        for level, body in bodies.items()
    }
    bodies, more = _cut_all({level: grids[level] for level in again}, again)
    if sum(level.startswith("L") for level in bodies) < 2:
        raise VertebraeUnusable("; ".join(["fewer than two lumbar bodies", *(reasons + more)[:3]]))
    vertebrae = flagged_column(
        [_vertebra(level, body, _origin(grids[level]), canonical) for level, body in reversed(bodies.items())]
    )
    flags = []
    if coronal_angle(vertebrae) > _SCOLIOSIS_DEGREES:
        flags.append(QualityFlag("scoliosis", Severity.CAUTION))
    return Localization(vertebrae=tuple(vertebrae[::-1]), flags=tuple(flags), anchor=ANCHOR)


def _cut_all(
    grids: Mapping[Level, Region], starts: Mapping[Level, tuple[Floats, Floats]]
) -> tuple[dict[Level, CutBody], list[str]]:
    """The bodies that could be cut, and why the others could not; from a centre and a cranial direction for each."""
    bodies, reasons = {}, []
    for level, grid in grids.items():
        centre, up = starts[level]
        try:
            bodies[level] = cut_body(grid.mask, MASK_SPACING_MM, centre - _origin(grid), up)
        except VertebraeUnusable as error:
            reasons.append(f"{level}: {error.detail}")
    return bodies, reasons


def on_patient_grid(region: Region) -> Region:
    """A region, cut to its extent, on cubic voxels of 1.5 mm along the patient's axes (cranial, posterior, left)."""
    spacing = np.linalg.norm(region.affine[:3, :3], axis=0)
    padded = np.pad(region.mask, 2)
    half = float(spacing.min()) / 2
    inside = np.maximum(ndimage.distance_transform_edt(padded, sampling=spacing) - half, 0.0)
    outside = np.maximum(ndimage.distance_transform_edt(~padded, sampling=spacing) - half, 0.0)
    corners = np.array(np.meshgrid(*((-1, n) for n in region.mask.shape), indexing="ij")).reshape(3, -1).T
    lps = corners @ region.affine[:3, :3].T + region.affine[:3, 3]
    low = lps.min(axis=0) - _MARGIN_MM
    count = np.ceil((lps.max(axis=0) + _MARGIN_MM - low) / MASK_SPACING_MM).astype(int)[::-1] + 1
    affine = grid_affine(low, MASK_SPACING_MM)
    to_mask = np.linalg.inv(region.affine) @ affine
    distance = ndimage.affine_transform(
        inside - outside,
        to_mask[:3, :3],
        to_mask[:3, 3] + 2,
        output_shape=tuple(int(n) for n in count),
        order=1,
        mode="constant",
        cval=-100.0,
    )
    return Region(distance > 0, affine)


def _cropped(region: Region) -> Region:
    filled = np.argwhere(region.mask)
    begin, end = filled.min(axis=0), filled.max(axis=0) + 1
    affine = region.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ begin
    return Region(region.mask[tuple(slice(int(a), int(b)) for a, b in zip(begin, end, strict=True))], affine)


def _extent_mm(region: Region) -> Floats:
    return np.asarray(np.linalg.norm(region.affine[:3, :3], axis=0) * np.array(region.mask.shape))


def _origin(region: Region) -> Floats:
    """(3,) voxel (0, 0, 0) in mm (z, y, x)."""
    return np.asarray(region.affine[:3, 3][::-1])


def _along(level: Level, centres: Mapping[Level, Floats]) -> Floats:
    """(3,) cranial direction of the column at a level, from the centres around it."""
    order = list(centres)
    k = order.index(level)
    above, below = order[max(0, k - 1)], order[min(len(order) - 1, k + 1)]
    step = centres[above] - centres[below]
    return np.asarray(step / np.linalg.norm(step)) if above is not below else np.array([1.0, 0.0, 0.0])


def _check_order(centres: Mapping[Level, Floats]) -> None:
    """Neighbours by name must be neighbours in space, the lower name below.

    Raises:
        VertebraeUnusable: they are not.
    """
    order = list(Level)
    for (upper, above), (lower, below) in pairwise(centres.items()):
        levels = order.index(lower) - order.index(upper)
        distance = float(np.linalg.norm(above - below))
        if above[0] <= below[0] or not levels * _CLOSEST_MM < distance < levels * _FARTHEST_MM:
            raise VertebraeUnusable(f"{upper} and {lower} do not lie as their names say")


def _vertebra(level: Level, body: CutBody, origin: Floats, canonical: CanonicalVolume) -> Vertebra:
    places = np.argwhere(body.mask) * MASK_SPACING_MM
    region = _cropped(Region(body.mask, grid_affine(origin[::-1], MASK_SPACING_MM)))
    axes = _axes(body)
    up = -axes[0][::-1]
    along = (places - body.centre) @ up
    core = along[np.linalg.norm((places - body.centre) - along[:, None] * up, axis=1) < 10.0]
    core = core if len(core) else along
    top, bottom = float(core.max()) + MASK_SPACING_MM / 2, float(core.min()) - MASK_SPACING_MM / 2
    in_scan = places + origin - canonical.origin_lps_mm[::-1]
    flags, share = _checked(in_scan, body.centre + origin - canonical.origin_lps_mm[::-1], canonical)

    def lps(point: Floats) -> Floats:
        return np.asarray((point + origin)[::-1])

    return Vertebra(
        level=str(level),
        centre_lps_mm=lps(body.centre),
        axes_lps=axes,
        confidence=share,
        body_region=region,
        level_certain=True,
        height_mm=top - bottom,
        heights=heights(region, axes),
        superior_lps_mm=lps(body.centre + top * up),
        inferior_lps_mm=lps(body.centre + bottom * up),
        flags=flags,
    )


def _axes(body: CutBody) -> Floats:
    """(3, 3) rows in LPS: cranial to caudal, anterior to posterior, right to left; level with the endplates."""
    across = body.back - (body.back @ body.up) * body.up
    down, back = -body.up[::-1], across[::-1] / np.linalg.norm(across)
    axes = np.stack([down, back, np.cross(down, back)])
    places: Floats = np.argwhere(body.mask).astype(np.float64) * MASK_SPACING_MM
    turned = level_axes(places, body.centre, axes)
    return turned if turned[0] @ axes[0] > np.cos(np.radians(_LARGEST_TURN_DEGREES)) else axes


def _checked(places: Floats, centre: Floats, canonical: CanonicalVolume) -> tuple[tuple[QualityFlag, ...], float]:
    """Flags on a body's content, and the share of it that holds bone-like attenuation.

    Args:
        places, centre: (n, 3) and (3,) mm from the first voxel of ``canonical``.
    """
    index = np.rint(places / canonical.spacing_mm).astype(int)
    within = ((index >= 0) & (index < canonical.hu.shape)).all(axis=1)
    hu = canonical.hu[tuple(index[within].T)]
    share = float(np.count_nonzero((hu > _BONE_HU[0]) & (hu < _BONE_HU[1]))) / len(index)
    flags = []
    if not within.all():
        flags.append(QualityFlag("vertebra_truncated", Severity.BLOCKING))
    if within.any() and ((centre >= 0) & (centre < np.array(canonical.hu.shape) * canonical.spacing_mm)).all():
        flags += [flag for flag in content_flags(canonical, places[within], centre) if flag not in flags]
    if share < _SMALLEST_BONE_SHARE:
        flags.append(QualityFlag("mask_off_bone", Severity.BLOCKING))
    return tuple(flags), share
