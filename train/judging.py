"""What a model says of vertebrae, whatever the model, and the figures that follow from it.

Truth is the simulator's sBMD, not the noisy reading that training saw. Two settings, as in the paper: screening (is the
T-score at most -1?) and diagnosis (is it at most -2.5?). The point of operation of every model is chosen on validation
patients by Youden's index, none by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from train.data import VoiRow
from train.metrics import (
    auc,
    balanced_accuracy,
    cluster_bootstrap,
    expected_calibration_error,
    macro_f1,
    pearson,
    regression,
    sensitivity_specificity,
)
from train.truth import LEVEL_OFFSET_G_CM2

Vec = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Metric = Callable[[Index], float]

SETTINGS: Final = {"screening": 1, "diagnosis": 2}
"""Least class that counts as positive."""
THRESHOLDS: Final = (0.05, 0.1, 0.2, 0.3)
"""Probabilities at which a decision curve's net benefit is given."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What one model says of N vertebrae of L1-L4, in the order of ``index``.

    Attributes:
        index: (N,) rows of the data set.
        probability: (N, 3) of the classes.
        bmd: (N,) sBMD in g/cm2, NaN where the model gives none.
        half: (N,) half width of the 90 % interval, NaN where the model gives none.
        level: (N, L) probabilities of the level, of zero width where the model gives none.
        operating: probability from which screening and diagnosis are positive, chosen on validation patients.
    """

    index: Index
    probability: Vec
    bmd: Vec
    half: Vec
    level: Vec
    operating: Vec

    def score(self, setting: str) -> Vec:
        """(N,) probability of being positive."""
        return np.asarray(self.probability[:, SETTINGS[setting] :].sum(axis=1))

    def save(self, path: Path) -> None:
        """Write an .npz without pickled objects."""
        with path.open("wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Judged:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{f.name: file[f.name] for f in fields(cls)})


def youden(score: Vec, positive: npt.NDArray[np.bool_]) -> float:
    """The score from which calling it positive gives the largest sum of sensitivity and specificity."""
    best, chosen = -np.inf, float("nan")
    for value in np.unique(score):
        sensitivity, specificity = sensitivity_specificity(score >= value, positive)
        if sensitivity + specificity > best:
            best, chosen = sensitivity + specificity, float(value)
    return chosen


def operating_points(probability: Vec, true: Index) -> Vec:
    """(2,) thresholds of screening and diagnosis from validation patients' probabilities and own classes."""
    return np.array([youden(probability[:, k:].sum(axis=1), true >= k) for k in SETTINGS.values()])


def net_benefit(score: Vec, positive: npt.NDArray[np.bool_], threshold: float) -> float:
    """Net benefit of treating from a probability on (Vickers and Elkin 2006), as true positives per vertebra."""
    flagged = score >= threshold
    return float((flagged & positive).mean() - (flagged & ~positive).mean() * threshold / (1.0 - threshold))


def metrics_of(judged: Judged, rows: Sequence[VoiRow]) -> dict[str, Metric]:
    """Every figure as a function of chosen samples; ``rows`` are those of ``judged.index``."""
    true_class = np.array([row.true_diagnosis for row in rows])
    sbmd = np.array([row.sbmd_g_cm2 for row in rows], dtype=np.float64)
    found: dict[str, Metric] = {}
    if np.isfinite(judged.bmd).all():
        for name in ("mae", "rmse", "bias", "loa_low", "loa_high", "pearson"):
            found[name] = lambda k, n=name: regression(judged.bmd[k], sbmd[k])[n]  # type: ignore[misc]
        if all(row.machine_sbmd_g_cm2 is not None for row in rows):
            machine = np.array([row.machine_sbmd_g_cm2 for row in rows], dtype=np.float64)
            devices = np.array([row.device for row in rows])
            found["cross_device_mae"] = lambda k: _over_devices(np.abs(judged.bmd - machine), devices, k, np.mean)
            found["device_bias"] = lambda k: _over_devices(judged.bmd - machine, devices, k, _rms)
    if np.isfinite(judged.half).all():
        found["interval_90_coverage"] = lambda k: float((np.abs(judged.bmd[k] - sbmd[k]) <= judged.half[k]).mean())
    for place, (setting, least) in enumerate(SETTINGS.items()):
        found |= _binary(setting, judged.score(setting), judged.operating[place], true_class >= least)
    guess = judged.probability.argmax(axis=1)
    found["balanced_accuracy"] = lambda k: balanced_accuracy(guess[k], true_class[k])
    found["macro_f1"] = lambda k: macro_f1(guess[k], true_class[k])
    found["class_ece"] = lambda k: expected_calibration_error(judged.probability[k], true_class[k])
    return found


