"""Calibration on validation patients' own targets: temperatures, class shifts, uncertainty, conformal half width."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize
from torch import nn

from osteo_daemon.network.config import CLASSES, Calibration
from osteo_daemon.network.heads import class_probabilities
from train.data import NO_LABEL, VoiSet
from train.judging import Index, Vec

_SHIFT_PENALTY = 0.01
"""On the squared shifts: without any patient of a class its threshold would run away."""


def fit_calibration(
    class_logits: Vec, level_logits: Vec, bmd: Vec, bmd_sd: Vec, index: Index, data: VoiSet
) -> Calibration:
    """Fit on N vertebrae with a reading.

    Args:
        class_logits: (N, K - 1) or (N, K); one shift is fitted for each beside the temperature.
        level_logits: (N, L).
        bmd, bmd_sd: (N,) in g/cm2.
        index: (N,) rows of ``data``.
    """
    rows = [data.rows[i] for i in index]
    level_names = list(data.config["levels"])
    labelled = np.array([row.diagnosis != NO_LABEL for row in rows])
    diagnoses = torch.tensor([row.diagnosis for row in rows])[torch.from_numpy(labelled)]
    levels = torch.tensor([level_names.index(row.level) for row in rows])
    logits = torch.from_numpy(class_logits[labelled])
    names = torch.from_numpy(level_logits)

    def class_nll(values: Vec) -> float:
        shift = values[1:].tolist()
        probability = class_probabilities(logits, len(CLASSES), math.exp(values[0]), shift).clamp_min(1e-6)
        nll = -probability.gather(1, diagnoses[:, None]).log().mean()
        return float(nll) + _SHIFT_PENALTY * float(np.square(values[1:]).mean())

    def level_nll(temperature: float) -> float:
        return float(nn.functional.cross_entropy(names / temperature, levels))

    limits = [(math.log(0.2), math.log(8.0)), *[(-6.0, 6.0)] * class_logits.shape[1]]
    best = optimize.minimize(class_nll, np.zeros(len(limits)), method="Powell", bounds=limits)
    target = np.array([np.nan if row.target_sbmd_g_cm2 is None else row.target_sbmd_g_cm2 for row in rows])
    known = np.isfinite(target)
    standard = np.abs(bmd[known] - target[known]) / bmd_sd[known]
    factor = float(np.sqrt(np.square(standard).mean()))
    n = len(standard)
    quantile = min(1.0, math.ceil((n + 1) * 0.9) / n)
    return Calibration(
        class_temperature=math.exp(best.x[0]),
        class_shift=tuple(float(value) for value in best.x[1:]),
        level_temperature=_best_temperature(level_nll),
        bmd_sd_factor=factor,
        bmd_interval_90=float(np.quantile(standard / factor, quantile, method="higher")),
    )


def _best_temperature(loss: Callable[[float], float]) -> float:
    best = optimize.minimize_scalar(
        lambda log_t: loss(math.exp(log_t)), bounds=(math.log(0.2), math.log(8.0)), method="bounded"
    )
    return float(math.exp(best.x))
