"""A refit judged by cross-fitting: every model speaks of patients that it has not seen, and the rule decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from osteo_daemon.network.config import BmdScale, Calibration
from train.competitors import affine, core_hu, hu_line
from train.evaluate import judged_of
from train.judging import Judged, subgroups
from train.replay import Replay
from train.routed import NOWHERE, Routed, reordered
from train.site_config import FitConfig
from train.site_data import Index, SiteData, deal
from train.site_fit import FitStore, Fitted, fit_procedure
from train.site_pool import Pool, network_with, say
from train.verdict import Decision, compare, decide, in_subgroups

_HALF: Final = np.full(2, 0.5)
_PAIRS: Final = (("refit", "parent"), ("affine", "parent"), ("refit", "affine"), ("refit", "hu_line"))


def cross_fitted(
    pool: Pool, site: SiteData, deployed: Routed, scale: BmdScale, config: FitConfig, store: FitStore
) -> dict[str, Judged]:
    """What every model says of each patient when it has not seen that patient, in the order of ``site.index``."""
    folds = deal(pool.patients, site.classes, config.outer_folds, config.seed)
    levels = [row.level for row in site.rows]
    hu = core_hu(pool.parent, pool.features)
    parts: dict[str, list[Judged]] = {"parent": [], "refit": [], "affine": [], "hu_line": []}
    order = []
    for fold in range(config.outer_folds):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        order.append(unseen)
        before, raw = say(pool.parent, pool, seen), say(pool.parent, pool, unseen)
        names = [site.scanner_of_rows[i] for i in unseen]
        parts["parent"].append(deployed.judged(pool.features.take(unseen), pool.index[unseen], names))
        parts["affine"].append(judged_of(raw, affine(before, site.target[seen], pool.data), _HALF))
        parts["hu_line"].append(hu_line(hu, levels, site.target, site.classes, seen, unseen, scale, site.index))
        fitted = fit_procedure(pool, seen, config, store, f"fold{fold}", fold)
        parts["refit"].append(judged_of(say(network_with(pool, fitted.moved), pool, unseen), fitted.calibration, _HALF))
    back = np.argsort(np.concatenate(order))
    return {name: reordered(several, back) for name, several in parts.items()}


def judge(
    pool: Pool,
    site: SiteData,
    models: dict[str, Judged],
    held: Replay,
    fitted: Fitted,
    recalibrated: Calibration,
    deployed: Routed,
    config: FitConfig,
    notes: tuple[str, ...],
) -> tuple[dict[str, Any], Decision]:
    """Figures at the site, on other devices and in subgroups, and what the rule makes of them.

    Args:
        models: of `cross_fitted`.
        held: the half of the replay set that was not rehearsed.
        fitted: the candidate, made from all patients.
        recalibrated: the parent's calibration with a line of the site's readings.
        deployed: the parent as it answers.
        notes: for the reader of the verdict.
    """
    folds = deal(pool.patients, site.classes, config.outer_folds, config.seed)
    at_site = compare(models, site.target, site.classes, site.patients, _PAIRS, config.repeats, folds)
    measured = held.take(torch.isfinite(held.sbmd).nonzero().squeeze(1))
    rows = np.arange(len(measured))
    candidates = {
        "refit": (network_with(pool, fitted.moved), fitted.calibration),
        "affine": (pool.parent, recalibrated),
    }
    # virtual patients of the parent's own sites: no header of theirs names a scanner of this one
    others_scanners = [NOWHERE] * len(measured)
    elsewhere = {"parent": deployed.judged(measured.features, rows, others_scanners)}
    unbound = dict(elsewhere)
    for name, (network, calibration) in candidates.items():
        routed = deployed.candidate(network, calibration, site.scanners)
        elsewhere[name] = routed.judged(measured.features, rows, others_scanners)
        unbound[name] = replace(routed, scanners=None).judged(measured.features, rows, others_scanners)
    truth = measured.sbmd.double().numpy()
    classes, names = measured.diagnosis.numpy(), np.array([str(n) for n in measured.patient.tolist()])
    others = compare(elsewhere, truth, classes, names, _PAIRS[:2], config.repeats)
    by_device = {f"device {d}": np.flatnonzero(measured.device.numpy() == d) for d in measured.device.unique().tolist()}
    groups = _groups(site)
    figures = {
        "site": at_site,
        "others": others,
        "others_without_scope": compare(unbound, truth, classes, names, _PAIRS[:2], config.repeats),
        "scanners": None if site.scanners is None else [list(name) for name in sorted(site.scanners)],
        "others_by_device": in_subgroups(elsewhere, truth, classes, names, by_device, config.repeats // 4),
        "subgroups": in_subgroups(models, site.target, site.classes, site.patients, groups, config.repeats // 4),
        "devices": list(site.devices),
        "strength": fitted.strength,
        "outer_folds": config.outer_folds,
    }
    return figures, decide(at_site, others, notes)


def _groups(site: SiteData) -> dict[str, Index]:
    """Subgroups, each level one of them; who has no age or sex belongs to no group of it."""
    ages = np.array([row.age_years for row in site.rows])
    found = {
        name: chosen[ages[chosen] >= 0] if name.startswith("age ") else chosen
        for name, chosen in subgroups(site.rows).items()
        if name != "sex "
    }
    levels = np.array([row.level for row in site.rows])
    return {**found, **{f"level {name}": np.flatnonzero(levels == name) for name in np.unique(levels)}}
