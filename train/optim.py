"""AdamW with a warm-up and cosine schedule, and an exponential moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def adamw(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, thresholds and embeddings (fewer than two dimensions or named so) aren't decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate)


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int, floor_share: float = 0.01) -> float:
    """Linear from zero to ``peak`` over the warm-up, then a half cosine down to ``floor_share * peak``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (floor_share + (1 - floor_share) * 0.5 * (1 + math.cos(math.pi * share)))


class MovingAverage:
    """Exponential moving average of a network's state, with a short memory at the start."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move towards the network's present weights; buffers that are no weights are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = {name for name, _ in network.named_parameters()}
        with torch.no_grad():
            for name, value in network.state_dict().items():
                if name in trained:
                    self.state[name].lerp_(value.to(self.state[name]), 1 - decay)
                else:
                    self.state[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "state": self.state}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.updates = int(values["updates"])
        state: dict[str, Tensor] = values["state"]
        for name, value in state.items():
            self.state[name].copy_(value)
