"""Control charts whose limits hold for small numbers: each mark is judged by what the reference predicts for it.

A Shewhart chart's three-sigma limits take the reference's mean and rate for the truth and a rate for a normal variable.
With a few hundred studies, dozens of charts and a look every day that gives an alarm a week. Here the limits are those
of the predictive distribution given the reference: Student's t for a mean of further observations (Hahn and Meeker,
Statistical Intervals, 1991, section 4.7), the beta-binomial under Jeffreys' prior for a count (Gelman et al., Bayesian
Data Analysis, 3rd ed., section 2.4). Both hold the reference's own uncertainty.

Batches of patients may differ by more than chance lets single studies differ; the limits are widened by that ratio of
variances (Laney, Quality Engineering 2002;14:531, for rates).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import betaln
from scipy.stats import chi2, t

Vector = npt.NDArray[np.float64]

BATCH_STUDIES = 50
"""Studies of one mark of a chart, and of the batches between which dispersion is measured."""

_FEWEST_BATCHES = 10
_GREATEST_DISPERSION = 20.0
_SIGNIFICANT = 0.05
_JEFFREYS = 0.5


def dispersion(reference: Vector) -> float:
    """Variance of the means of successive batches over that of independent studies; 1 to 20.

    1 when there are too few batches, and when chance alone makes it as large in one of twenty references.

    Args:
        reference: (M,) values, or events as 0 and 1, in order of time.
    """
    count = len(reference) // BATCH_STUDIES
    within = float(np.var(reference, ddof=1)) if len(reference) > 1 else 0.0
    if count < _FEWEST_BATCHES or within <= 0:
        return 1.0
    between = float(np.var(marks(reference), ddof=1)) * BATCH_STUDIES
    chance = float(chi2.isf(_SIGNIFICANT, count - 1)) / (count - 1)
    return min(between / within, _GREATEST_DISPERSION) if between / within > chance else 1.0


def marks(values: Vector, size: int = BATCH_STUDIES) -> Vector:
    """(N // size,) means of successive batches; the oldest studies, which fill none, are left out."""
    count = len(values) // size
    return np.asarray(values[len(values) - count * size :].reshape(count, size).mean(axis=1), np.float64)


def mean_tails(values: Vector, reference: Vector, ratio: float) -> tuple[float, float]:
    """Probability of a mean as low, and of one as high, as that of ``values`` if nothing has changed.

    Args:
        values, reference: (N,) and (M,) finite; M at least 2.
        ratio: of `dispersion`.
    """
    spread = _spread(reference, len(values), ratio)
    difference = float(np.mean(values) - np.mean(reference))
    if spread <= 0:
        return float(difference >= 0), float(difference <= 0)
    score = difference / spread
    return float(t.cdf(score, len(reference) - 1)), float(t.sf(score, len(reference) - 1))


def mean_limits(reference: Vector, size: int, tail: float, ratio: float) -> tuple[float, float]:
    """Limits that the mean of ``size`` studies crosses on either side with the probability ``tail``."""
    width = float(t.isf(tail, len(reference) - 1)) * _spread(reference, size, ratio)
    centre = float(np.mean(reference))
    return centre - width, centre + width


def rate_tails(events: Vector, reference: Vector, ratio: float) -> tuple[float, float]:
    """Probability of as few events, and of as many, if the rate has not changed.

    Args:
        events, reference: (N,) and (M,) of 0 and 1.
        ratio: of `dispersion`: so many studies tell as much as one independent study.
    """
    count, probabilities = _thinned(int(events.sum()), len(events), ratio)[0], _predicted(len(events), reference, ratio)
    return float(probabilities[: count + 1].sum()), float(probabilities[count:].sum())


def rate_limits(reference: Vector, size: int, tail: float, ratio: float) -> tuple[float, float]:
    """Limits that the rate among ``size`` studies crosses on either side with at most the probability ``tail``."""
    probabilities = _predicted(size, reference, ratio)
    n = len(probabilities) - 1
    low = int(np.sum(np.cumsum(probabilities) <= tail))
    high = n - int(np.sum(np.cumsum(probabilities[::-1]) <= tail))
    return low / n, high / n


def _spread(reference: Vector, size: int, ratio: float) -> float:
    return float(np.std(reference, ddof=1) * np.sqrt(ratio * (1 / size + 1 / len(reference))))


def _predicted(size: int, reference: Vector, ratio: float) -> Vector:
    """(n + 1,) probabilities of 0 to n events, the beta-binomial distribution."""
    _, n = _thinned(0, size, ratio)
    count, m = _thinned(int(reference.sum()), len(reference), ratio)
    a, b = count + _JEFFREYS, m - count + _JEFFREYS
    k = np.arange(n + 1, dtype=np.float64)
    log = betaln(k + a, n - k + b) - betaln(a, b) - betaln(n - k + 1, k + 1) - np.log(n + 1)
    return np.asarray(np.exp(log), np.float64)


def _thinned(count: int, of: int, ratio: float) -> tuple[int, int]:
    n = max(round(of / ratio), 1)
    return min(round(count / ratio), n), n
