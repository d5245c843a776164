"""VOI extraction: true geometry under any grid, and no aliasing."""

from __future__ import annotations

import numpy as np
import pytest

from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.preprocess import SUPINE_AXES_LPS, VoiSpec, extract_voi
from osteo_daemon.imaging.volume import CtVolume

CENTRE = np.array([12.0, -31.0, 240.0])
SPEC = VoiSpec(shape=(16, 24, 32), spacing_mm=1.0)


def rotation(degrees: float, axis: int) -> np.ndarray:
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (0, 2), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def linear_field(lps: np.ndarray) -> np.ndarray:
    return 40.0 + 2.0 * (lps[..., 0] - CENTRE[0]) - 3.0 * (lps[..., 1] - CENTRE[1]) + 5.0 * (lps[..., 2] - CENTRE[2])


def scan(columns: np.ndarray, shape: tuple[int, int, int] = (80, 90, 100), field=linear_field) -> CtVolume:
    """A volume whose (D, H, W) steps are the columns, its middle near CENTRE, filled from a field in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = CENTRE - columns @ (np.asarray(shape) / 2.0)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return CtVolume(field(index @ columns.T + affine[:3, 3]).astype(np.float32), affine)


AXIAL = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
GRIDS = {
    "axial": AXIAL * [1.2, 0.9, 0.9],
    "fine": AXIAL * [0.8, 0.6, 0.6],
    "feet first": AXIAL * [-1.2, 0.9, 0.9],
    "flipped": AXIAL * [1.2, -0.9, -0.9],
    "sagittal": np.eye(3)[:, [0, 2, 1]] * [1.1, -1.0, 1.0],
    "tilted": rotation(12, 0) @ AXIAL * [1.5, 0.9, 0.9],
    "sheared by gantry tilt": AXIAL * [1.2, 0.9, 0.9] + np.array([[0, 0, 0], [0.3, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("turn", [0.0, 17.0])
def test_a_linear_field_is_reproduced_exactly_in_vertebral_axes(grid: str, turn: float) -> None:
    axes = np.asarray(SUPINE_AXES_LPS) @ rotation(turn, 0).T
    voi = extract_voi(scan(GRIDS[grid]), CENTRE, axes, SPEC)
    offsets = [np.arange(n) - (n - 1) / 2 for n in SPEC.shape]
    d, h, w = np.meshgrid(*offsets, indexing="ij")
    expected = linear_field(CENTRE + d[..., None] * axes[0] + h[..., None] * axes[1] + w[..., None] * axes[2])
    assert voi.coverage == 1.0
    np.testing.assert_allclose(voi.hu, expected, atol=0.02)


def test_axes_are_caudal_posterior_left() -> None:
    voi = extract_voi(scan(GRIDS["axial"]), CENTRE, spec=SPEC)
    means = [np.diff(voi.hu, axis=axis).mean() for axis in range(3)]
    np.testing.assert_allclose(means, [-5.0, -3.0, 2.0], atol=1e-3)


@pytest.mark.parametrize("order", [1, 3])
def test_down_sampling_keeps_the_mean_and_does_not_fold_noise(order: int) -> None:
    rng = np.random.default_rng(1)
    coarse = VoiSpec(shape=(16, 16, 16), spacing_mm=3.0, interpolation_order=order)
    checks = scan(AXIAL, field=lambda lps: 100.0 * (-1.0) ** np.floor(lps[..., 2]))
    stripes = extract_voi(checks, CENTRE, spec=coarse).hu
    assert np.abs(stripes).max() < 2.0, "a pattern beyond the grid's Nyquist frequency must vanish, not alias"
    noise = scan(AXIAL, field=lambda lps: 150.0 + 60.0 * rng.standard_normal(lps.shape[:-1]))
    hu = extract_voi(noise, CENTRE, spec=coarse).hu
    assert abs(hu.mean() - 150.0) < 1.0
    assert hu.std() < 60.0 / 3.0


def test_up_sampling_does_not_smooth_first() -> None:
    block = scan(AXIAL * [5.0, 0.9, 0.9], shape=(20, 90, 100), field=lambda lps: 100.0 * (lps[..., 0] > CENTRE[0]))
    hu = extract_voi(block, CENTRE, spec=SPEC).hu
    profile = hu[8, 12]
    assert profile[:14].max() == pytest.approx(0.0, abs=2.0)
    assert profile[18:].min() == pytest.approx(100.0, abs=2.0)


def test_partial_coverage_is_told_and_outside_refused() -> None:
    volume = scan(AXIAL)
    top = CENTRE + np.array([0.0, 0.0, 40.0])
    assert 0.4 < extract_voi(volume, top, spec=SPEC).coverage < 0.6
    with pytest.raises(ValueError, match="outside"):
        extract_voi(volume, CENTRE + np.array([0.0, 0.0, 300.0]), spec=SPEC)


def test_padding_and_nan_are_clipped() -> None:
    volume = scan(AXIAL)
    volume.voxels[:] = -3024.0
    volume.voxels[40, 45, 50] = np.nan
    assert extract_voi(volume, CENTRE, spec=SPEC).hu.min() == -1024.0


@pytest.mark.parametrize("axes", [np.ones((3, 3)), np.eye(2), np.full((3, 3), np.nan), 2 * np.eye(3)])
def test_bad_axes(axes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="axes"):
        extract_voi(scan(AXIAL), CENTRE, axes, SPEC)


def test_spec_round_trip_and_refusals() -> None:
    assert VoiSpec.from_json(SPEC.to_json()) == SPEC
    for bad in ({**SPEC.to_json(), "shape": [16, 16]}, {**SPEC.to_json(), "x": 1}, {"spacing_mm": 1.0}):
        with pytest.raises(BundleError):
            VoiSpec.from_json(bad)
