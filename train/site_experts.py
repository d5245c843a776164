"""A parent network with further experts for a site, which at first says exactly what the parent says.

A warm expert is a copy of the parent's expert of the same densitometer and shares that expert's gate weight; a new one
adds nothing until it is fitted and gets little of the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, cast

import torch
from torch import Tensor, nn

from osteo_daemon.network.moe import Router
from osteo_daemon.network.multitask import MultitaskMoE

_NEW_LOGIT: Final = -3.0
"""Of a new expert's gate, before the temperature: below the others of an undecided gate."""
_PULL_OF_GATES: Final = 0.01


def grown(parent: MultitaskMoE, copied: Sequence[int | None], grain: Tensor | None = None) -> MultitaskMoE:
    """The parent with one expert more for each entry, and gates that see noise and sharpness.

    Args:
        copied: the parent's expert to begin from, None for a new one.
        grain: (N, G) statistics of noise and sharpness to standardise by, for a parent whose gates don't see them yet:
            pooled features of its encoder don't tell scanners apart.
    """
    config = parent.config
    opened = grain is not None and config.grain_channel == "none"
    network = MultitaskMoE(
        replace(
            config,
            expert_count=config.expert_count + len(copied),
            grain_channel="gates" if opened else config.grain_channel,
        )
    )
    if opened and network.grain_statistics is not None and grain is not None:
        network.grain_statistics.fit(grain)
    state = dict(parent.state_dict())
    own = network.state_dict()
    for offset, source in enumerate(copied):
        place = config.expert_count + offset
        for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
            key = f"experts.experts.{place}.{part}"
            if source is not None:
                state[key] = state[f"experts.experts.{source}.{part}"].clone()
            else:
                state[key] = torch.zeros_like(own[key]) if part.startswith("2") else own[key].clone()
    for number in range(len(parent.routers)):
        _grow_router(state, f"routers.{number}", copied, config.gate_temperature)
    # a channel that was opened says nothing until it is fitted
    state |= {
        key: torch.zeros_like(value) if ".by_grain.2." in key else value
        for key, value in own.items()
        if key not in state
    }
    network.load_state_dict(state)
    return network.eval()


def _grow_router(state: dict[str, Tensor], name: str, copied: Sequence[int | None], temperature: float) -> None:
    """Add rows to the gate; an expert and its copies share what it had."""
    heirs = {source: copied.count(source) + 1 for source in copied if source is not None}
    linear, last = (f"{name}.linear.{kind}" for kind in ("weight", "bias"))
    grain = [f"{name}.by_grain.2.{kind}" for kind in ("weight", "bias") if f"{name}.by_grain.2.{kind}" in state]
    bias = state[last].clone()
    for source, count in heirs.items():
        bias[source] -= math.log(count) * temperature
    fresh = bias.mean() + _NEW_LOGIT * temperature
    state[last] = torch.cat([bias, *((fresh if s is None else bias[s]).reshape(1) for s in copied)])
    for key in (linear, *grain):
        old = state[key]
        rows = [torch.zeros_like(old[:1]) if source is None else old[source : source + 1] for source in copied]
        state[key] = torch.cat([old, *rows])


def trained_parameters(network: MultitaskMoE, experts: Sequence[int], classes: bool) -> dict[str, nn.Parameter]:
    """What a refit moves, by name: the site's experts, the gates, the BMD head and, with ``classes``, the class head.

    Encoder, fusion, level head, level embedding and the experts of other devices stay as the parent's.
    """
    moved: dict[str, nn.Module] = {f"experts.experts.{e}": network.experts.experts[e] for e in experts}
    moved |= {f"routers.{n}": cast(Router, router) for n, router in enumerate(network.routers)}
    moved["bmd_head"] = network.bmd_head
    if classes:
        moved["class_head"] = network.class_head
    return {f"{name}.{key}": value for name, module in moved.items() for key, value in module.named_parameters()}


def pull_share(name: str, experts: Sequence[int]) -> float:
    """How much of the pull towards the parent a weight feels.

    None for the constants, as in ridge regression: a site's offset is no overfitting. Nearly none for the gates: which
    scanner a vertebra comes from is supervised by every vertebra of the site and of the replay set.
    """
    free = ("bmd_head.hidden.2.bias", "class_head.first", "class_head.linear.bias")
    if name in free or name in {f"experts.experts.{e}.2.bias" for e in experts}:
        return 0.0
    return _PULL_OF_GATES if name.startswith("routers.") else 1.0
