"""Fit a site's experts, the gates and the heads on frozen features, with replay and shrinkage towards the parent.

The loss has three parts: the site's readings; what the parent says of the replay set, which the refitted network shall
go on saying (distillation, as in Li and Hoiem 2016 and Buzzega 2020, but of features instead of images); and the
squared distance of the weights to the parent's (L2-SP, Li, Grandvalet and Davoine 2018). How strong that pull is, is
chosen on inner folds of the same patients. Endlessly strong is among the choices: the parent's weights come back
untouched unless another choice is better by more than one standard error over patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from osteo_daemon.network.config import CLASSES, Calibration
from train.calibrate import fit_calibration
from train.evaluate import Raw, judged_of
from train.judging import Vec, operating_points
from train.optim import learning_rate_at
from train.site_config import FitConfig
from train.site_data import Index, deal
from train.site_experts import grown, pull_share, trained_parameters
from train.site_loss import parent_says, replay_loss, site_loss
from train.site_pool import Pool, joined, network_with, say, widened

_CLIP: Final = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A fitted network's moved weights with its calibration; what else it has is the parent's."""

    moved: dict[str, Tensor]
    strength: float
    calibration: Calibration
    operating: Vec


class FitStore:
    """Results of single fits on disk: a refit that was killed finds them again.

    Args:
        folder: for one parent, one data set and one configuration alone.
        progress: is told of every fit that is done.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._progress = progress

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of that name, made when they are not there."""
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            temporary = path.with_suffix(".part")
            save_file(make(), temporary)
            temporary.replace(path)
        self._progress(1)
        return dict(load_file(path))


def fit(pool: Pool, chosen: Index, strength: float, config: FitConfig, seed: Sequence[int]) -> dict[str, Tensor]:
    """Fit on the chosen vertebrae; gives the moved weights by name.

    Args:
        chosen: places in the pool.
        strength: of the pull to the parent; infinity fits nothing.
        seed: of this fit.
    """
    if not math.isfinite(strength):
        return {}
    torch.manual_seed(int(np.random.SeedSequence([config.seed, 81]).generate_state(1)[0]))  # a new expert's first layer
    network = grown(pool.parent, pool.copied, pool.grain)
    moved = trained_parameters(network, pool.site_experts, pool.fits_classes)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in moved.values():
        parameter.requires_grad_(True)
    start = {name: value.detach().clone() for name, value in moved.items()}
    shares = {name: pull_share(name, pool.site_experts) for name in moved}
    share = {name: value for name, value in shares.items() if value > 0}
    said = parent_says(pool)
    optimiser = torch.optim.Adam(moved.values(), lr=config.learning_rate)
    classes = pool.classes[torch.as_tensor(chosen)]
    prior = torch.bincount(classes, minlength=len(CLASSES)).float() / len(classes)
    rehearsal = config.replay_in_scope if pool.scoped else config.replay
    rng = np.random.default_rng([*seed, config.seed])
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, config.steps, config.learning_rate, max(1, config.steps // 20))
        own = rng.choice(chosen, min(config.batch_size, len(chosen)), replace=False)
        old = rng.choice(len(pool.rehearsed), min(config.batch_size, len(pool.rehearsed)), replace=False)
        loss = site_loss(network, pool, own, prior, config, rng)
        loss = loss + rehearsal * replay_loss(network, pool, old, said, config, rng)
        pull = torch.stack([share[name] * (moved[name] - start[name]).square().sum() for name in share]).sum()
        loss = loss + strength * pull
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(moved.values(), _CLIP)
        optimiser.step()
    return {name: value.detach().clone() for name, value in moved.items()}


def scores(raw: Raw, target: Vec, classes: Tensor, scale: float, with_classes: bool) -> Vec:
    """(N,) what the inner folds compare: half the squared error of BMD in units of its scale, and the class's loss."""
    value = 0.5 * np.square((raw.bmd - target) / scale)
    if not with_classes:
        return np.asarray(value)
    logits = torch.from_numpy(raw.class_logits)
    if logits.shape[1] == len(CLASSES):
        loss = functional.cross_entropy(logits, classes, reduction="none")
    else:
        worse = (classes[:, None] > torch.arange(len(CLASSES) - 1)[None]).double()
        loss = functional.binary_cross_entropy_with_logits(logits, worse, reduction="none").mean(1)
    return np.asarray(value + loss.numpy())


def choose_strength(by_strength: dict[float, Vec], patients: np.ndarray[tuple[int], np.dtype[np.str_]]) -> float:
    """The best pull over patients; the parent where that isn't worse by more than one standard error of the gap."""
    names, inverse = np.unique(patients, return_inverse=True)

    def per_patient(values: Vec) -> Vec:
        return np.asarray(np.bincount(inverse, values) / np.bincount(inverse))

    means = {strength: per_patient(values) for strength, values in by_strength.items()}
    best = min(means, key=lambda strength: float(means[strength].mean()))
    if math.inf in means:
        gap = means[math.inf] - means[best]
        if gap.mean() <= gap.std(ddof=1) / math.sqrt(len(names)):
            return math.inf
    return best


def fit_procedure(pool: Pool, chosen: Index, config: FitConfig, store: FitStore, name: str, seed: int) -> Fitted:
    """All that makes a candidate, on the chosen vertebrae alone: strength and calibration from inner folds, then a fit.

    Args:
        name: of this call, for the store.
        seed: of this call.
    """
    folds = deal(pool.patients[chosen], pool.classes.numpy()[chosen], config.inner_folds, 1000 * config.seed + seed)
    order = np.concatenate([chosen[folds == fold] for fold in range(config.inner_folds)])
    target, classes = pool.target.double().numpy()[order], pool.classes[torch.as_tensor(order)]
    out_of_fold: dict[float, Raw] = {}
    for place, strength in enumerate(config.strengths):
        parts = []
        for fold in range(config.inner_folds):
            rows, key = chosen[folds != fold], [seed, place, fold]
            made: dict[str, Tensor] = {}
            if math.isfinite(strength):
                made = store.get(f"{name}-{place}-{fold}", partial(fit, pool, rows, strength, config, key))
            parts.append(widened(say(network_with(pool, made), pool, chosen[folds == fold]), pool))
        out_of_fold[strength] = joined(parts)
    scale = pool.parent.config.bmd_scale_g_cm2
    strength = choose_strength(
        {s: scores(raw, target, classes, scale, pool.fits_classes) for s, raw in out_of_fold.items()},
        pool.patients[order],
    )
    raw = out_of_fold[strength]
    calibration = fit_calibration(raw.class_logits, raw.level_logits, raw.bmd, raw.bmd_sd, raw.index, pool.data)
    probability = judged_of(raw, calibration, np.full(2, np.nan)).probability
    operating = operating_points(probability, classes.numpy())
    if math.isfinite(strength):
        moved = store.get(f"{name}-whole", partial(fit, pool, chosen, strength, config, [seed, 99, 99]))
    else:
        moved = {}
    return Fitted(moved, strength, calibration, operating)
