"""What a refit has to beat at a site: the parent as it is, the parent's BMD recalibrated, a recalibrated line of HU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression

from osteo_daemon.network.config import BmdScale, Calibration
from osteo_daemon.network.encoder import HU_STATISTICS
from osteo_daemon.network.multitask import MultitaskMoE
from train.calibrate import fit_calibration
from train.data import VoiSet
from train.evaluate import Raw
from train.features import Features
from train.judging import Index, Judged, Vec


def affine(raw: Raw, target: Vec, data: VoiSet) -> Calibration:
    """The parent's weights with a new calibration: BMD by least squares, classes and uncertainty as after a training.

    Args:
        raw: the parent's output for the site's N vertebrae to fit on.
        target: (N,) their readings in g/cm2.
    """
    design = np.column_stack([raw.bmd, np.ones(len(raw.bmd))])
    slope, intercept = (float(value) for value in np.linalg.lstsq(design, target, rcond=None)[0])
    # the calibration takes no slope that turns densities around; a flat line is what is left then
    slope = min(max(slope, 0.05), 20.0)
    intercept = float(np.mean(target - slope * raw.bmd)) if slope in (0.05, 20.0) else intercept
    found = fit_calibration(
        raw.class_logits, raw.level_logits, slope * raw.bmd + intercept, slope * raw.bmd_sd, raw.index, data
    )
    return replace(found, bmd_slope=slope, bmd_intercept_g_cm2=intercept)


def core_hu(network: MultitaskMoE, features: Features) -> Vec:
    """(N,) mean HU of the trabecular core; zeros for a network without HU statistics."""
    statistics = network.hu_statistics
    if statistics is None:
        return np.zeros(len(features))
    place = HU_STATISTICS.index("core_mean")
    raw = features.statistics[:, place] * statistics.sd[place] + statistics.mean[place]
    return np.asarray(raw.double().numpy())


def hu_line(
    hu: Vec,
    levels: Sequence[str],
    target: Vec,
    classes: Index,
    fitted: Index,
    judged: Index,
    scale: BmdScale,
    rows: Index,
) -> Judged:
    """BMD linear in HU with a constant for each level, classes by logistic curves over its T-score.

    Args:
        hu: (N,) of all vertebrae.
        levels: (N,) names.
        target, classes: (N,) readings.
        fitted: places to fit on.
        judged: places to say something of.
        scale: of the readings.
        rows: (N,) rows of the data set.
    """
    names = sorted(set(levels))
    where = np.array([names.index(level) for level in levels])
    design = np.column_stack([hu / 100.0, np.eye(len(names))[where]])
    # a hundredth of an observation keeps a level without any reading near the others
    mean = float(target[fitted].mean())
    pull = 0.1 * np.eye(design.shape[1])[1:]
    left = np.concatenate([design[fitted], pull])
    right = np.concatenate([target[fitted] - mean, np.zeros(len(pull))])
    bmd = design @ np.linalg.lstsq(left, right, rcond=None)[0] + mean
    score = np.array([scale.t_score(value, level) or 0.0 for value, level in zip(bmd, levels, strict=True)])
    worse = []
    for least in (1, 2):
        positive = classes[fitted] >= least
        if positive.all() or not positive.any():
            worse.append(np.full(len(judged), float(positive[0])))
            continue
        model = LogisticRegression(C=1e4).fit(score[fitted, None], positive)
        worse.append(model.predict_proba(score[judged, None])[:, 1])
    low, worst = worse[0], np.minimum(*worse)
    probability = np.stack([1.0 - low, low - worst, worst], axis=1)
    half = float(np.quantile(np.abs(bmd[fitted] - target[fitted]), 0.9))
    return Judged(
        index=rows[judged],
        probability=probability,
        bmd=bmd[judged],
        half=np.full(len(judged), half),
        level=np.zeros((len(judged), 0)),
        operating=np.full(2, 0.5),
    )
