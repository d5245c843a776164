"""Is a refitted bundle better at its site than the deployed one, and does it harm others? A rule, no opinion.

Everything is judged against the readings of patients that no fit behind the judged value has seen, with intervals that
resample patients. The rule stands in `decide` and in docs/decisions/0010-site-refit.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from train.judging import SETTINGS, Index, Judged, Metric, difference
from train.metrics import (
    auc,
    cluster_bootstrap,
    expected_calibration_error,
    pearson,
    sensitivity_specificity,
)

Verdict = Literal["better", "equal", "worse", "not_enough_data"]
Choice = Literal["refit", "affine", "parent"]
Interval = Mapping[str, float]

SCHEMA: Final = "osteo-verdict/1"
MARGIN_G_CM2: Final = 0.01
"""Of the mean absolute error: about the precision error of one densitometry of the spine (1 %)."""
MARGIN_AUC: Final = 0.02
COMPARED: Final = ("mae", "absolute_bias", "screening_auc", "diagnosis_auc", "class_ece")
IN_SUBGROUPS: Final = ("mae", "bias")
SUBGROUP_PATIENTS: Final = 8
MINIMUM_TO_ORDER: Final = 5
"""Patients with and without the finding; with fewer an AUC is one patient's rank."""


def metrics_against(judged: Judged, target: npt.NDArray[np.float64], classes: Index, folds: Index) -> dict[str, Metric]:
    """Figures as functions of chosen samples.

    Args:
        target: (N,) what counts as true, in g/cm2: readings at a site.
        classes: (N,) its classes.
        folds: (N,) which model of several said it: an AUC compares only what one of them said, since each has a
            calibration of its own (Forman and Scholz 2010).
    """
    error = judged.bmd - target
    found: dict[str, Metric] = {
        "mae": lambda k: float(np.abs(error[k]).mean()),
        "bias": lambda k: float(error[k].mean()),
        "absolute_bias": lambda k: abs(float(error[k].mean())),
        "rmse": lambda k: float(np.sqrt(np.square(error[k]).mean())),
        "pearson": lambda k: pearson(judged.bmd[k], target[k]),
        "class_ece": lambda k: expected_calibration_error(judged.probability[k], classes[k]),
    }
    if np.isfinite(judged.half).all():
        found["interval_90_coverage"] = lambda k: float((np.abs(error[k]) <= judged.half[k]).mean())
    for place, (setting, least) in enumerate(SETTINGS.items()):
        score, positive = judged.score(setting), classes >= least
        flag = score >= judged.operating[place]
        found[f"{setting}_auc"] = partial(_auc_of, score, positive, folds)
        found[f"{setting}_sensitivity"] = partial(_rate_of, 0, flag, positive)
        found[f"{setting}_specificity"] = partial(_rate_of, 1, flag, positive)
    return found


def _auc_of(
    score: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], folds: Index, chosen: npt.NDArray[np.int64]
) -> float:
    return auc_within(score[chosen], positive[chosen], folds[chosen])


def _rate_of(
    place: int, flag: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_], chosen: npt.NDArray[np.int64]
) -> float:
    return float(sensitivity_specificity(flag[chosen], positive[chosen])[place])


def auc_within(score: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], folds: Index) -> float:
    """Mean AUC of the folds, weighted by their pairs of a positive and a negative; NaN when there are none."""
    total, pairs = 0.0, 0
    for fold in np.unique(folds):
        own = folds == fold
        count = int(positive[own].sum()) * int((~positive[own]).sum())
        if count:
            total, pairs = total + count * auc(score[own], positive[own]), pairs + count
    return total / pairs if pairs else float("nan")


