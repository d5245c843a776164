"""Numbers that judge predictions, and intervals that resample patients, not vertebrae."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Vec = npt.NDArray[np.float64]
Metric = Callable[[npt.NDArray[np.int64]], float]


def auc(score: Vec, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (ties count half); NaN when a class is absent."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def sensitivity_specificity(flag: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Shares of positives flagged and of negatives not flagged; NaN where there are none."""
    sensitivity = float(flag[positive].mean()) if positive.any() else float("nan")
    specificity = float((~flag)[~positive].mean()) if (~positive).any() else float("nan")
    return sensitivity, specificity


def balanced_accuracy(predicted: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> float:
    """Mean recall over the classes present."""
    return float(np.mean([(predicted[true == k] == k).mean() for k in np.unique(true)]))


def macro_f1(predicted: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> float:
    """Mean F1 over the classes present in the truth."""
    values = []
    for k in np.unique(true):
        hit = int(((predicted == k) & (true == k)).sum())
        values.append(2 * hit / max(1, int((predicted == k).sum() + (true == k).sum())))
    return float(np.mean(values))


def pearson(a: Vec, b: Vec) -> float:
    """Pearson's correlation; NaN when one is constant."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def regression(predicted: Vec, true: Vec) -> dict[str, float]:
    """MAE, RMSE, bias, Bland-Altman limits of agreement (bias -/+ 1.96 SD) and correlation."""
    error = predicted - true
    bias, sd = float(error.mean()), float(error.std(ddof=1)) if len(error) > 1 else float("nan")
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "bias": bias,
        "loa_low": bias - 1.96 * sd,
        "loa_high": bias + 1.96 * sd,
        "pearson": pearson(predicted, true),
    }


def expected_calibration_error(probability: Vec, true: npt.NDArray[np.int64], bins: int = 10) -> float:
    """Top-label calibration error: (N, K) probabilities, mean gap between confidence and accuracy over equal bins."""
    confidence, predicted = probability.max(axis=1), probability.argmax(axis=1)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in np.unique(index):
        inside = index == b
        total += inside.mean() * abs(confidence[inside].mean() - (predicted[inside] == true[inside]).mean())
    return float(total)


def cluster_bootstrap(
    patients: npt.NDArray[np.str_], metrics: Mapping[str, Metric], *, repeats: int = 500, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Each metric's value with its 95 % percentile interval.

    Patients are drawn with replacement and bring all their vertebrae along.

    Args:
        patients: (N,) name of each sample's patient.
        metrics: name to a function of the chosen sample indices.
    """
    names, inverse = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    everything = np.arange(len(patients))
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(repeats):
        chosen = np.concatenate([members[k] for k in rng.integers(len(names), size=len(names))])
        for name, metric in metrics.items():
            drawn[name].append(metric(chosen))
    result = {}
    for name, metric in metrics.items():
        values = np.array(drawn[name])
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (float("nan"), float("nan"))
        result[name] = {"value": metric(everything), "low": float(low), "high": float(high)}
    return result
