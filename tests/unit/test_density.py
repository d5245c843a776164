"""The trabecular region and its numbers on a vertebral body of known shape and density."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference import density
from osteo_daemon.inference.density import measure

UPRIGHT = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # caudal, posterior, left
HALF_HEIGHT, HALF_DEPTH, HALF_WIDTH = 14.0, 16.0, 22.0
CORTEX_MM = 1.5


def _inside(points: np.ndarray, axes: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """An elliptic cylinder about the origin; ``margin`` shrinks it."""
    along, back, left = (points @ axis for axis in axes)
    radial = (back / (HALF_DEPTH - margin)) ** 2 + (left / (HALF_WIDTH - margin)) ** 2
    return (np.abs(along) <= HALF_HEIGHT - margin) & (radial <= 1.0)


def _grid_points(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def _scan(
    columns: np.ndarray, axes: np.ndarray, trabecular_hu: float = 120.0, noise: float = 0.0
) -> tuple[CtVolume, Region]:
    """A body with a cortex of 400 HU in soft tissue of 40 HU on the grid with these index steps (mm, LPS)."""
    steps = np.linalg.norm(columns, axis=0)
    shape = tuple(int(np.ceil(70.0 / step)) for step in steps)
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = -columns @ (np.array(shape) - 1) / 2
    points = _grid_points(affine, shape)
    voxels = np.full(shape, 40.0)
    voxels[_inside(points, axes)] = 400.0
    voxels[_inside(points, axes, CORTEX_MM)] = trabecular_hu
    voxels += np.random.default_rng(3).normal(0, noise, shape) if noise else 0.0
    mask_affine = np.diag([1.5, 1.5, 1.5, 1.0])[[2, 1, 0, 3]].astype(float)
    mask_affine[:3, 3] = -40.0
    mask = _inside(_grid_points(mask_affine, (54, 54, 54)), axes)
    return CtVolume(voxels.astype(np.float32), affine), Region(mask, mask_affine)


def _axial(dz: float, dy: float, dx: float) -> np.ndarray:
    return np.array([[0.0, 0.0, dx], [0.0, dy, 0.0], [dz, 0.0, 0.0]])


def _tilted(degrees: float, dz: float = 3.0) -> np.ndarray:
    angle = np.radians(degrees)
    return np.array([[0, 0, 0.8], [0, 0.8 * np.cos(angle), 0], [dz, 0.8 * np.sin(angle), 0]])


GRIDS = {
    "1 mm": _axial(1, 1, 1),
    "5 mm slices": _axial(5, 0.9, 0.9),
    "feet first": _axial(-2.5, 0.8, -0.8),
    "prone": _axial(2.5, -0.8, -0.8),
    "sagittal": np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.7], [0.0, -0.7, 0.0]]),
    "gantry tilt": _tilted(18.5),
}


@pytest.mark.parametrize("name", GRIDS)
def test_attenuation_does_not_depend_on_the_grid(name: str) -> None:
    volume, body = _scan(GRIDS[name], UPRIGHT)
    found = measure(volume, body, UPRIGHT)
    assert found.attenuation is not None
    assert found.attenuation.mean == pytest.approx(120.0, abs=0.5)
    reference = measure(*_scan(GRIDS["1 mm"], UPRIGHT), UPRIGHT)
    assert reference.attenuation is not None
    assert found.attenuation.volume_mm3 == pytest.approx(reference.attenuation.volume_mm3, rel=0.12)
    assert found.body.volume_mm3 == pytest.approx(body.volume_mm3, rel=0.08)  # 28 mm in 5 mm slices


@pytest.mark.parametrize("degrees", [-25, 25])
def test_a_tilted_vertebra(degrees: float) -> None:
    angle = np.radians(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    axes = UPRIGHT @ turn.T
    found = measure(*_scan(GRIDS["5 mm slices"], axes), axes)
    assert found.attenuation is not None
    assert found.attenuation.mean == pytest.approx(120.0, abs=0.5)


def test_region_keeps_its_distance_and_leaves_the_veins_out() -> None:
    volume, body = _scan(GRIDS["1 mm"], UPRIGHT)
    found = measure(volume, body, UPRIGHT)
    points = np.argwhere(found.trabecular.mask) @ found.trabecular.affine[:3, :3].T + found.trabecular.affine[:3, 3]
    assert np.abs(points[:, 2]).max() <= HALF_HEIGHT - density.EROSION_MM + 1.0
    assert _inside(points, UPRIGHT, density.EROSION_MM - 1.0).all()
    assert points[:, 1].max() <= HALF_DEPTH - density.POSTERIOR_SHARE * 2 * HALF_DEPTH + 1.5


def test_dense_island_is_left_out() -> None:
    volume, body = _scan(GRIDS["1 mm"], UPRIGHT, noise=25.0)
    clean = measure(volume, body, UPRIGHT)
    island = volume.voxels.copy()
    island[33:37, 33:37, 33:37] = 600.0
    found = measure(CtVolume(island, volume.affine), body, UPRIGHT)
    assert clean.attenuation is not None
    assert found.attenuation is not None
    assert found.attenuation.mean == pytest.approx(clean.attenuation.mean, abs=1.0)
    assert clean.attenuation.sd == pytest.approx(25.0, rel=0.05)
    assert clean.standard_error_hu == pytest.approx(25.0 / clean.voxel_count**0.5, rel=0.15)
    assert clean.attenuation.voxel_count == clean.voxel_count == np.count_nonzero(clean.trabecular.mask)
    assert clean.attenuation.standard_error == pytest.approx(clean.standard_error_hu, abs=0.01)


@pytest.mark.parametrize("blur_mm", [0.0, 1.0, 1.6])
def test_standard_error_is_that_of_repeated_scans(blur_mm: float) -> None:
    """Many noise realisations with known correlation: the spread of the means is what one scan's error must say."""
    step = (2.5, 0.9, 0.9)
    affine = np.diag([*step, 1.0])
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip((11, 36, 48), step, strict=True)), indexing="ij"
    )
    region = (np.abs(z) < 9) & ((y / 11) ** 2 + (x / 17) ** 2 < 1)
    rng = np.random.default_rng(11)
    means, claimed = [], []
    for _ in range(60):
        noise = ndimage.gaussian_filter(rng.standard_normal(region.shape), [0.0, blur_mm / 0.9, blur_mm / 0.9])
        noise *= 30.0 / noise.std()
        means.append(float(noise[region].mean()))
        claimed.append(density.standard_error(noise + 150.0, region, affine))
    assert np.mean(claimed) == pytest.approx(np.std(means), rel=0.25)
    independent = 30.0 / np.count_nonzero(region) ** 0.5
    assert np.mean(claimed) > (2.0 if blur_mm else 0.95) * independent


