"""Texture features against the published values of the IBSI digital phantom, and as a batch."""

from __future__ import annotations

import pytest
import torch

from osteo_daemon.imaging.first_order import first_order_features
from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.imaging.texture_matrices import DIRECTIONS

LEVELS = 6

# The digital phantom of the IBSI reference manual (z, y, x); 0 is outside the region of interest.
PHANTOM = torch.tensor(
    [
        [[1, 4, 4, 1, 1], [1, 4, 6, 1, 1], [4, 1, 6, 4, 1], [4, 4, 6, 4, 1]],
        [[1, 4, 4, 1, 1], [1, 1, 6, 1, 1], [0, 1, 3, 1, 1], [4, 4, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 6, 1, 1]],
    ]
)

# Published values: 3D, merged where directional, as printed (three significant digits).
PUBLISHED = {
    "histogram": {
        "mean": 2.15, "variance": 3.05, "skewness": 1.08, "excess_kurtosis": -0.355, "mean_absolute_deviation": 1.55,
        "coefficient_of_variation": 0.812, "entropy": 1.27, "uniformity": 0.512,
    },
    "glcm": {
        "joint_maximum": 0.509, "joint_average": 2.15, "joint_variance": 3.13, "joint_entropy": 2.57,
        "difference_average": 1.38, "difference_variance": 3.21, "difference_entropy": 1.64, "sum_average": 4.30,
        "sum_variance": 7.41, "sum_entropy": 2.11, "angular_second_moment": 0.291, "contrast": 5.12,
        "inverse_difference": 0.688, "inverse_difference_normalised": 0.856, "inverse_difference_moment": 0.631,
        "inverse_difference_moment_normalised": 0.902, "inverse_variance": 0.0574, "correlation": 0.183,
        "autocorrelation": 5.19, "cluster_shade": 17.4, "cluster_prominence": 147.0,
        "information_correlation_1": -0.0288, "information_correlation_2": 0.269,
    },
    "glrlm": {
        "small_emphasis": 0.729, "large_emphasis": 2.76, "low_grey_emphasis": 0.607, "high_grey_emphasis": 9.64,
        "small_low_grey_emphasis": 0.372, "small_high_grey_emphasis": 8.67, "large_low_grey_emphasis": 2.16,
        "large_high_grey_emphasis": 15.6, "grey_non_uniformity": 281.0, "grey_non_uniformity_normalised": 0.430,
        "size_non_uniformity": 328.0, "size_non_uniformity_normalised": 0.501, "percentage": 0.680,
        "grey_variance": 3.48, "size_variance": 0.598, "entropy": 2.62,
    },
    "glszm": {
        "small_emphasis": 0.255, "large_emphasis": 550.0, "low_grey_emphasis": 0.253, "high_grey_emphasis": 15.6,
        "small_low_grey_emphasis": 0.0256, "small_high_grey_emphasis": 2.76, "large_low_grey_emphasis": 503.0,
        "large_high_grey_emphasis": 1490.0, "grey_non_uniformity": 1.40, "grey_non_uniformity_normalised": 0.280,
        "size_non_uniformity": 1.00, "size_non_uniformity_normalised": 0.200, "percentage": 0.0676,
        "grey_variance": 2.64, "size_variance": 331.0, "entropy": 2.32,
    },
    "gldm": {
        "small_emphasis": 0.045, "large_emphasis": 109.0, "low_grey_emphasis": 0.693, "high_grey_emphasis": 7.66,
        "small_low_grey_emphasis": 0.00963, "small_high_grey_emphasis": 0.736, "large_low_grey_emphasis": 102.0,
        "large_high_grey_emphasis": 235.0, "grey_non_uniformity": 37.9, "grey_non_uniformity_normalised": 0.512,
        "size_non_uniformity": 4.86, "size_non_uniformity_normalised": 0.0657, "percentage": 1.0,
        "grey_variance": 3.05, "size_variance": 22.1, "entropy": 4.40, "energy": 0.0533,
    },
    "ngtdm": {"coarseness": 0.0296, "contrast": 0.584, "busyness": 6.54, "complexity": 13.5, "strength": 0.763},
}  # fmt: skip
CASES = [(family, name, value) for family, values in PUBLISHED.items() for name, value in values.items()]


@pytest.fixture(scope="module")
def phantom() -> dict[str, float]:
    return {name: float(value) for name, value in texture_features(PHANTOM[None], LEVELS).items()}


