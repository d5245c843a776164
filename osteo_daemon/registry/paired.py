"""A candidate beside the deployed bundle on the same vertebrae: bias, limits of agreement, agreement of classes.

Bland and Altman, Lancet 1986;327:307. Vertebrae of one study are alike: the bias and its interval are over means of
studies, the limits of agreement over vertebrae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from osteo_daemon.jobs.records import Shadow

MINIMUM_STUDIES = 10
"""With fewer nothing is said."""

_LIMITS = 1.96


@dataclass(frozen=True, slots=True)
class Paired:
    """The candidate less the deployed bundle.

    Attributes:
        studies, vertebrae: with a BMD of both.
        bias_g_cm2: mean difference.
        bias_interval_95_g_cm2: of it.
        limits_of_agreement_g_cm2: within which 95 % of vertebrae lie.
        correlation: Pearson's, of both BMD; None when one of them never varies.
    """

    studies: int
    vertebrae: int
    bias_g_cm2: float
    bias_interval_95_g_cm2: tuple[float, float]
    limits_of_agreement_g_cm2: tuple[float, float]
    correlation: float | None


@dataclass(frozen=True, slots=True)
class ShadowComparison:
    """What shadow rows say.

    Attributes:
        studies: on which the candidate ran.
        failed: of them, those with an error, by its name.
        seconds: median and longest.
        bmd: None below `MINIMUM_STUDIES`.
        class_vertebrae: with a class of both.
        class_agreement: share of them with the same class; None when there are none.
        class_kappa: Cohen's; None when it is not defined.
        classes: deployed class, then candidate's, to a number of vertebrae.
    """

    studies: int
    failed: dict[str, int]
    seconds: tuple[float, float]
    bmd: Paired | None
    class_vertebrae: int
    class_agreement: float | None
    class_kappa: float | None
    classes: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def compare_shadow(rows: Sequence[Shadow]) -> ShadowComparison:
    """Paired differences of one candidate's rows.

    Args:
        rows: any number of them, each of one study.
    """
    failed: dict[str, int] = {}
    for row in rows:
        if row.error is not None:
            failed[row.error] = failed.get(row.error, 0) + 1
    seconds = [row.seconds for row in rows] or [0.0]
    classes: dict[str, dict[str, int]] = {}
    for row in rows:
        for level in row.levels.values():
            if level["class"] is not None and level["deployed_class"] is not None:
                counts = classes.setdefault(level["deployed_class"], {})
                counts[level["class"]] = counts.get(level["class"], 0) + 1
    agreement, kappa, count = _agreement(classes)
    longest = (round(float(np.median(seconds)), 3), round(max(seconds), 3))
    return ShadowComparison(len(rows), failed, longest, _paired(rows), count, agreement, kappa, classes)


def _paired(rows: Sequence[Shadow]) -> Paired | None:
    from scipy.stats import t

    by_study = []
    for row in rows:
        pairs = [
            (level["bmd_g_cm2"], level["deployed_bmd_g_cm2"])
            for level in row.levels.values()
            if level["bmd_g_cm2"] is not None and level["deployed_bmd_g_cm2"] is not None
        ]
        if pairs:
            by_study.append(np.array(pairs, np.float64))
    if len(by_study) < MINIMUM_STUDIES:
        return None
    pairs_of_all = np.concatenate(by_study)
    differences = pairs_of_all[:, 0] - pairs_of_all[:, 1]
    means = np.array([float((pairs[:, 0] - pairs[:, 1]).mean()) for pairs in by_study])
    bias = float(means.mean())
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    spread = _LIMITS * float(differences.std(ddof=1))
    centre = float(differences.mean())
    constant = bool(np.ptp(pairs_of_all, axis=0).min() == 0)
    correlation = None if constant else round(float(np.asarray(np.corrcoef(pairs_of_all.T))[0, 1]), 4)
    return Paired(
        len(by_study),
        len(differences),
        round(bias, 5),
        (round(bias - half, 5), round(bias + half, 5)),
        (round(centre - spread, 5), round(centre + spread, 5)),
        correlation,
    )


def _agreement(classes: dict[str, dict[str, int]]) -> tuple[float | None, float | None, int]:
    total = sum(sum(counts.values()) for counts in classes.values())
    if not total:
        return None, None, 0
    same = sum(counts.get(name, 0) for name, counts in classes.items()) / total
    candidate: dict[str, int] = {}
    for counts in classes.values():
        for name, count in counts.items():
            candidate[name] = candidate.get(name, 0) + count
    chance = sum(sum(counts.values()) * candidate.get(name, 0) for name, counts in classes.items()) / total**2
    kappa = None if chance >= 1 else round((same - chance) / (1 - chance), 4)
    return round(same, 4), kappa, total
