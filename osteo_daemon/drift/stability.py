"""The population stability index over bins that are filled, and whether chance alone makes it as large.

The rule of thumb (0.1 to look, 0.25 to act) forgets how many studies were counted: of one distribution, two samples of
100 in ten bins have an index of 0.18 on average, for it follows a chi-squared distribution with one degree of freedom
fewer than bins, times (1/N + 1/M) (B. Yurdakul, Statistical Properties of Population Stability Index, Western Michigan
University, 2018). Pearson's statistic of the same counts keeps to that distribution further into its tail and gives
the probability here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

Vector = npt.NDArray[np.float64]

MATERIAL = 0.1
"""A smaller index is no change that matters, however sure it is."""

_MOST_BINS = 10
_FEWEST_IN_BIN = 20.0
"""Studies to be expected in each bin of either window."""

_SMOOTHING = 0.5  # added to each count: an empty bin must not make the index infinite


@dataclass(frozen=True, slots=True)
class Stability:
    """An index, its number of bins, and the probability of counts as different without a change."""

    index: float
    bins: int
    probability: float


def value_stability(reference: Vector, current: Vector, ratio: float = 1.0) -> Stability | None:
    """Stability of a measured value over bins of equal content of the reference.

    Args:
        reference, current: (M,) and (N,) finite.
        ratio: of `charts.dispersion`.

    Returns:
        None when there are too few for two bins.
    """
    wanted = min(_MOST_BINS, int(min(len(reference), len(current)) // _FEWEST_IN_BIN))
    if wanted < 2:
        return None
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, wanted + 1)[1:-1]))
    old, new = (
        np.bincount(np.searchsorted(edges, part, side="right"), minlength=len(edges) + 1).astype(np.float64)
        for part in (reference, current)
    )
    return _compare(old, new, ratio)


def class_stability(reference: Sequence[str], current: Sequence[str], ratio: float = 1.0) -> Stability | None:
    """Stability of a class; classes that are too rare count as one. Returns None when fewer than two are left."""
    if not reference or not current:
        return None
    known, seen = Counter(reference), Counter(current)
    names = sorted(known | seen)
    counts = np.array([[part[name] for name in names] for part in (known, seen)], np.float64)
    expected = counts.sum(axis=0) / counts.sum() * counts.sum(axis=1).min()
    common = expected >= _FEWEST_IN_BIN
    merged = counts[:, common]
    if expected[~common].sum() >= _FEWEST_IN_BIN:
        merged = np.concatenate([merged, counts[:, ~common].sum(axis=1, keepdims=True)], axis=1)
    return _compare(merged[0], merged[1], ratio)


def _compare(reference: Vector, current: Vector, ratio: float) -> Stability | None:
    bins = len(reference)
    if bins < 2 or not reference.sum() or not current.sum():
        return None
    p = (current + _SMOOTHING) / (current.sum() + _SMOOTHING * bins)
    q = (reference + _SMOOTHING) / (reference.sum() + _SMOOTHING * bins)
    index = float(np.sum((p - q) * np.log(p / q)))
    table = np.stack([reference, current])
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    pearson = float(np.sum((table - expected) ** 2 / np.maximum(expected, _SMOOTHING))) / ratio
    return Stability(index, bins, float(chi2.sf(pearson, bins - 1)))
