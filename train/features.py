"""Features of a frozen encoder: computed once for each vertebra, kept on disk, and all that a refit works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from osteo_daemon.network.encoder import GrainStatistics
from osteo_daemon.network.multitask import Encoded, MultitaskMoE
from train.data import VoiSet, batches

Index = npt.NDArray[np.int64]
Progress = Callable[[int], None]

CHUNK: Final = 64
"""Vertebrae in a file: what a kill costs at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the frozen part of a network says of N vertebrae.

    Attributes:
        image: (N, 2C) pooled features of the encoder.
        statistics: (N, S) standardised HU statistics, of zero width without that channel.
        grain: (N, G) statistics of noise and sharpness, not standardised, whether the network uses them or not: a refit
            may open that channel.
        level: (N,) long, index of the true level.
    """

    image: Tensor
    statistics: Tensor
    grain: Tensor
    level: Tensor

    def __len__(self) -> int:
        return len(self.level)

    def take(self, chosen: Index | Tensor) -> Features:
        """The chosen vertebrae, in that order."""
        where = torch.as_tensor(chosen)
        return Features(*(getattr(self, name)[where] for name in Features.__dataclass_fields__))

    def encoded(self, network: MultitaskMoE) -> Encoded:
        """As ``decide`` of this network takes them: the parent, or one that grew from it."""
        grain = network.grain_statistics
        return Encoded(
            self.image,
            self.statistics if self.statistics.shape[1] else None,
            None if grain is None else (self.grain - grain.mean) / grain.sd,
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, contiguous."""
        return {name: getattr(self, name).contiguous() for name in Features.__dataclass_fields__}

    @classmethod
    def joined(cls, parts: list[Features]) -> Features:
        """One after another."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def encode_rows(network: MultitaskMoE, data: VoiSet, index: Index, device: torch.device) -> Features:
    """Features of these rows, one vertebra at a time on a CPU: a result never depends on its company."""
    network.eval().to(device)
    size = 1 if device.type == "cpu" else CHUNK
    grain = GrainStatistics()
    parts = []
    with torch.inference_mode():
        for batch in batches(data, index, network.config, [], size):
            found = network.encode(batch.hu.to(device))
            parts.append(
                Features(
                    found.image.float().cpu(),
                    torch.zeros((len(batch.level), 0)) if found.statistics is None else found.statistics.float().cpu(),
                    grain.raw(batch.hu),
                    batch.level,
                )
            )
    return Features.joined(parts)


def kept_features(
    network: MultitaskMoE, data: VoiSet, index: Index, folder: Path, device: torch.device, progress: Progress
) -> Features:
    """Features of these rows; what an earlier call has finished is read from ``folder``.

    Args:
        folder: for these rows and this network alone.
        progress: is told how many vertebrae were added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(index), CHUNK)):
        path, rows = folder / f"{number:05d}.safetensors", index[start : start + CHUNK]
        if not path.exists():
            temporary = path.with_suffix(".part")
            save_file(encode_rows(network, data, rows, device).tensors(), temporary)
            temporary.replace(path)
        parts.append(Features(**load_file(path)))
        progress(len(rows))
    return Features.joined(parts)
