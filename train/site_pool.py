"""What a refit fits on: the site's labelled vertebrae as features, the replay set, and what a network says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from osteo_daemon.network.multitask import MultitaskMoE
from train.data import VoiSet
from train.evaluate import Raw
from train.features import Features
from train.replay import Replay
from train.site_data import Index
from train.site_experts import grown


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
        scoped: what is fitted speaks for the site's scanners alone.
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
    scoped: bool
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


def network_with(pool: Pool, moved: dict[str, Tensor]) -> MultitaskMoE:
    """The grown network with fitted weights; the parent itself when nothing was moved."""
    if not moved:
        return pool.parent
    network = grown(pool.parent, pool.copied, pool.grain)
    network.load_state_dict({**network.state_dict(), **moved})
    return network.eval()


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


def widened(raw: Raw, pool: Pool) -> Raw:
    """Gate weights of the parent with nothing for the site's experts, so that all have one width."""
    missing = pool.parent.config.expert_count + len(pool.copied) - raw.gate_weights.shape[1]
    padded = np.pad(raw.gate_weights, ((0, 0), (0, missing)))
    return Raw(raw.index, raw.class_logits, raw.bmd, raw.bmd_sd, raw.level_logits, padded)
