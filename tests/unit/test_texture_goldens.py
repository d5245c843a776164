"""Texture features equal PyRadiomics' values (tests/golden/texture, with the scripts that made them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from osteo_daemon.imaging.first_order import first_order_features
from osteo_daemon.imaging.texture import discretise, texture_features

GOLDEN = Path(__file__).parents[1] / "golden" / "texture"
DOCUMENT = json.loads((GOLDEN / "goldens.json").read_text(encoding="utf-8"))
WIDTH_HU = DOCUMENT["bin_width_hu"]

_SIZES = {
    "glrlm": ("ShortRun", "LongRun", "Run", "RunLength"),
    "glszm": ("SmallArea", "LargeArea", "Zone", "SizeZone"),
    "gldm": ("SmallDependence", "LargeDependence", "Dependence", "Dependence"),
}
NAMES = {
    "firstorder_10Percentile": "first_order_percentile_10",
    "firstorder_90Percentile": "first_order_percentile_90",
    "firstorder_Energy": "first_order_energy",
    "firstorder_TotalEnergy": "first_order_energy",  # voxels of 1 mm3
    "firstorder_Entropy": "histogram_entropy",
    "firstorder_Uniformity": "histogram_uniformity",
    "firstorder_InterquartileRange": "first_order_interquartile_range",
    "firstorder_Kurtosis": "first_order_excess_kurtosis",  # not the excess: 3 is taken off below
    "firstorder_Maximum": "first_order_maximum",
    "firstorder_Mean": "first_order_mean",
    "firstorder_MeanAbsoluteDeviation": "first_order_mean_absolute_deviation",
    "firstorder_Median": "first_order_median",
    "firstorder_Minimum": "first_order_minimum",
    "firstorder_Range": "first_order_range",
    "firstorder_RobustMeanAbsoluteDeviation": "first_order_robust_mean_absolute_deviation",
    "firstorder_RootMeanSquared": "first_order_root_mean_square",
    "firstorder_Skewness": "first_order_skewness",
    "firstorder_Variance": "first_order_variance",
    "glcm_Autocorrelation": "glcm_autocorrelation",
    "glcm_ClusterProminence": "glcm_cluster_prominence",
    "glcm_ClusterShade": "glcm_cluster_shade",
    "glcm_ClusterTendency": "glcm_sum_variance",
    "glcm_Contrast": "glcm_contrast",
    "glcm_Correlation": "glcm_correlation",
    "glcm_DifferenceAverage": "glcm_difference_average",
    "glcm_DifferenceEntropy": "glcm_difference_entropy",
    "glcm_DifferenceVariance": "glcm_difference_variance",
    "glcm_Id": "glcm_inverse_difference",
    "glcm_Idm": "glcm_inverse_difference_moment",
    "glcm_Idmn": "glcm_inverse_difference_moment_normalised",
    "glcm_Idn": "glcm_inverse_difference_normalised",
    "glcm_Imc1": "glcm_information_correlation_1",
    "glcm_Imc2": "glcm_information_correlation_2",
    "glcm_InverseVariance": "glcm_inverse_variance",
    "glcm_JointAverage": "glcm_joint_average",
    "glcm_JointEnergy": "glcm_angular_second_moment",
    "glcm_JointEntropy": "glcm_joint_entropy",
    "glcm_MaximumProbability": "glcm_joint_maximum",
    "glcm_SumAverage": "glcm_sum_average",
    "glcm_SumEntropy": "glcm_sum_entropy",
    "glcm_SumSquares": "glcm_joint_variance",
    "ngtdm_Busyness": "ngtdm_busyness",
    "ngtdm_Coarseness": "ngtdm_coarseness",
    "ngtdm_Complexity": "ngtdm_complexity",
    "ngtdm_Contrast": "ngtdm_contrast",
    "ngtdm_Strength": "ngtdm_strength",
}
for _family, (_small, _large, _size, _uniformity) in _SIZES.items():
    _level = {
        "GrayLevelNonUniformity": "grey_non_uniformity",
        "GrayLevelVariance": "grey_variance",
        f"{_small}Emphasis": "small_emphasis",
        f"{_large}Emphasis": "large_emphasis",
        f"{_small}LowGrayLevelEmphasis": "small_low_grey_emphasis",
        f"{_small}HighGrayLevelEmphasis": "small_high_grey_emphasis",
        f"{_large}LowGrayLevelEmphasis": "large_low_grey_emphasis",
        f"{_large}HighGrayLevelEmphasis": "large_high_grey_emphasis",
        f"{_uniformity}NonUniformity": "size_non_uniformity",
        f"{_uniformity}NonUniformityNormalized": "size_non_uniformity_normalised",
        f"{_size}Variance": "size_variance",
        f"{_size}Entropy": "entropy",
        f"{_size}Percentage": "percentage",
        "GrayLevelNonUniformityNormalized": "grey_non_uniformity_normalised",
        f"LowGrayLevel{_size if _family != 'gldm' else ''}Emphasis": "low_grey_emphasis",
        f"HighGrayLevel{_size if _family != 'gldm' else ''}Emphasis": "high_grey_emphasis",
    }
    NAMES |= {f"{_family}_{theirs}": f"{_family}_{ours}" for theirs, ours in _level.items()}

NOT_OURS = {"glcm_MCC"}  # the maximal correlation coefficient is no IBSI feature


@pytest.fixture(scope="module", params=sorted(DOCUMENT["volumes"]))
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, float], dict[str, float]]:
    with np.load(GOLDEN / "volumes.npz") as volumes:
        hu = torch.from_numpy(volumes[f"{request.param}_hu"].astype(np.float32))[None]
        mask = torch.from_numpy(volumes[f"{request.param}_mask"])[None]
    # PyRadiomics counts bins from the multiple of the width below the lowest value inside the mask
    low_hu = float(torch.floor(hu[mask].min() / WIDTH_HU) * WIDTH_HU)
    levels = int((hu[mask].max() - low_hu) // WIDTH_HU) + 1
    ours = {
        name: float(value)
        for name, value in texture_features(discretise(hu, mask, low_hu, WIDTH_HU, levels), levels).items()
    }
    ours |= {f"first_order_{name}": float(value) for name, value in first_order_features(hu, mask).items()}
    ours["first_order_excess_kurtosis"] += 3
    return ours, DOCUMENT["volumes"][request.param]


def test_every_feature_of_pyradiomics_is_equal(pair: tuple[dict[str, float], dict[str, float]]) -> None:
    ours, theirs = pair
    compared = {name: (ours[NAMES[name]], value) for name, value in theirs.items() if name not in NOT_OURS}
    wrong = {name: values for name, values in compared.items() if values[0] != pytest.approx(values[1], rel=1e-6)}
    assert not wrong
    assert len(compared) > 90


def test_first_order_features_ignore_what_is_outside_the_mask_and_other_samples() -> None:
    generator = torch.Generator().manual_seed(4)
    hu = 100 + 50 * torch.randn((3, 6, 7, 8), generator=generator)
    mask = torch.rand(hu.shape, generator=generator) > torch.tensor([0.2, 0.5, 0.9])[:, None, None, None]
    together = first_order_features(torch.where(mask, hu, torch.full_like(hu, 3000.0)), mask)
    for row in range(3):
        inside = hu[row][mask[row]].double().numpy()
        assert float(together["median"][row]) == pytest.approx(float(np.median(inside)))
        assert float(together["percentile_90"][row]) == pytest.approx(float(np.percentile(inside, 90)))
        assert float(together["variance"][row]) == pytest.approx(float(inside.var()))


def test_first_order_features_want_a_mask_with_voxels() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        first_order_features(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.bool))
