"""The multitask mixture-of-experts network: one vertebra in, diagnosis, BMD and level out."""

from __future__ import annotations

from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from osteo_daemon.network.config import CLASSES, MoEConfig
from osteo_daemon.network.encoder import HU_STATISTICS, GrainStatistics, HuStatistics, VertebraEncoder
from osteo_daemon.network.heads import BmdHead, OrdinalHead, SoftmaxHead
from osteo_daemon.network.moe import Experts, Gate, Router

UNKNOWN_LEVEL: Final = -1
"""Level index of a vertebra whose name is not known; it has an embedding of its own."""


class MoEOutput(NamedTuple):
    """What the network says of a batch of B vertebrae, before calibration.

    Attributes:
        class_logits: (B, K - 1) cumulative (ordinal head) or (B, K) logits.
        bmd: (B,) BMD in g/cm2 on the scale of the training labels.
        bmd_log_variance: (B,) log of the variance in (g/cm2)^2.
        level_logits: (B, L).
        gate_logits: (B, T, E) per gate (T is 1, or 3 with one gate per task) before top-k.
        gate_weights: (B, T, E), each row sums to 1.
        features: (B, F) fused features before the experts.
        encoded: (B, 2C + S) pooled features of the encoder and standardised HU statistics, for the distance to the
            training set (`osteo_daemon.network.outlier`).
    """

    class_logits: Tensor
    bmd: Tensor
    bmd_log_variance: Tensor
    level_logits: Tensor
    gate_logits: Tensor
    gate_weights: Tensor
    features: Tensor
    encoded: Tensor


class Encoded(NamedTuple):
    """What is left of B vertebrae's voxels once the encoder and the side channels have seen them.

    Attributes:
        image: (B, 2C) pooled features of the encoder.
        statistics: (B, S) standardised HU statistics, None without that channel.
        grain: (B, G) standardised statistics of noise and sharpness, None without that channel.
    """

    image: Tensor
    statistics: Tensor | None
    grain: Tensor | None


class MultitaskMoE(nn.Module):
    """Shared 3D encoder, HU side channel, gated residual experts and three heads.

    Every operation works on one sample at a time, so a result is independent of the batch it is computed in.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VertebraEncoder(config)
        self.hu_statistics = HuStatistics(config) if config.hu_channel else None
        side = len(HU_STATISTICS) if config.hu_channel else 0
        self.encoded_width = self.encoder.width + side
        self.grain_statistics = None if config.grain_channel == "none" else GrainStatistics()
        grain = 0 if self.grain_statistics is None else GrainStatistics.width
        beside = side + (grain if config.grain_channel == "all" else 0)
        self.hu_projection = nn.Sequential(nn.Linear(beside, config.hu_width), nn.GELU()) if side else None
        fused = self.encoder.width + (config.hu_width if side else 0)
        width = config.feature_width
        self.fuse = nn.Sequential(nn.LayerNorm(fused), nn.Linear(fused, width), nn.GELU(), nn.Dropout(config.dropout))
        gates = 3 if config.gate_per_task else 1
        self.routers = nn.ModuleList(
            Router(self.encoder.width, config.expert_count, config.top_k, config.gate_temperature, grain)
            for _ in range(gates)
        )
        self.experts = Experts(width, config.expert_width, config.expert_count)
        self.level_embedding = nn.Embedding(len(config.levels) + 1, config.level_width)
        head = OrdinalHead if config.class_head == "ordinal" else SoftmaxHead
        self.class_head = head(width + config.level_width + side, len(CLASSES))
        bound = config.bmd_correction_g_cm2
        self.bmd_head = (
            BmdHead(width + config.level_width, side)
            if bound is None
            else BmdHead(width + config.level_width, side + config.level_width, bound / config.bmd_scale_g_cm2)
        )
        self.level_head = nn.Linear(width, len(config.levels))

    def forward(self, hu: Tensor, level: Tensor) -> MoEOutput:
        """Predict.

        Args:
            hu: (B, D, H, W) float HU on the grid of the configuration.
            level: (B,) long index into the configuration's levels, or `UNKNOWN_LEVEL`.

        Raises:
            ValueError: the grid is another.
        """
        if hu.ndim != 4 or tuple(hu.shape[1:]) != self.config.voi_shape:
            raise ValueError(f"need (B, {', '.join(map(str, self.config.voi_shape))}) HU, got {tuple(hu.shape)}")
        return self.decide(self.encode(hu), level)

    def encode(self, hu: Tensor) -> Encoded:
        """(B, D, H, W) HU to what `decide` needs of them; a refit with a frozen encoder does this once."""
        return Encoded(
            self.encoder(hu),
            None if self.hu_statistics is None else self.hu_statistics(hu.float()),
            None if self.grain_statistics is None else self.grain_statistics(hu.float()),
        )

    def decide(self, encoded: Encoded, level: Tensor) -> MoEOutput:
        """Gates, experts and heads, from the encoder's output and (B,) level indices as in `forward`."""
        image, statistics = encoded.image, encoded.statistics
        grain = [] if encoded.grain is None else [encoded.grain]
        parts = [image]
        if self.hu_projection is not None and statistics is not None:
            beside = grain if self.config.grain_channel == "all" else []
            parts.append(self.hu_projection(torch.cat([statistics, *beside], dim=1)))
        features = self.fuse(torch.cat(parts, dim=1))

        gates = [cast(Gate, router(image, *grain)) for router in self.routers]
        mixed = [self.experts(features, gate.weights) for gate in gates]
        for_class, for_bmd, for_level = mixed * 3 if len(mixed) == 1 else mixed

        known = torch.where(level < 0, torch.full_like(level, len(self.config.levels)), level)
        embedded = self.level_embedding(known)
        side = [] if statistics is None else [statistics]
        class_logits = self.class_head(torch.cat([for_class, embedded, *side], dim=1))
        line = statistics
        if statistics is not None and self.bmd_head.limit is not None:  # what belongs to a level needs no correction
            line = torch.cat([statistics, embedded], dim=1)
        bmd, log_variance = self.bmd_head(torch.cat([for_bmd, embedded], dim=1), line)
        scale = self.config.bmd_scale_g_cm2
        return MoEOutput(
            class_logits=class_logits,
            bmd=self.config.bmd_centre_g_cm2 + scale * bmd,
            bmd_log_variance=log_variance + 2.0 * torch.log(torch.tensor(scale)).to(log_variance),
            level_logits=self.level_head(for_level),
            gate_logits=torch.stack([gate.logits for gate in gates], dim=1),
            gate_weights=torch.stack([gate.weights for gate in gates], dim=1),
            features=features,
            encoded=torch.cat([image, *side], dim=1),
        )
