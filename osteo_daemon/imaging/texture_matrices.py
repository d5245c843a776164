"""Grey level matrices of masked volumes in batched torch: what texture features are computed from.

Definitions: Image Biomarker Standardisation Initiative (see `osteo_daemon.imaging.texture`). All are three-dimensional
at Chebyshev distance 1; directional ones are merged over the 13 directions. Grey levels are integers 1 to G inside the
mask and 0 outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

DIRECTIONS: Final = tuple(d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0))
"""The 13 directions of a 3 x 3 x 3 neighbourhood, one of each opposite pair."""

_NEIGHBOURS: Final = 27


def check(grey: Tensor, levels: int) -> None:
    """Raises ValueError unless (B, D, H, W) int64 levels lie in 0 to ``levels`` with two voxels in every mask."""
    if grey.ndim != 4 or grey.dtype != torch.int64 or int(grey.min()) < 0 or int(grey.max()) > levels:
        raise ValueError(f"need (B, D, H, W) int64 grey levels from 0 to {levels}")
    if int((grey > 0).flatten(1).sum(1).min()) < 2:
        raise ValueError("a sample has fewer than two voxels in its mask")


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch padded by one and flattened: a neighbour is a fixed step away and no step from inside leaves the sample.

    Attributes:
        grey: (N,) int64 levels, 0 outside the masks.
        sample: (N,) which sample a position belongs to.
        steps: distance of the neighbour in each of the 13 `DIRECTIONS`, all positive.
        size: samples.
    """

    grey: Tensor
    sample: Tensor
    steps: tuple[int, ...]
    size: int

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(N - step,) views of every position and of its neighbour, and the step, for each direction."""
        for step in self.steps:
            yield self.grey[:-step], self.grey[step:], step


def _flat(grey: Tensor) -> _Batch:
    padded = functional.pad(grey, (1, 1, 1, 1, 1, 1))
    batch, depth, height, width = padded.shape
    steps = tuple(d * height * width + h * width + w for d, h, w in DIRECTIONS)
    sample = torch.arange(batch, device=grey.device).repeat_interleave(depth * height * width)
    return _Batch(padded.flatten(), sample, steps, batch)


def count_cells(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Histogram of flat indices into a float64 tensor of this shape."""
    return torch.bincount(index, minlength=math.prod(shape)).reshape(shape).double()


def glcm(grey: Tensor, levels: int) -> Tensor:
    """Symmetric grey level co-occurrence counts, merged over directions: (B, G, G) float64."""
    check(grey, levels)
    flat = _flat(grey)
    shape = (flat.size, levels + 1, levels + 1)
    row = (flat.sample * (levels + 1) + flat.grey) * (levels + 1)
    # pairs with the outside land in row or column 0 and are cut off
    total = sum((count_cells(row[:-step] + there, shape) for _, there, step in flat.pairs()), torch.zeros(()))
    total = total[:, 1:, 1:]
    return total + total.transpose(1, 2)


def glrlm(grey: Tensor, levels: int) -> Tensor:
    """Grey level run length counts, merged over directions: (B, G, R) float64, run length r at column r - 1."""
    check(grey, levels)
    flat = _flat(grey)
    longest = max(grey.shape[1:])
    cell = flat.sample * (levels + 1) + flat.grey
    shape = (flat.size, levels + 1)
    # runs of at least r voxels, r from 1: a run of exactly r is one of at least r but not of at least r + 1
    at_least = torch.zeros((longest + 1, *shape), dtype=torch.float64, device=grey.device)
    for here, there, step in flat.pairs():
        equal = (here == there) & (here > 0)
        going = equal.nonzero().squeeze(1)  # positions whose run goes on by one voxel
        # every voxel but a run's last has a successor: voxels without one are as many as runs
        at_least[0] += count_cells(cell, shape) - count_cells(cell[going], shape)
        starts = torch.ones_like(equal)
        starts[step:] &= ~equal[:-step]
        position = going[starts[going]]
        length = 1
        while len(position):
            at_least[length] += count_cells(cell[position], shape)
            position = position + step
            position = position[equal[position]]
            length += 1
    exact = at_least[:-1] - at_least[1:]
    return exact.permute(1, 2, 0)[:, 1:]


def glszm(grey: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Zones of equal grey level linked over 26 neighbours.

    Returns:
        (B, G, Z) float64 counts and the (Z,) sizes that occur, ascending: a dense matrix up to the largest zone would
        be nearly empty.
    """
    check(grey, levels)
    flat = _flat(grey)
    edges = []
    for here, there, step in flat.pairs():
        start = ((here == there) & (here > 0)).nonzero().squeeze(1)
        edges.append(torch.stack([start, start + step]))
    low, high = torch.cat(edges, dim=1)
    # the root of a zone is its smallest position: hook roots along the edges that still join two, then shorten paths
    root = torch.arange(len(flat.grey), device=grey.device)
    while len(low):
        a, b = root[low], root[high]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while True:
            shorter = root[root]
            if torch.equal(shorter, root):
                break
            root = shorter
        apart = root[low] != root[high]
        low, high = low[apart], high[apart]
    zones, size = torch.unique(root[flat.grey > 0], return_counts=True)
    sizes, column = torch.unique(size, return_inverse=True)
    index = (flat.sample[zones] * levels + flat.grey[zones] - 1) * len(sizes) + column
    return count_cells(index, (flat.size, levels, len(sizes))), sizes


def gldm(grey: Tensor, levels: int) -> Tensor:
    """Neighbouring grey level dependence counts, coarseness 0: (B, G, 27) float64, dependence j at column j - 1."""
    check(grey, levels)
    flat = _flat(grey)
    dependence = torch.zeros(flat.grey.shape, dtype=torch.int8, device=grey.device)
    for here, there, step in flat.pairs():
        equal = (here == there).to(torch.int8)
        dependence[:-step] += equal
        dependence[step:] += equal
    index = (flat.sample * (levels + 1) + flat.grey) * _NEIGHBOURS + dependence.clamp_max(_NEIGHBOURS - 1)
    return count_cells(index, (flat.size, levels + 1, _NEIGHBOURS))[:, 1:]