def _binary(setting: str, score: Vec, operating: float, positive: npt.NDArray[np.bool_]) -> dict[str, Metric]:
    flag = score >= operating
    return {
        f"{setting}_auc": lambda k: auc(score[k], positive[k]),
        f"{setting}_sensitivity": lambda k: sensitivity_specificity(flag[k], positive[k])[0],
        f"{setting}_specificity": lambda k: sensitivity_specificity(flag[k], positive[k])[1],
        f"{setting}_balanced_accuracy": lambda k: float(np.mean(sensitivity_specificity(flag[k], positive[k]))),
        f"{setting}_macro_f1": lambda k: macro_f1(flag[k].astype(np.int64), positive[k].astype(np.int64)),
    }


def _rms(values: Vec) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _over_devices(values: Vec, devices: npt.NDArray[np.str_], chosen: Index, combine: Callable[[Vec], Any]) -> float:
    """Mean of the values on each device, then combined over devices: a large site does not outweigh a small one."""
    picked, names = values[chosen], devices[chosen]
    return float(combine(np.array([picked[names == name].mean() for name in np.unique(names)])))


def mean_of(metrics: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The mean of each figure over several runs (seeds) of one model."""
    return {
        name: lambda k, n=name: float(np.mean([one[n](k) for one in metrics]))  # type: ignore[misc]
        for name in metrics[0]
    }


def difference(first: Mapping[str, Metric], second: Mapping[str, Metric], names: Sequence[str]) -> dict[str, Metric]:
    """First minus second on the same resampled patients, for the figures that both have."""
    return {
        name: lambda k, n=name: first[n](k) - second[n](k)  # type: ignore[misc]
        for name in names
        if name in first and name in second
    }


def patients_of(rows: Sequence[VoiRow]) -> npt.NDArray[np.str_]:
    """(N,) names."""
    return np.array([row.patient for row in rows])


def with_intervals(metrics: Mapping[str, Metric], rows: Sequence[VoiRow], repeats: int) -> dict[str, dict[str, float]]:
    """Values with 95 % intervals over patients."""
    return cluster_bootstrap(patients_of(rows), metrics, repeats=repeats)


def decision_curve(judged: Judged, rows: Sequence[VoiRow]) -> dict[str, dict[str, float]]:
    """Net benefit of each setting at `THRESHOLDS`, beside treating everybody."""
    true_class = np.array([row.true_diagnosis for row in rows])
    curves: dict[str, dict[str, float]] = {}
    for setting, least in SETTINGS.items():
        positive = true_class >= least
        curves[setting] = {f"{t:g}": net_benefit(judged.score(setting), positive, t) for t in THRESHOLDS}
        curves[f"{setting}_everybody"] = {f"{t:g}": net_benefit(np.ones(len(rows)), positive, t) for t in THRESHOLDS}
    return curves


def subgroups(rows: Sequence[VoiRow]) -> dict[str, Index]:
    """Samples of each subgroup: site, device, tube voltage, sex, age, phase."""
    keys: dict[str, Callable[[VoiRow], str]] = {
        "site": lambda row: row.site,
        "device": lambda row: row.device,
        "kvp": lambda row: f"{row.kvp:g}",
        "sex": lambda row: row.sex,
        "age": lambda row: "under 50" if row.age_years < 50 else "50-69" if row.age_years < 70 else "70 and over",
        "phase": lambda row: row.phase,
    }
    found: dict[str, Index] = {}
    for name, key in keys.items():
        values = np.array([key(row) for row in rows])
        for value in np.unique(values):
            found[f"{name} {value}"] = np.flatnonzero(values == value)
    return found


def by_subgroup(metrics: Mapping[str, Metric], rows: Sequence[VoiRow], names: Sequence[str]) -> dict[str, Any]:
    """Some figures in each subgroup, with its number of patients; no intervals, which would be wide."""
    patients = patients_of(rows)
    return {
        group: {"patients": len(np.unique(patients[k])), **{n: metrics[n](k) for n in names if n in metrics}}
        for group, k in subgroups(rows).items()
    }


def ceiling(rows: Sequence[VoiRow]) -> dict[str, Metric]:
    """The ideal reader of the same vertebrae, who knows all but what no CT shows."""
    visible = np.array([row.visible_g_cm2 for row in rows], dtype=np.float64)
    sbmd = np.array([row.sbmd_g_cm2 for row in rows], dtype=np.float64)
    true_class = np.array([row.true_diagnosis for row in rows])
    # classes compare a level with its own reference
    score = np.array([LEVEL_OFFSET_G_CM2[row.level] for row in rows]) - visible
    found: dict[str, Metric] = {
        "mae": lambda k: float(np.abs(visible[k] - sbmd[k]).mean()),
        "rmse": lambda k: _rms(visible[k] - sbmd[k]),
        "pearson": lambda k: pearson(visible[k], sbmd[k]),
    }
    for setting, least in SETTINGS.items():
        found[f"{setting}_auc"] = lambda k, n=least: auc(score[k], true_class[k] >= n)  # type: ignore[misc]
    return found
