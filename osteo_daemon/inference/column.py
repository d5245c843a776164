"""From voxel labels to a counted column of disc planes.

Internal frame: millimetres on the canonical grid, ordered (z, y, x), voxel (0, 0, 0) at the origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from osteo_daemon.inference.centreline import SMALLEST_S1_MM3, Profile, sample_profile, trace_from_below, trace_from_s1
from osteo_daemon.inference.counting import agreement_of, count_discs
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.network.localizer import SpineClass

Floats = npt.NDArray[np.float64]

_MAX_DISC_TILT_DEGREES = 30.0  # against the centre line


@dataclass(frozen=True, slots=True, eq=False)
class DiscPlane:
    """The middle of a disc: point and cranial unit normal."""

    point: Floats
    normal: Floats

    def distance(self, points: Floats) -> Floats:
        """Signed distance of (..., 3) points in mm, positive above."""
        return np.asarray((points - self.point) @ self.normal)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A counted column.

    Attributes:
        profile: along the centre line.
        discs: planes from the lowest upwards (L5-S1 where the column stands on S1); vertebra k lies between planes k
            and k + 1.
        agreement: (n vertebrae,) how far phase, discs and body each bear the count out; the least of them, at most 1.
        gaps_mm: (n vertebrae,) distance between the planes along the centre line.
    """

    profile: Profile
    discs: tuple[DiscPlane, ...]
    agreement: Floats
    gaps_mm: Floats


def largest_component(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a mask; empty when the mask is."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == int(sizes.argmax()))


def find_s1(maps: SpineMaps, spacing_mm: float) -> npt.NDArray[np.bool_] | None:
    """The body of S1 as a mask on the canonical grid, or None when none is large enough to anchor names."""
    s1 = largest_component(maps.probabilities[SpineClass.S1_BODY] > 0.5)
    return s1 if np.count_nonzero(s1) * spacing_mm**3 >= SMALLEST_S1_MM3 else None


def _disc_plane(maps: SpineMaps, point: Floats, tangent: Floats, spacing_mm: float) -> DiscPlane:
    """The plane of a disc: through the centre line, in the main plane of the disc's own voxels where these tell."""
    index = np.round(point / spacing_mm).astype(int)
    reach = int(30 / spacing_mm)
    low = np.maximum(index - reach, 0)
    window = tuple(slice(int(a), int(b)) for a, b in zip(low, index + reach + 1, strict=True))
    disc = maps.probabilities[SpineClass.DISC][window]
    places = (np.argwhere(disc > 0.4) + low) * spacing_mm
    offset = places - point
    along = offset @ tangent
    near = (np.abs(along) < 9.0) & (np.linalg.norm(offset - along[:, None] * tangent, axis=1) < 28.0)
    if np.count_nonzero(near) * spacing_mm**3 < 1500.0:
        return DiscPlane(point, tangent)
    cloud = places[near]
    _, _, axes = np.linalg.svd(cloud - cloud.mean(axis=0), full_matrices=False)
    normal = axes[2] * np.sign(axes[2] @ tangent)
    return DiscPlane(point, normal if normal @ tangent > np.cos(np.radians(_MAX_DISC_TILT_DEGREES)) else tangent)


def count_column(maps: SpineMaps, s1: npt.NDArray[np.bool_] | None, spacing_mm: float) -> Column | None:
    """Trace and count the column that stands on S1, or without S1 the largest in view; None when there is none."""
    points = trace_from_below(maps, spacing_mm) if s1 is None else trace_from_s1(maps, s1, spacing_mm)
    if points is None:
        return None
    profile = sample_profile(maps, points, spacing_mm)
    stations = count_discs(profile, on_s1=s1 is not None)
    if stations is None:
        return None
    return Column(
        profile=profile,
        discs=tuple(_disc_plane(maps, profile.points[s], profile.tangents[s], spacing_mm) for s in stations),
        agreement=agreement_of(profile, stations),
        gaps_mm=np.diff(np.array(stations, dtype=np.float64)),
    )
