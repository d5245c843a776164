"""Losses of the three tasks and of the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from osteo_daemon.network.config import CLASSES
from osteo_daemon.network.multitask import MoEOutput
from train.data import NO_LABEL, Batch


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the sum; all ours, none is published.

    Attributes:
        diagnosis, bmd, level: the tasks.
        device: cross-entropy of the gate's first experts against the densitometer, annealed to zero by `device_share`.
        balance: squared coefficient of variation of the experts' total weight (Shazeer 2017).
        bmd_beta: exponent of the variance that weights the Gaussian likelihood (Seitzer 2022): 0 is the plain
            likelihood, 1 is like the squared error.
        logit_adjustment: tau of the prior added to the class logits in training (Menon 2021); 0 is off.
        device_epochs: share of the training after which the gate is no longer supervised.
    """

    diagnosis: float = 1.0
    bmd: float = 1.0
    level: float = 0.5
    device: float = 1.0
    balance: float = 0.02
    bmd_beta: float = 0.5
    logit_adjustment: float = 0.0
    device_epochs: float = 0.7

    def device_share(self, progress: float) -> float:
        """Weight of the gate's supervision after ``progress`` (0-1) of the training: falls linearly to zero."""
        return self.device * max(0.0, 1.0 - progress / self.device_epochs) if self.device_epochs > 0 else 0.0


def diagnosis_loss(logits: Tensor, target: Tensor, prior: Tensor, tau: float) -> Tensor:
    """Mean over labelled samples: CORAL's binary cross-entropies, or plain cross-entropy for K logits.

    Args:
        logits: (B, K - 1) or (B, K).
        target: (B,) class or `NO_LABEL`.
        prior: (K,) class frequencies of the training set.
        tau: strength of the logit adjustment.
    """
    labelled = target != NO_LABEL
    if not bool(labelled.any()):
        return logits.sum() * 0.0
    logits, target = logits[labelled], target[labelled]
    if logits.shape[1] == len(CLASSES):
        return functional.cross_entropy(logits + tau * prior.clamp_min(1e-6).log(), target)
    worse_prior = 1.0 - prior.cumsum(0)[:-1]
    adjusted = logits + tau * torch.logit(worse_prior.clamp(1e-3, 1 - 1e-3))
    worse = (target[:, None] > torch.arange(len(CLASSES) - 1, device=target.device)[None]).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(adjusted, worse)


def bmd_loss(mean: Tensor, log_variance: Tensor, target: Tensor, scale: float, beta: float) -> Tensor:
    """Beta-weighted Gaussian likelihood of the labelled samples, in units of ``scale`` so that weights compare."""
    labelled = torch.isfinite(target)
    if not bool(labelled.any()):
        return mean.sum() * 0.0
    residual = (mean[labelled] - target[labelled]) / scale
    log_variance = log_variance[labelled] - 2.0 * torch.log(torch.tensor(scale))
    variance = log_variance.exp()
    likelihood = 0.5 * (log_variance + residual.square() / variance)
    return (likelihood * variance.detach() ** beta).mean()


def device_loss(gate_logits: Tensor, device: Tensor, device_count: int) -> Tensor:
    """Cross-entropy of all gates' logits of the first ``device_count`` experts against the known densitometers."""
    known = device != NO_LABEL
    if device_count < 2 or not bool(known.any()):
        return gate_logits.sum() * 0.0
    gates = gate_logits[known]
    target = device[known, None].expand(-1, gates.shape[1])
    return functional.cross_entropy(gates.flatten(0, 1), target.flatten())


def balance_loss(gate_weights: Tensor) -> Tensor:
    """Squared coefficient of variation of each expert's total weight over the batch, mean over the gates."""
    importance = gate_weights.sum(0)
    return (importance.var(dim=1, unbiased=False) / importance.mean(dim=1).square().clamp_min(1e-9)).mean()


def total_loss(
    out: MoEOutput,
    batch: Batch,
    weights: LossWeights,
    *,
    prior: Tensor,
    bmd_scale: float,
    device_count: int,
    progress: float,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum and each part as a number for the log."""
    parts = {
        "diagnosis": (
            weights.diagnosis,
            diagnosis_loss(out.class_logits, batch.diagnosis, prior, weights.logit_adjustment),
        ),
        "bmd": (weights.bmd, bmd_loss(out.bmd, out.bmd_log_variance, batch.bmd, bmd_scale, weights.bmd_beta)),
        "level": (weights.level, functional.cross_entropy(out.level_logits, batch.level)),
        "device": (weights.device_share(progress), device_loss(out.gate_logits, batch.device, device_count)),
        "balance": (weights.balance, balance_loss(out.gate_weights)),
    }
    total = torch.stack([weight * value for weight, value in parts.values()]).sum()
    return total, {name: float(value.detach()) for name, (_, value) in parts.items()}