def test_a_vein_a_thick_cortex_and_a_dense_rim_do_not_move_the_number() -> None:
    volume, body = _scan(GRIDS["1 mm"], UPRIGHT, noise=20.0)
    points = _grid_points(volume.affine, volume.voxels.shape)
    clean = measure(volume, body, UPRIGHT).attenuation
    assert clean is not None
    vein = volume.voxels.copy()
    # a flat funnel from the posterior wall towards the middle, filled with blood
    funnel = (points[..., 1] > 0.2 * HALF_DEPTH) & (np.abs(points[..., 2]) < 3.5) & (np.abs(points[..., 0]) < 8.0)
    vein[funnel & _inside(points, UPRIGHT, CORTEX_MM)] = 30.0
    found = measure(CtVolume(vein, volume.affine), body, UPRIGHT).attenuation
    assert found is not None
    assert found.median == pytest.approx(clean.median, abs=1.5)
    assert found.mean == pytest.approx(clean.mean, abs=3.0)
    whole = vein[_inside(points, UPRIGHT, density.EROSION_MM)]
    assert whole.mean() < clean.mean - 5.0  # without leaving the back out it would have moved
    rim = volume.voxels.copy()
    rim[_inside(points, UPRIGHT) & ~_inside(points, UPRIGHT, 4.0)] = 500.0
    found = measure(CtVolume(rim, volume.affine), body, UPRIGHT).attenuation
    assert found is not None
    assert found.mean == pytest.approx(clean.mean, abs=0.5)


def test_a_mask_on_thick_slices_is_eroded_by_millimetres_too() -> None:
    """A segmentation on the scan's own 5 mm or tilted slices: the region keeps its distance from the true surface."""
    for columns in (_axial(5, 0.9, 0.9), _tilted(18.5)):
        volume, _ = _scan(columns, UPRIGHT)
        fine, _ = _scan(GRIDS["1 mm"], UPRIGHT)
        mask = _inside(_grid_points(volume.affine, volume.voxels.shape), UPRIGHT)
        found = measure(fine, Region(mask, volume.affine), UPRIGHT)
        points = np.argwhere(found.trabecular.mask) @ fine.affine[:3, :3].T + found.trabecular.affine[:3, 3]
        half_slice = float(np.abs(columns[2]).max()) / 2
        assert np.abs(points[:, 2]).max() == pytest.approx(HALF_HEIGHT - density.EROSION_MM, abs=half_slice + 0.6)
        assert np.abs(points[:, 0]).max() == pytest.approx(HALF_WIDTH - density.EROSION_MM, abs=1.5)


