"""Losses of the three tasks and of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
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
        balance: weight of `balance_loss`.
        balance_kind: "importance" or "switch" of it.
        bmd_beta: exponent of the variance that weights the Gaussian likelihood (Seitzer 2022): 0 is the plain
            likelihood, 1 is like the squared error.
        logit_adjustment: tau of the prior added to the class logits in training (Menon 2021); 0 is off.
        device_epochs: share of the training after which the gate is no longer supervised.
        twin: weight of `twin_loss`; more than 0 makes every batch one of twins (`train.data.batches`).
        learned: the tasks' weights are divided by variances that are learnt beside the network (`TaskVariances`).
    """

    diagnosis: float = 1.0
    bmd: float = 1.0
    level: float = 0.5
    device: float = 1.0
    balance: float = 0.02
    balance_kind: Literal["importance", "switch"] = "importance"
    bmd_beta: float = 0.5
    logit_adjustment: float = 0.0
    device_epochs: float = 0.7
    twin: float = 0.0
    learned: bool = False

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


def twin_loss(mean: Tensor, added: Tensor, scale: float) -> Tensor:
    """How far twins differ by anything but density, size and name: mean square, in units of ``scale``.

    Both show one vertebra of one patient, so the difference of their true BMD is what the changes of these added, to
    the last digit: the patient's own residual and the densitometer's error, which drown that slope among patients,
    cancel out. Coarser slices and other surroundings must make no difference.

    Args:
        mean: (B,) predicted BMD in g/cm2, twins ``B / 2`` apart.
        added: (B,) what the changes added to each, in g/cm2.
    """
    rest = (mean - added) / scale
    first, second = rest.chunk(2)
    return (first - second).square().mean()


def device_loss(gate_logits: Tensor, device: Tensor, device_count: int) -> Tensor:
    """Cross-entropy of all gates' logits of the first ``device_count`` experts against the known densitometers."""
    known = device != NO_LABEL
    if device_count < 2 or not bool(known.any()):
        return gate_logits.sum() * 0.0
    gates = gate_logits[known]
    target = device[known, None].expand(-1, gates.shape[1])
    return functional.cross_entropy(gates.flatten(0, 1), target.flatten())


def balance_loss(gate_logits: Tensor, gate_weights: Tensor, kind: Literal["importance", "switch"]) -> Tensor:
    """How unevenly a batch uses the experts, mean over the gates; 0 when all are used alike.

    Args:
        gate_logits, gate_weights: (B, T, E) before and after top-k.
        kind: "importance" is the squared coefficient of variation of each expert's total weight (Shazeer 2017);
            "switch" is ``E sum(f P) - 1`` with the share f of samples whose largest weight an expert has and its mean
            probability P before top-k (Fedus 2022), so that experts that top-k left out are pulled in, too.
    """
    if kind == "switch":
        experts = gate_logits.shape[-1]
        first = functional.one_hot(gate_logits.argmax(-1), experts).to(gate_logits.dtype).mean(0)
        return (experts * (first * gate_logits.softmax(-1).mean(0)).sum(-1)).mean() - 1.0
    importance = gate_weights.sum(0)
    return (importance.var(dim=1, unbiased=False) / importance.mean(dim=1).square().clamp_min(1e-9)).mean()


class TaskVariances(nn.Module):
    """Homoscedastic uncertainty of each task (Kendall, Gal and Cipolla 2018), three log variances that start at
    zero."""

    TASKS: Final = ("diagnosis", "bmd", "level")

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(len(self.TASKS)))

    def forward(self, losses: Tensor) -> Tensor:
        """(3,) weighted losses in the order of `TASKS` to ``sum exp(-s) * loss + s / 2``."""
        return (losses * (-self.log_variance).exp() + 0.5 * self.log_variance).sum()


def total_loss(
    out: MoEOutput,
    batch: Batch,
    weights: LossWeights,
    *,
    prior: Tensor,
    bmd_scale: float,
    device_count: int,
    progress: float,
    variances: TaskVariances | None = None,
    twins: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum and each part as a number for the log; ``twins`` says that the batch is one of twins."""
    parts = {
        "diagnosis": (
            weights.diagnosis,
            diagnosis_loss(out.class_logits, batch.diagnosis, prior, weights.logit_adjustment),
        ),
        "bmd": (weights.bmd, bmd_loss(out.bmd, out.bmd_log_variance, batch.bmd, bmd_scale, weights.bmd_beta)),
        "level": (weights.level, functional.cross_entropy(out.level_logits, batch.level)),
        **({"twin": (weights.twin, twin_loss(out.bmd, batch.added, bmd_scale))} if twins else {}),
        "device": (weights.device_share(progress), device_loss(out.gate_logits, batch.device, device_count)),
        "balance": (weights.balance, balance_loss(out.gate_logits, out.gate_weights, weights.balance_kind)),
    }
    weighted = torch.stack([weight * value for weight, value in parts.values()])
    if variances is None:
        total = weighted.sum()
    else:
        tasks = len(variances.TASKS)
        total = variances(weighted[:tasks]) + weighted[tasks:].sum()
    return total, {name: float(value.detach()) for name, (_, value) in parts.items()}
