"""The loss of a refit: the site's readings, and what the parent says of the replay set, said again.

The second part is distillation (as in Li and Hoiem 2016 and Buzzega 2020, but of features instead of images); the pull
towards the parent's weights is added in `train.site_fit`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from osteo_daemon.network.config import CLASSES
from osteo_daemon.network.multitask import UNKNOWN_LEVEL, MoEOutput, MultitaskMoE
from train.losses import bmd_loss, diagnosis_loss
from train.site_config import FitConfig
from train.site_data import Index
from train.site_pool import Pool


def parent_says(pool: Pool) -> MoEOutput:
    """What the deployed network says of the whole replay set."""
    with torch.no_grad():
        return pool.parent.decide(pool.rehearsed.features.encoded(pool.parent), pool.rehearsed.features.level)


def site_loss(
    network: MultitaskMoE, pool: Pool, chosen: Index, prior: Tensor, config: FitConfig, rng: np.random.Generator
) -> Tensor:
    """BMD, level and, where enough are known, class of the chosen labelled vertebrae; gates point at the site's expert.

    Args:
        chosen: places in the pool.
        prior: (3,) shares of the classes.
    """
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


def replay_loss(
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


def _hidden(level: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    hide = torch.from_numpy(rng.random(len(level)) < share)
    return torch.where(hide, torch.full_like(level, UNKNOWN_LEVEL), level)


def _kept_probability(logits: Tensor, said: Tensor) -> Tensor:
    if logits.shape[1] == len(CLASSES):
        return _divergence(logits, said.softmax(1))
    wanted = said.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(said, wanted)
    return functional.binary_cross_entropy_with_logits(logits, wanted) - entropy


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback and Leibler's, mean over all but the last axis."""
    return (torch.xlogy(wanted, wanted) - wanted * logits.log_softmax(-1)).sum(-1).mean()