def _turn(angles: tuple[float, float, float]) -> np.ndarray:
    return Rotation.from_euler("xyz", angles, degrees=True).as_matrix()


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    body_angles=st.tuples(st.floats(-30, 30), st.floats(-25, 25), st.floats(-180, 180)),
    grid_angles=st.tuples(st.floats(-180, 180), st.floats(-80, 80), st.floats(-180, 180)),
    spacing=st.tuples(st.floats(0.8, 5.0), st.floats(0.7, 1.2), st.floats(0.7, 1.2)),
    shift=st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3)),
    tilt=st.floats(-25, 25),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_pose_on_any_grid(body_angles, grid_angles, spacing, shift, tilt, flips) -> None:
    """A body that grows denser from one end to the other, on a sheared, turned, mirrored, uneven grid.

    The expected mean is the field's own mean over the eroded shape, taken on a fine grid: a region that is shifted,
    tilted or eroded by the wrong distance reads another number.
    """
    turn = _turn(body_angles)
    axes = UPRIGHT @ turn.T
    columns = _turn(grid_angles) @ np.diag([*spacing[::-1]])[:, ::-1]
    columns = columns * np.where(flips, -1.0, 1.0)
    columns[:, 0] += np.tan(np.radians(tilt)) * spacing[0] * columns[:, 1] / spacing[1]
    steps = np.linalg.norm(columns, axis=0)
    shape = tuple(int(np.ceil(58.0 / step)) for step in steps)
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = np.array(shift) - columns @ (np.array(shape) - 1) / 2
    slope = np.array([2.0, 1.0, 1.5])  # HU a millimetre along caudal, posterior, left of the body
    points = _grid_points(affine, shape)
    inside = _inside(points, axes)
    voxels = np.where(inside, 400.0, 40.0)
    core = _inside(points, axes, CORTEX_MM)
    voxels[core] = 150.0 + (points[core] @ axes.T) @ slope
    mask_affine = np.diag([1.0, 1.0, 1.0, 1.0])
    mask_affine[:3, 3] = -35.0 + 0.37
    body = Region(_inside(_grid_points(mask_affine, (70, 70, 70)), axes), mask_affine)
    found = measure(CtVolume(voxels.astype(np.float32), affine), body, axes).attenuation
    local = np.stack(np.meshgrid(*([np.arange(-24.5, 25, 1.0)] * 3), indexing="ij"), axis=-1)
    eroded = _inside(local, np.eye(3), density.EROSION_MM)
    eroded &= local[..., 1] <= HALF_DEPTH * (1 - 2 * density.POSTERIOR_SHARE)
    expected = 150.0 + (local[eroded] @ slope).mean()
    assert found is not None
    assert found.mean == pytest.approx(expected, abs=0.45 * spacing[0] + 1.5)
    assert found.median == pytest.approx(150.0 + np.median(local[eroded] @ slope), abs=0.6 * spacing[0] + 2.0)
    assert found.volume_mm3 == pytest.approx(np.count_nonzero(eroded), rel=0.05 * spacing[0] + 0.1)


def test_a_sliver_gives_no_number() -> None:
    volume, body = _scan(GRIDS["1 mm"], UPRIGHT)
    sliver = Region(body.mask & (np.arange(54)[:, None, None] == 27), body.affine)
    found = measure(volume, sliver, UPRIGHT)
    assert found.attenuation is None
    assert [flag.code for flag in found.quality_flags] == ["region_too_small"]


def test_body_at_the_edge_of_the_scan_uses_what_is_there() -> None:
    volume, body = _scan(GRIDS["1 mm"], UPRIGHT)
    cut = CtVolume(volume.voxels[35:], volume.affine @ _shift(35))
    found = measure(cut, body, UPRIGHT)
    assert found.attenuation is not None
    assert found.attenuation.mean == pytest.approx(120.0, abs=0.5)
    assert found.body.mask.shape[0] <= cut.voxels.shape[0]


def _shift(slices: int) -> np.ndarray:
    shift = np.eye(4)
    shift[0, 3] = slices
    return shift


def test_every_grid_is_another_one() -> None:
    assert not any(np.allclose(a, b) for a, b in itertools.combinations(GRIDS.values(), 2))
