"""Texture features of masked volumes in batched torch, after the Image Biomarker Standardisation Initiative.

Definitions: Zwanenburg et al., "Image biomarker standardisation initiative" reference manual (arXiv 1612.07003) and
Radiology 2020;295:328; section names of the manual stand in the docstrings. All matrices are three-dimensional at
Chebyshev distance 1, directional ones merged over the 13 directions (aggregation IAZD) before features are computed.
The manual's digital phantom gives its published values (tests/unit/test_texture.py).

Grey levels are integers 1 to G inside the mask and 0 outside. Everything runs on the device of its input, for all
samples of a batch at once; a sample's features don't depend on its batch-mates.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from osteo_daemon.imaging.pieces import in_pieces
from osteo_daemon.imaging.texture_matrices import (
    DIRECTIONS,
    Neighbourhoods,
    check,
    count_cells,
    glcm,
    gldm,
    glrlm,
    glszm,
)

_TINY: Final = 1e-12
_MAXIMUM_COARSENESS: Final = 1e6


def discretise(hu: Tensor, mask: Tensor, low_hu: float, bin_width_hu: float, levels: int) -> Tensor:
    """Fixed bin size discretisation (IBSI Q3RU): (B, D, H, W) HU and mask to int64 grey levels, 0 outside the mask.

    The first bin starts at ``low_hu`` for every sample, so that grey levels mean the same density everywhere; values
    beyond the last bin go into it.
    """
    bins = ((hu - low_hu) / bin_width_hu).floor().long() + 1
    return torch.where(mask, bins.clamp(1, levels), torch.zeros_like(bins))


def texture_features(grey: Tensor, levels: int) -> dict[str, Tensor]:
    """All families at once: (B, D, H, W) grey levels to (B,) features by name, such as ``glcm_contrast``.

    Raises:
        ValueError: the grey levels do not lie in 0 to ``levels``, or a sample has fewer than two voxels in its mask.
    """
    return in_pieces(lambda piece: _all_families(piece, levels), grey)


def _all_families(grey: Tensor, levels: int) -> dict[str, Tensor]:
    voxels = (grey > 0).flatten(1).sum(1)
    near = Neighbourhoods.of(grey, levels)
    zones, sizes = glszm(near)
    families = {
        "histogram": histogram_features(grey, levels),
        "glcm": glcm_features(glcm(near)),
        "glrlm": size_features(glrlm(near), len(DIRECTIONS) * voxels),
        "glszm": size_features(zones, voxels, sizes),
        "gldm": size_features(gldm(near), voxels),
        "ngtdm": ngtdm_features(grey, levels),
    }
    return {f"{family}_{name}": value for family, values in families.items() for name, value in values.items()}


def histogram_features(grey: Tensor, levels: int) -> dict[str, Tensor]:
    """Intensity histogram (IBSI ZVCW) of the discretised levels: moments, entropy and uniformity, each (B,)."""
    check(grey, levels)
    sample = torch.arange(grey.shape[0], device=grey.device)[:, None]
    p = count_cells((sample * (levels + 1) + grey.flatten(1)).flatten(), (grey.shape[0], levels + 1))[:, 1:]
    p = p / p.sum(1, keepdim=True)
    i = torch.arange(1, levels + 1, dtype=torch.float64, device=grey.device)
    mean = (p * i).sum(1)
    centred = i - mean[:, None]
    variance = (p * centred**2).sum(1)
    safe = variance.clamp_min(_TINY)
    return {
        "mean": mean,
        "variance": variance,
        "skewness": torch.where(variance > _TINY, (p * centred**3).sum(1) / safe**1.5, torch.zeros_like(mean)),
        "excess_kurtosis": torch.where(variance > _TINY, (p * centred**4).sum(1) / safe**2 - 3, torch.zeros_like(mean)),
        "mean_absolute_deviation": (p * centred.abs()).sum(1),
        "coefficient_of_variation": variance.sqrt() / mean,
        "entropy": _entropy(p),
        "uniformity": (p**2).sum(1),
    }


def _entropy(p: Tensor) -> Tensor:
    """Shannon entropy in bits over all but the first dimension."""
    return -(p * p.clamp_min(_TINY).log2()).flatten(1).sum(1)


def glcm_features(counts: Tensor) -> dict[str, Tensor]:
    """Features of a (B, G, G) symmetric co-occurrence matrix (IBSI LFYI), each (B,)."""
    p = counts / counts.sum((1, 2), keepdim=True).clamp_min(1.0)
    levels = p.shape[1]
    i = torch.arange(1, levels + 1, dtype=torch.float64, device=p.device)
    row, column = i[:, None], i[None, :]
    gap = (row - column).abs()
    marginal = p.sum(2)
    mean = (marginal * i).sum(1)
    variance = (marginal * (i - mean[:, None]) ** 2).sum(1)

    def weighted(weight: Tensor) -> Tensor:
        return (p * weight).sum((1, 2))

    def summed_by(index: Tensor, size: int) -> Tensor:
        return p.new_zeros((len(p), size)).index_add_(1, index.flatten().long(), p.flatten(1))

    difference, sums = summed_by(gap, levels), summed_by(row + column - 2, 2 * levels - 1)
    k = torch.arange(levels, dtype=torch.float64, device=p.device)
    difference_mean = (difference * k).sum(1)
    cluster = row + column - 2 * mean[:, None, None]
    product = marginal[:, :, None] * marginal[:, None, :]
    log_product = product.clamp_min(_TINY).log2()
    joint, hxy1, hxy2 = _entropy(p), -(p * log_product).sum((1, 2)), -(product * log_product).sum((1, 2))
    marginal_entropy = _entropy(marginal)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    correlated = (weighted(row * column) - mean**2) / variance.clamp_min(_TINY)
    return {
        "joint_maximum": p.amax((1, 2)),
        "joint_average": mean,
        "joint_variance": variance,
        "joint_entropy": joint,
        "difference_average": difference_mean,
        "difference_variance": (difference * (k - difference_mean[:, None]) ** 2).sum(1),
        "difference_entropy": _entropy(difference),
        "sum_average": 2 * mean,
        "sum_variance": (p * cluster**2).sum((1, 2)),
        "sum_entropy": _entropy(sums),
        "angular_second_moment": (p**2).sum((1, 2)),
        "contrast": weighted(gap**2),
        "inverse_difference": weighted(1 / (1 + gap)),
        "inverse_difference_normalised": weighted(1 / (1 + gap / levels)),
        "inverse_difference_moment": weighted(1 / (1 + gap**2)),
        "inverse_difference_moment_normalised": weighted(1 / (1 + (gap / levels) ** 2)),
        "inverse_variance": weighted(torch.where(gap > 0, 1 / gap.clamp_min(1) ** 2, torch.zeros_like(gap))),
        "correlation": torch.where(variance > _TINY, correlated, one),
        "autocorrelation": weighted(row * column),
        "cluster_shade": (p * cluster**3).sum((1, 2)),
        "cluster_prominence": (p * cluster**4).sum((1, 2)),
        "information_correlation_1": torch.where(
            marginal_entropy > _TINY, (joint - hxy1) / marginal_entropy.clamp_min(_TINY), zero
        ),
        "information_correlation_2": (1 - (-2 * (hxy2 - joint)).exp()).clamp_min(0).sqrt(),
    }


def size_features(counts: Tensor, potential: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
    """Features that run length (IBSI TP0I), size zone (9SAK) and dependence matrices (REK0) share, each (B,).

    Args:
        counts: (B, G, S) of runs, zones or neighbourhoods by grey level and length, size or dependence.
        potential: (B,) largest possible number of them: voxels, times directions for merged runs.
        sizes: (S,) what the columns stand for; None is 1 to S.
    """
    total = counts.sum((1, 2))
    p = counts / total[:, None, None].clamp_min(1.0)
    i = torch.arange(1, p.shape[1] + 1, dtype=torch.float64, device=p.device)[:, None]
    if sizes is None:
        sizes = torch.arange(1, p.shape[2] + 1, device=p.device)
    j = sizes.double()[None, :]

    def weighted(weight: Tensor) -> Tensor:
        return (p * weight).sum((1, 2))

    by_level, by_size = p.sum(2), p.sum(1)
    grey_mean, size_mean = weighted(i), weighted(j)
    return {
        "small_emphasis": weighted(1 / j**2),
        "large_emphasis": weighted(j**2),
        "low_grey_emphasis": weighted(1 / i**2),
        "high_grey_emphasis": weighted(i**2),
        "small_low_grey_emphasis": weighted(1 / (i**2 * j**2)),
        "small_high_grey_emphasis": weighted(i**2 / j**2),
        "large_low_grey_emphasis": weighted(j**2 / i**2),
        "large_high_grey_emphasis": weighted(i**2 * j**2),
        "grey_non_uniformity": total * (by_level**2).sum(1),
        "grey_non_uniformity_normalised": (by_level**2).sum(1),
        "size_non_uniformity": total * (by_size**2).sum(1),
        "size_non_uniformity_normalised": (by_size**2).sum(1),
        "percentage": total / potential.double(),
        "grey_variance": weighted(i**2) - grey_mean**2,
        "size_variance": weighted(j**2) - size_mean**2,
        "entropy": _entropy(p),
        "energy": (p**2).sum((1, 2)),
    }


def _box_sum(values: Tensor) -> Tensor:
    """Sums over 3 x 3 x 3 voxels of (B, D, H, W), nothing outside."""
    total = functional.pad(values, (1, 1, 1, 1, 1, 1))
    for axis in (1, 2, 3):
        length = total.shape[axis] - 2
        total = sum((total.narrow(axis, k, length) for k in (1, 2)), total.narrow(axis, 0, length))
    return total


def ngtdm_features(grey: Tensor, levels: int) -> dict[str, Tensor]:
    """Neighbourhood grey tone difference features (IBSI IPET), each (B,)."""
    check(grey, levels)
    inside = grey > 0
    # sums of 27 are exact in few bytes, and memory is what they cost
    value, one = grey.int(), inside.to(torch.int8)
    # the mean over the neighbours inside the mask, the voxel itself left out
    total, neighbours = _box_sum(value) - value, _box_sum(one) - one
    gap = (value - total.double() / neighbours.clamp_min(1)).abs()
    sample = torch.arange(len(grey), device=grey.device)[:, None, None, None]
    # voxels without a neighbour go where the outside is, and are cut off with it
    cell = (sample * (levels + 1) + torch.where(neighbours > 0, grey, torch.zeros_like(grey))).flatten()
    shape = (len(grey), levels + 1)
    n = count_cells(cell, shape)[:, 1:]
    s = torch.bincount(cell, weights=gap.flatten(), minlength=math.prod(shape)).reshape(shape)[:, 1:]
    voxels = n.sum(1).clamp_min(1.0)
    p = n / voxels[:, None]
    i = torch.arange(1, levels + 1, dtype=torch.float64, device=grey.device)
    present = n > 0
    both = present[:, :, None] & present[:, None, :]
    kinds = present.sum(1).double()
    apart = (i[:, None] - i[None, :]).abs()
    pa, pb = p[:, :, None], p[:, None, :]
    weighted = (p * s).sum(1)
    zero = torch.zeros_like(weighted)
    busy = ((i * p)[:, :, None] - (i * p)[:, None, :]).abs() * both
    mixed = ((p * s)[:, :, None] + (p * s)[:, None, :]) / (pa + pb).clamp_min(_TINY)
    spread = (pa * pb * apart**2).sum((1, 2)) / (kinds * (kinds - 1)).clamp_min(1.0)
    return {
        "coarseness": torch.where(
            weighted > _TINY, 1 / weighted.clamp_min(_TINY), zero + _MAXIMUM_COARSENESS
        ).clamp_max(_MAXIMUM_COARSENESS),
        "contrast": torch.where(kinds > 1, spread * s.sum(1) / voxels, zero),
        "busyness": torch.where(kinds > 1, weighted / busy.sum((1, 2)).clamp_min(_TINY), zero),
        "complexity": (apart * mixed * both).sum((1, 2)) / voxels,
        "strength": torch.where(
            s.sum(1) > _TINY, ((pa + pb) * apart**2 * both).sum((1, 2)) / s.sum(1).clamp_min(_TINY), zero
        ),
    }