def compare(
    models: Mapping[str, Judged],
    target: npt.NDArray[np.float64],
    classes: Index,
    patients: npt.NDArray[np.str_],
    pairs: Sequence[tuple[str, str]],
    repeats: int,
    folds: Index | None = None,
) -> dict[str, Any]:
    """Every model's figures and the differences of pairs, with 95 % intervals over patients.

    Returns:
        ``models`` by name, ``differences`` by "first minus second", and in ``ordered`` the settings that have enough
        patients of either kind for an AUC to mean something.
    """
    folds = np.zeros(len(target), dtype=np.int64) if folds is None else folds
    metrics = {name: metrics_against(judged, target, classes, folds) for name, judged in models.items()}
    flat: dict[str, Metric] = {f"{name}|{key}": metric for name, own in metrics.items() for key, metric in own.items()}
    for first, second in pairs:
        for key, metric in difference(metrics[first], metrics[second], COMPARED).items():
            flat[f"{first} minus {second}|{key}"] = metric
    found: dict[str, dict[str, Any]] = {}
    for name, value in cluster_bootstrap(patients, flat, repeats=repeats).items():
        model, key = name.split("|")
        found.setdefault(model, {})[key] = value
    return {
        "vertebrae": len(target),
        "patients": len(np.unique(patients)),
        "vertebrae_by_class": [int((classes == k).sum()) for k in range(3)],
        "ordered": [name for name, least in SETTINGS.items() if _can_be_ordered(classes >= least, patients)],
        "models": {name: found[name] for name in models},
        "differences": {f"{a} minus {b}": found[f"{a} minus {b}"] for a, b in pairs},
    }


def _can_be_ordered(positive: npt.NDArray[np.bool_], patients: npt.NDArray[np.str_]) -> bool:
    return min(len(np.unique(patients[positive])), len(np.unique(patients[~positive]))) >= MINIMUM_TO_ORDER