@pytest.mark.parametrize(("family", "name", "value"), CASES, ids=[f"{f}_{n}" for f, n, _ in CASES])
def test_published_value(phantom: dict[str, float], family: str, name: str, value: float) -> None:
    digits = len(f"{value:.3g}".split("e")[0].replace("-", "").replace(".", "").lstrip("0")) if value else 3
    tolerance = 0.51 * 10 ** -(min(3, max(2, digits)) - 1) * 10 ** int(f"{abs(value):e}".split("e")[1])
    assert phantom[f"{family}_{name}"] == pytest.approx(value, abs=max(tolerance, 0.006 * abs(value)))


def test_every_feature_has_a_published_value_but_two(phantom: dict[str, float]) -> None:
    published = {f"{family}_{name}" for family, name, _ in CASES}
    # IBSI defines an energy for dependence matrices only
    assert phantom.keys() - published == {"glrlm_energy", "glszm_energy"}
    assert len(DIRECTIONS) == 13


def grey(seed: int, shape: tuple[int, ...] = (12, 14, 16)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool3d(torch.rand((1, 1, *shape), generator=generator), 3, 1, 1)[0, 0]
    mask = torch.rand(shape, generator=generator) > 0.15
    return discretise(1000 * smooth[None], mask[None], 300.0, 50.0, 8)[0]


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    samples = [grey(seed) for seed in range(3)]
    together = texture_features(torch.stack(samples), 8)
    for row, sample in enumerate(samples):
        for name, value in texture_features(sample[None], 8).items():
            assert float(together[name][row]) == pytest.approx(float(value[0]), rel=1e-10, abs=1e-12), name


def test_features_are_rotation_and_mirror_invariant() -> None:
    sample = grey(5)
    plain = texture_features(sample[None], 8)
    turned = texture_features(sample.permute(2, 0, 1).flip(0)[None].contiguous(), 8)
    for name, value in plain.items():
        assert float(turned[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-9), name


def test_a_batch_in_pieces_is_the_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.stack([grey(seed, (9, 8, 7)) for seed in range(5)])

    def features() -> dict[str, torch.Tensor]:
        return texture_features(batch, 8) | first_order_features(batch.float(), batch > 0)

    whole = features()
    monkeypatch.setattr("osteo_daemon.imaging.pieces._CHUNK_VOXELS", 2 * 9 * 8 * 7)
    pieces = features()
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-12, atol=1e-12)


def test_zones_match_connected_components_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from scipy import ndimage

    from osteo_daemon.imaging import texture_matrices

    sample = grey(7, (20, 20, 20))
    near = texture_matrices.Neighbourhoods.of(sample[None], 8)
    counts, sizes = texture_matrices.glszm(near)
    # zones by torch alone, as on a GPU, are the same
    monkeypatch.setattr(texture_matrices, "_components", texture_matrices._hooked_components)
    for one, other in zip((counts, sizes), texture_matrices.glszm(near), strict=True):
        assert torch.equal(one, other)
    counted = torch.zeros((8, 20**3))
    counted[:, sizes - 1] = counts[0].float()
    expected = torch.zeros_like(counted)
    for level in range(1, 9):
        labels, count = ndimage.label(sample.numpy() == level, np.ones((3, 3, 3)))
        for size in np.bincount(labels.ravel())[1 : count + 1]:
            expected[level - 1, size - 1] += 1
    assert torch.equal(counted, expected)


def test_blur_changes_texture_and_flip_does_not() -> None:
    sample = 150 + 40 * torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(sample, dtype=torch.bool)
    blurred = torch.nn.functional.avg_pool3d(sample[None], 3, 1, 1)[0]
    features = [texture_features(discretise(x, mask, 0, 25, 16), 16) for x in (sample, sample.flip(3), blurred)]
    contrast = [float(f["glcm_contrast"]) for f in features]
    assert contrast[1] == pytest.approx(contrast[0])
    assert contrast[2] < 0.5 * contrast[0]


def test_uniform_region_gives_finite_values() -> None:
    flat = torch.full((1, 4, 4, 4), 3)
    assert all(bool(torch.isfinite(value).all()) for value in texture_features(flat, LEVELS).values())


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3, 3, 3).long(), torch.full((1, 3, 3, 3), 9), torch.ones(3, 3, 3).long()]
)
def test_bad_input(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"grey levels|fewer"):
        texture_features(bad, LEVELS)
