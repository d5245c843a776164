"""Any orientation and spacing lands on the same canonical grid."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.canonical import resample_canonical

CPU = torch.device("cpu")
BALL_LPS_MM = np.array([12.0, -20.0, 31.0])
CUBE_LPS_MM = np.array([-40.0, 25.0, -30.0])


def scene(affine: npt.NDArray[np.float64], shape: tuple[int, int, int]) -> CtVolume:
    """A box of water with a dense ball and, elsewhere, a denser cube: no symmetry of the box maps it to itself."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    places = index @ affine[:3, :3].T + affine[:3, 3]
    hu = np.full(shape, -1000.0, dtype=np.float32)
    hu[(np.abs(places) < [80, 70, 90]).all(axis=-1)] = 0.0
    hu[np.linalg.norm(places - BALL_LPS_MM, axis=-1) < 14] = 300.0
    hu[(np.abs(places - CUBE_LPS_MM) < 12).all(axis=-1)] = 900.0
    return CtVolume(hu, affine)


def grid(spacing: tuple[float, float, float], order: tuple[int, int, int], signs: tuple[int, int, int]) -> CtVolume:
    """The scene sampled with array axes that run along the given LPS axes."""
    half = np.array([100.0, 90.0, 110.0])
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    shape = []
    for array_axis, (lps_axis, sign) in enumerate(zip(order, signs, strict=True)):
        affine[lps_axis, array_axis] = sign * spacing[array_axis]
        affine[lps_axis, 3] = -sign * half[lps_axis]
        shape.append(int(2 * half[lps_axis] / spacing[array_axis]) + 1)
    return scene(affine, (shape[0], shape[1], shape[2]))


def centres(canonical_hu: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Canonical indices of the ball's and the cube's centre: two separate dense parts, the cube the denser one."""
    labels, count = ndimage.label(canonical_hu > 150)
    assert count == 2
    first, second = sorted((1, 2), key=lambda part: float(canonical_hu[labels == part].max()))
    return np.argwhere(labels == first).mean(axis=0), np.argwhere(labels == second).mean(axis=0)


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (1.0, 0.9, 0.9), (5.0, 1.1, 1.1), (2.0, 2.0, 7.0)])
def test_points_keep_their_place_whatever_the_spacing(spacing: tuple[float, float, float]) -> None:
    canonical = resample_canonical(grid(spacing, (2, 1, 0), (1, 1, 1)), 3.0, CPU)
    ball, cube = centres(canonical.hu)
    assert canonical.to_lps(ball) == pytest.approx(BALL_LPS_MM, abs=1.5)
    assert canonical.to_lps(cube) == pytest.approx(CUBE_LPS_MM, abs=1.5)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
def test_points_keep_their_place_whatever_the_orientation(order: tuple[int, int, int]) -> None:
    for signs in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1)):
        canonical = resample_canonical(grid((2.5, 2.0, 3.0), order, signs), 3.0, CPU)
        ball, cube = centres(canonical.hu)
        assert canonical.to_lps(cube) == pytest.approx(CUBE_LPS_MM, abs=1.5)
        # axes run cranial, posterior, left: the ball lies above, in front of and to the left of the cube
        assert ball[0] > cube[0] + 15
        assert ball[1] < cube[1] - 10
        assert ball[2] > cube[2] + 12


def test_an_oblique_gantry_is_undone() -> None:
    tilt = np.radians(20)
    affine = np.eye(4)
    affine[:3, 0] = 3 * np.array([0, 0, 1.0])
    affine[:3, 1] = 2 * np.array([0, np.cos(tilt), np.sin(tilt)])
    affine[:3, 2] = 2 * np.array([1.0, 0, 0])
    affine[:3, 3] = -(affine[:3, :3] @ [45, 55, 50])
    canonical = resample_canonical(scene(affine, (91, 111, 101)), 3.0, CPU)
    assert canonical.to_lps(centres(canonical.hu)[0]) == pytest.approx(BALL_LPS_MM, abs=1.5)


def test_corners_outside_an_oblique_scan_are_air_that_was_not_seen() -> None:
    tilt = np.radians(30)
    affine = np.eye(4)
    affine[:3, :3] = 3 * np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    canonical = resample_canonical(CtVolume(np.full((40, 40, 40), 50.0, np.float32), affine), 3.0, CPU)
    assert 0.4 < canonical.seen.mean() < 0.9
    assert (canonical.hu[~canonical.seen] == -1000).all()
    assert (canonical.hu[canonical.seen] > 0).all()


def test_the_air_around_the_patient_is_cut_off_and_the_affine_follows() -> None:
    canonical = resample_canonical(grid((3.0, 3.0, 3.0), (2, 1, 0), (1, 1, 1)), 3.0, CPU)
    extent = np.array(canonical.hu.shape) * 3.0
    assert (extent <= [180 + 36, 140 + 36, 160 + 36]).all()
    point = np.array([3, 4, 5])
    assert canonical.affine @ [*point, 1] == pytest.approx([*canonical.to_lps(point), 1])


def test_a_broken_affine_is_refused_before_it_costs_memory() -> None:
    singular = np.eye(4)
    singular[2, 2] = 0
    with pytest.raises(ValueError, match="singular"):
        resample_canonical(CtVolume(np.zeros((4, 4, 4), np.float32), singular), 3.0, CPU)
    huge = np.diag([5000.0, 5000.0, 5000.0, 1.0])
    with pytest.raises(ValueError, match="voxels"):
        resample_canonical(CtVolume(np.zeros((10, 10, 10), np.float32), huge), 3.0, CPU)
