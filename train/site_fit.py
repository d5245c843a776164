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
from osteo_daemon.network.multitask import UNKNOWN_LEVEL, MoEOutput, MultitaskMoE
from train.calibrate import fit_calibration
from train.data import VoiSet
from train.evaluate import Raw, judged_of
from train.features import Features
from train.judging import Vec, operating_points
from train.losses import bmd_loss, diagnosis_loss
from train.optim import learning_rate_at
from train.replay import Replay
from train.site_data import Index, deal
from train.site_experts import grown, pull_share, trained_parameters

_CLIP: Final = 1.0


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How to fit.

    Attributes:
        strengths: of the pull to the parent, strongest first; infinity leaves the parent as it is.
        steps: of each fit.
        batch_size: vertebrae of the site in a step, and as many of the replay set.
        learning_rate: peak of Adam's.
        replay: weight of the replay set.
        gate: weight of the gate's supervision.
        level: weight of the level task.
        hide_level: share of samples whose level is withheld.
        outer_folds: for the verdict.
        inner_folds: for the strength and the calibration.
        repeats: of the bootstrap behind the verdict's intervals; a quarter of it in subgroups.
        seed: of everything random.
    """

    strengths: tuple[float, ...] = (math.inf, 1.0, 0.1, 0.01)
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 5e-3
    replay: float = 2.0
    gate: float = 1.0
    level: float = 0.25
    hide_level: float = 0.15
    outer_folds: int = 5
    inner_folds: int = 3
    repeats: int = 500
    seed: int = 0

    @property
    def fits(self) -> int:
        """Fits of a whole refit, for the progress bar."""
        strengths = sum(math.isfinite(s) for s in self.strengths)
        return (self.outer_folds + 1) * (self.inner_folds * strengths + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Everything that a fit works on.

    Attributes:
        parent: the deployed network.
        copied: for each expert of the site that is appended, the parent's expert to begin from, or None.
        expert_of: (N,) long, the expert that stands for each labelled vertebra's densitometer, -1 for none.
        features: (N,) labelled vertebrae.
        target: (N,) readings in g/cm2.
        classes: (N,) their classes.
        patients: (N,) pseudonyms.
        rehearsed: the replay set to learn from.
        fits_classes: the diagnosis head may move.
        data, index: the rows behind the features.
    """

    parent: MultitaskMoE
    copied: tuple[int | None, ...]
    expert_of: Tensor
    features: Features
    target: Tensor
    classes: Tensor
    patients: np.ndarray[tuple[int], np.dtype[np.str_]]
    rehearsed: Replay
    fits_classes: bool
    data: VoiSet
    index: Index

    @property
    def grain(self) -> Tensor:
        """Noise and sharpness of the site's vertebrae and of others, by which the gates' channel is standardised."""
        return torch.cat([self.features.grain, self.rehearsed.features.grain])

    @property
    def site_experts(self) -> list[int]:
        """Experts of the grown network that are the site's, in ascending order."""
        return sorted({int(e) for e in self.expert_of.unique() if e >= 0})


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


