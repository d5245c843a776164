"""Batches worked through in pieces that a processor's caches hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_CHUNK_VOXELS: Final = 2**18
"""Half as much time again for all samples at once; a GPU takes them at once."""


def in_pieces(measure: Callable[..., dict[str, Tensor]], *batch: Tensor) -> dict[str, Tensor]:
    """What ``measure`` says, by name, of tensors of shape (B, ...); each of its values is (B,).

    Raises:
        ValueError: as ``measure`` does.
    """
    first = batch[0]
    size = max(1, _CHUNK_VOXELS // max(1, first.shape[1:].numel()))
    if first.is_cuda or len(first) <= size:
        return measure(*batch)
    found = [measure(*(one[start : start + size] for one in batch)) for start in range(0, len(first), size)]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}