def in_subgroups(
    models: Mapping[str, Judged],
    target: npt.NDArray[np.float64],
    classes: Index,
    patients: npt.NDArray[np.str_],
    groups: Mapping[str, Index],
    repeats: int,
) -> dict[str, Any]:
    """MAE and bias of every model in each subgroup of at least `SUBGROUP_PATIENTS` patients, with intervals."""
    found: dict[str, Any] = {}
    for group, chosen in groups.items():
        names = patients[chosen]
        count = len(np.unique(names))
        if count < SUBGROUP_PATIENTS:
            continue
        flat: dict[str, Metric] = {}
        for name, judged in models.items():
            metrics = metrics_against(judged, target, classes, np.zeros(len(target), dtype=np.int64))
            for key in IN_SUBGROUPS:
                flat[f"{name}|{key}"] = lambda k, m=metrics[key], c=chosen: m(c[k])  # type: ignore[misc]
        own: dict[str, Any] = {}
        for label, value in cluster_bootstrap(names, flat, repeats=repeats).items():
            model, key = label.split("|")
            own.setdefault(model, {})[key] = value
        found[group] = {"patients": count, "vertebrae": len(chosen), **own}
    return found


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rule says.

    Attributes:
        verdicts: of "refit" and "affine", each against the deployed parent.
        recommended: what to deploy.
        reasons: in words, most important first.
    """

    verdicts: Mapping[str, Verdict]
    recommended: Choice
    reasons: tuple[str, ...]


def _text(value: Interval, digits: int = 3) -> str:
    return f"{value['value']:+.{digits}f} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


def _at_site(change: Mapping[str, Interval], ordered: Sequence[str]) -> Verdict:
    """A model against another one: error of BMD first, then the order of patients."""
    mae = change["mae"]
    orders = [change[f"{setting}_auc"] for setting in ordered]
    if mae["low"] > 0 or any(order["high"] < 0 for order in orders):
        return "worse"
    if mae["high"] < 0:
        return "better"
    if mae["low"] >= -MARGIN_G_CM2 and mae["high"] <= MARGIN_G_CM2:
        return "better" if any(order["low"] > 0 for order in orders) else "equal"
    return "not_enough_data"


def harms_others(change: Mapping[str, Interval], ordered: Sequence[str]) -> list[str]:
    """Which figures on other devices are not shown to be within the margin; empty when all are."""
    found = []
    if not change["mae"]["high"] <= MARGIN_G_CM2:
        found.append(f"MAE {_text(change['mae'])} g/cm2, margin {MARGIN_G_CM2:g}")
    for setting in ordered:
        if not change[f"{setting}_auc"]["low"] >= -MARGIN_AUC:
            found.append(f"AUC of {setting} {_text(change[f'{setting}_auc'])}, margin {MARGIN_AUC:g}")
    return found


def decide(at_site: Mapping[str, Any], elsewhere: Mapping[str, Any], notes: Sequence[str] = ()) -> Decision:
    """The rule.

    A refit is "better" when its error at the site is smaller than the deployed bundle's with the whole interval (or as
    large and patients are ordered better), "worse" when larger or when other devices are not shown to stay within the
    margins, "equal" when the interval lies within the margin, else the data do not suffice. The recalibrated BMD is
    recommended wherever it is better than the deployed bundle and the refit is not shown to be better still.

    Args:
        at_site: of `compare`: "refit minus parent", "affine minus parent" and "refit minus affine" on held-out patients
            of the site.
        elsewhere: of `compare`: "refit minus parent" and "affine minus parent" on held-out patients of other devices.
        notes: further reasons.
    """
    site, others = at_site["differences"], elsewhere["differences"]
    refit = _at_site(site["refit minus parent"], at_site["ordered"])
    affine = _at_site(site["affine minus parent"], at_site["ordered"])
    reasons = [
        f"refit minus deployed at the site: MAE {_text(site['refit minus parent']['mae'])} g/cm2: {refit}",
        f"recalibrated BMD minus deployed at the site: MAE {_text(site['affine minus parent']['mae'])} g/cm2: {affine}",
    ]
    harm = harms_others(others["refit minus parent"], elsewhere["ordered"])
    if harm:
        reasons.append("the refit is not shown to keep other devices: " + "; ".join(harm))
        refit = "worse"
    else:
        reasons.append("the refit keeps other devices within the margins")
    moved = harms_others(others["affine minus parent"], elsewhere["ordered"])
    versus = site["refit minus affine"]
    beats = versus["mae"]["high"] < 0 or (
        versus["mae"]["high"] <= MARGIN_G_CM2 and any(versus[f"{s}_auc"]["low"] > 0 for s in at_site["ordered"])
    )
    reasons.append(
        f"refit minus recalibrated BMD: MAE {_text(versus['mae'])} g/cm2: "
        + ("the refit is better" if beats else "the recalibrated BMD is no worse")
    )
    recommended: Choice = "parent"
    if refit == "better" and (beats or affine != "better"):
        recommended = "refit"
    elif affine == "better":
        recommended = "affine"
        if moved:
            reasons.append(
                "the recalibration holds for this site alone; on other devices it moves: " + "; ".join(moved)
            )
    return Decision({"refit": refit, "affine": affine}, recommended, (*reasons, *notes))


def document(
    decision: Decision, candidate: Literal["refit", "affine"], lineage: Mapping[str, Any], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """docs/verdict.json of a candidate bundle; NaN, which JSON does not know, becomes null."""
    return dict(
        _plain(
            {
                "schema": SCHEMA,
                "candidate": candidate,
                "verdict": decision.verdicts[candidate],
                "recommended": decision.recommended,
                "reasons": list(decision.reasons),
                "margins": {"mae_g_cm2": MARGIN_G_CM2, "auc": MARGIN_AUC},
                "lineage": dict(lineage),
                "figures": dict(figures),
            }
        )
    )


def refusal(reason: str, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """verdict.json where labels allow no refit: there is no candidate."""
    return {
        "schema": SCHEMA,
        "candidate": None,
        "verdict": "not_enough_data",
        "recommended": "parent",
        "reasons": [reason],
        "margins": {"mae_g_cm2": MARGIN_G_CM2, "auc": MARGIN_AUC},
        "lineage": dict(lineage),
        "figures": {},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def as_text(verdict: Mapping[str, Any]) -> str:
    """A verdict for people."""
    lines = [f"verdict: {verdict['verdict'].replace('_', ' ')}", f"recommended: {verdict['recommended']}"]
    lines += [f"- {reason}" for reason in verdict["reasons"]]
    return "\n".join(lines) + "\n"


def as_json(verdict: Mapping[str, Any]) -> bytes:
    """With a new line at the end."""
    return (json.dumps(verdict, indent=1, allow_nan=False) + "\n").encode()