def network_with(pool: Pool, moved: dict[str, Tensor]) -> MultitaskMoE:
    """The grown network with fitted weights; the parent itself when nothing was moved."""
    if not moved:
        return pool.parent
    network = grown(pool.parent, pool.copied, pool.grain)
    network.load_state_dict({**network.state_dict(), **moved})
    return network.eval()


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
    said = _parent_says(pool)
    optimiser = torch.optim.Adam(moved.values(), lr=config.learning_rate)
    classes = pool.classes[torch.as_tensor(chosen)]
    prior = torch.bincount(classes, minlength=len(CLASSES)).float() / len(classes)
    rng = np.random.default_rng([*seed, config.seed])
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, config.steps, config.learning_rate, max(1, config.steps // 20))
        own = rng.choice(chosen, min(config.batch_size, len(chosen)), replace=False)
        old = rng.choice(len(pool.rehearsed), min(config.batch_size, len(pool.rehearsed)), replace=False)
        loss = _site_loss(network, pool, own, prior, config, rng)
        loss = loss + config.replay * _replay_loss(network, pool, old, said, config, rng)
        pull = torch.stack([share[name] * (moved[name] - start[name]).square().sum() for name in share]).sum()
        loss = loss + strength * pull
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(moved.values(), _CLIP)
        optimiser.step()
    return {name: value.detach().clone() for name, value in moved.items()}


def _parent_says(pool: Pool) -> MoEOutput:
    with torch.no_grad():
        return pool.parent.decide(pool.rehearsed.features.encoded(pool.parent), pool.rehearsed.features.level)


def _hidden(level: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    hide = torch.from_numpy(rng.random(len(level)) < share)
    return torch.where(hide, torch.full_like(level, UNKNOWN_LEVEL), level)


def _site_loss(
    network: MultitaskMoE, pool: Pool, chosen: Index, prior: Tensor, config: FitConfig, rng: np.random.Generator
) -> Tensor:
    where = torch.as_tensor(chosen)
    features = pool.features.take(where)
    out = network.decide(features.encoded(network), _hidden(features.level, config.hide_level, rng))
    loss = bmd_loss(out.bmd, out.bmd_log_variance, pool.target[where], network.config.bmd_scale_g_cm2, 0.5)
    loss = loss + config.level * functional.cross_entropy(out.level_logits, features.level)
    if pool.fits_classes:
        loss = loss + diagnosis_loss(out.class_logits, pool.classes[where], prior, 0.0)
    experts = pool.expert_of[where]
    known = experts >= 0
    if bool(known.any()):
        gates = out.gate_logits[known]
        wanted = experts[known, None].expand(-1, gates.shape[1])
        loss = loss + config.gate * functional.cross_entropy(gates.flatten(0, 1), wanted.flatten())
    return loss


def _replay_loss(
    network: MultitaskMoE, pool: Pool, chosen: Index, said: MoEOutput, config: FitConfig, rng: np.random.Generator
) -> Tensor:
    """What the parent said, said again; levels withheld on both sides alike would need the parent twice, so they
    are given."""
    where = torch.as_tensor(chosen)
    features = pool.rehearsed.features.take(where)
    out = network.decide(features.encoded(network), features.level)
    scale = network.config.bmd_scale_g_cm2
    loss = ((out.bmd - said.bmd[where]) / scale).square().mean()
    loss = loss + 0.1 * (out.bmd_log_variance - said.bmd_log_variance[where]).square().mean()
    loss = loss + _kept_probability(out.class_logits, said.class_logits[where])
    wanted = said.level_logits[where].softmax(1)
    loss = loss + config.level * _divergence(out.level_logits, wanted)
    # the parent's own gate, and nothing for experts that it had not
    gate = functional.pad(said.gate_logits[where].softmax(-1), (0, len(pool.copied)))
    return loss + config.gate * _divergence(out.gate_logits, gate)


def _kept_probability(logits: Tensor, said: Tensor) -> Tensor:
    if logits.shape[1] == len(CLASSES):
        return _divergence(logits, said.softmax(1))
    wanted = said.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(said, wanted)
    return functional.binary_cross_entropy_with_logits(logits, wanted) - entropy


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback and Leibler's, mean over all but the last axis."""
    return (torch.xlogy(wanted, wanted) - wanted * logits.log_softmax(-1)).sum(-1).mean()


def say(network: MultitaskMoE, pool: Pool, chosen: Index) -> Raw:
    """Uncalibrated output for places in the pool."""
    features = pool.features.take(chosen)
    return raw_of(network, features, pool.index[chosen])


def raw_of(network: MultitaskMoE, features: Features, index: Index) -> Raw:
    """Uncalibrated output for features, as arrays."""
    with torch.inference_mode():
        out = network.eval().decide(features.encoded(network), features.level)
    return Raw(
        index=index,
        class_logits=out.class_logits.double().numpy(),
        bmd=out.bmd.double().numpy(),
        bmd_sd=(0.5 * out.bmd_log_variance).exp().double().numpy(),
        level_logits=out.level_logits.double().numpy(),
        gate_weights=out.gate_weights.mean(1).double().numpy(),
    )


def joined(parts: Sequence[Raw]) -> Raw:
    """One after another."""
    return Raw(*(np.concatenate([getattr(part, name) for part in parts]) for name in Raw.__dataclass_fields__))


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
            parts.append(_widened(say(network_with(pool, made), pool, chosen[folds == fold]), pool))
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


def _widened(raw: Raw, pool: Pool) -> Raw:
    """Gate weights of the parent with nothing for the site's experts, so that all have one width."""
    missing = pool.parent.config.expert_count + len(pool.copied) - raw.gate_weights.shape[1]
    padded = np.pad(raw.gate_weights, ((0, 0), (0, missing)))
    return Raw(raw.index, raw.class_logits, raw.bmd, raw.bmd_sd, raw.level_logits, padded)
