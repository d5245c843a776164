"""Gated residual experts.

Routing is decided for each sample from its own image features: densely by default, over the ``top_k`` largest weights
renormalised, and by one router for all tasks or one for each (MMoE, Ma et al. 2018). Expert-choice routing, where
experts pick among the samples of a batch, is not offered: a patient's result must not depend on who shares the batch.
"""

from __future__ import annotations

from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn


class Gate(NamedTuple):
    """Gate of a batch: ``logits`` (B, E) before top-k, ``weights`` (B, E) that sum to 1."""

    logits: Tensor
    weights: Tensor


_GRAIN_WIDTH: Final = 32


class Router(nn.Module):
    """A linear gate over image features; dense softmax, or the k largest renormalised (Shazeer 2017, without noise).

    With ``grain`` statistics of noise and sharpness a small perceptron over them adds to the logits.

    With ``top_k`` 1 the renormalised weight is always 1: then the tasks send no gradient to the gate, and only its
    supervision and the load balance teach it. Use 2 or more.
    """

    def __init__(self, width: int, expert_count: int, top_k: int | None, temperature: float, grain: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, expert_count)
        self.top_k = top_k
        self.temperature = temperature
        # small first logits: all experts start equal
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.by_grain = (
            nn.Sequential(nn.Linear(grain, _GRAIN_WIDTH), nn.GELU(), nn.Linear(_GRAIN_WIDTH, expert_count))
            if grain
            else None
        )

    def forward(self, image_features: Tensor, grain: Tensor | None = None) -> Gate:
        """(B, F) image features and (B, G) standardised grain statistics to the gate of each sample."""
        logits = self.linear(self.norm(image_features))
        if self.by_grain is not None and grain is not None:
            logits = logits + cast(Tensor, self.by_grain(grain))
        logits = logits / self.temperature
        kept = logits
        if self.top_k is not None and self.top_k < logits.shape[1]:
            index = logits.topk(self.top_k, dim=1).indices
            kept = torch.full_like(logits, float("-inf")).scatter(1, index, logits.gather(1, index))
        return Gate(logits=logits, weights=kept.softmax(dim=1))


class Experts(nn.Module):
    """Expert e maps (B, F) features to a (B, F) residual by a two-layer perceptron of its own."""

    def __init__(self, width: int, hidden: int, expert_count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(expert_count)
        )

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Features plus the gate-weighted sum of the experts' residuals: (B, F), (B, E) to (B, F)."""
        normed = self.norm(features)
        residuals = torch.stack([expert(normed) for expert in self.experts], dim=1)
        return features + (weights.unsqueeze(-1) * residuals).sum(1)


def gate_entropy(weights: Tensor) -> Tensor:
    """(B, E) gate weights to (B,) entropies, as a share of the largest possible one: 0 one expert, 1 all alike."""
    experts = weights.shape[1]
    if experts == 1:
        return torch.zeros(weights.shape[0], dtype=weights.dtype, device=weights.device)
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(1)
    return entropy / torch.log(torch.tensor(float(experts), dtype=weights.dtype, device=weights.device))
