"""Statistics of attenuation inside masks in batched torch, without any binning (IBSI, section UHIW)."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from osteo_daemon.imaging.pieces import in_pieces

_TINY: Final = 1e-12


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order; torch sorts the indices as well, which on a CPU takes most of the time."""
    if values.is_cuda:
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def first_order_features(hu: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Intensity-based statistics (IBSI UHIW) of (B, D, H, W) HU inside a mask of the same shape, each (B,) float64.

    Percentiles interpolate linearly between order statistics. Population moments; the kurtosis is the excess over 3.

    Raises:
        ValueError: shapes differ or a mask has fewer than two voxels.
    """
    if hu.shape != mask.shape or hu.ndim != 4:
        raise ValueError("need (B, D, H, W) HU and a mask of the same shape")
    return in_pieces(_statistics, hu, mask)


def _statistics(hu: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inside = mask.flatten(1)
    count = inside.sum(1)
    if int(count.min()) < 2:
        raise ValueError("a sample has fewer than two voxels in its mask")
    value = hu.flatten(1).double()
    raw = hu.flatten(1) if hu.dtype is torch.float32 else value
    ordered = _sorted(torch.where(inside, raw, torch.full_like(raw, torch.inf))).double()

    def percentile(share: float) -> Tensor:
        place = share * (count - 1).double()
        low = place.floor().long()
        pair = ordered.gather(1, torch.stack([low, torch.minimum(low + 1, count - 1)], dim=1))
        return pair[:, 0] + (place - low) * (pair[:, 1] - pair[:, 0])

    def mean_over(values: Tensor, where: Tensor = inside) -> Tensor:
        return torch.where(where, values, torch.zeros_like(values)).sum(1) / where.sum(1).clamp_min(1)

    mean = mean_over(value)
    centred = value - mean[:, None]
    squared = centred * centred  # and products of it: a general power costs ten times as much
    variance = mean_over(squared)
    safe = variance.clamp_min(_TINY)
    varied = variance > _TINY
    zero = torch.zeros_like(mean)
    p10, p90 = percentile(0.1), percentile(0.9)
    middle = inside & (value >= p10[:, None]) & (value <= p90[:, None])
    minimum, maximum = ordered[:, 0], ordered.gather(1, count[:, None] - 1)[:, 0]
    energy = torch.where(inside, value * value, torch.zeros_like(value)).sum(1)
    return {
        "mean": mean,
        "variance": variance,
        "skewness": torch.where(varied, mean_over(squared * centred) / safe**1.5, zero),
        "excess_kurtosis": torch.where(varied, mean_over(squared * squared) / safe**2 - 3, zero),
        "median": percentile(0.5),
        "minimum": minimum,
        "percentile_10": p10,
        "percentile_90": p90,
        "maximum": maximum,
        "interquartile_range": percentile(0.75) - percentile(0.25),
        "range": maximum - minimum,
        "mean_absolute_deviation": mean_over(centred.abs()),
        "robust_mean_absolute_deviation": mean_over((value - mean_over(value, middle)[:, None]).abs(), middle),
        "energy": energy,
        "root_mean_square": (energy / count).sqrt(),
    }
