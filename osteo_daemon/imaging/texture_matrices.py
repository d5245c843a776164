"""Grey level matrices of masked volumes in batched torch: what texture features are computed from.

Definitions: Image Biomarker Standardisation Initiative (see `osteo_daemon.imaging.texture`). All are three-dimensional
at Chebyshev distance 1; directional ones are merged over the 13 directions. Grey levels are integers 1 to G inside the
mask and 0 outside.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
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


@dataclass(frozen=True, slots=True, eq=False)
class Neighbourhoods:
    """Levels of a batch and which neighbours share them: what all matrices are counted from.

    The batch is padded by one and flattened, so that a neighbour is a fixed step away and no step from inside leaves
    the sample.

    Attributes:
        levels: the largest grey level, G.
        shape: (B, D, H, W) of the batch.
        grey: (N,) int64 levels, 0 outside the masks.
        sample: (N,) which sample a position belongs to.
        steps: distance of the neighbour in each of the 13 `DIRECTIONS`, all positive.
        equal: for each direction the (N - step,) bools "this position and its neighbour lie inside on one level".
        going: the positions where those are True, ascending.
    """

    levels: int
    shape: tuple[int, int, int, int]
    grey: Tensor
    sample: Tensor
    steps: tuple[int, ...]
    equal: tuple[Tensor, ...]
    going: tuple[Tensor, ...]

    @classmethod
    def of(cls, grey: Tensor, levels: int) -> Neighbourhoods:
        """Of (B, D, H, W) grey levels.

        Raises:
            ValueError: see `check`.
        """
        check(grey, levels)
        padded = functional.pad(grey, (1, 1, 1, 1, 1, 1))
        batch, depth, height, width = padded.shape
        steps = tuple(d * height * width + h * width + w for d, h, w in DIRECTIONS)
        sample = torch.arange(batch, device=grey.device).repeat_interleave(depth * height * width)
        flat = padded.flatten()
        # comparisons read every position 26 times: in as few bytes as the levels need
        small = flat.to(torch.uint8 if levels < 256 else torch.int32)
        inside = small > 0
        equal = tuple((small[:-step] == small[step:]) & inside[:-step] for step in steps)
        going = tuple(same.nonzero().squeeze(1) for same in equal)
        shape = (grey.shape[0], grey.shape[1], grey.shape[2], grey.shape[3])
        return cls(levels, shape, flat, sample, steps, equal, going)

    @property
    def cell(self) -> Tensor:
        """(N,) index of sample and level."""
        return self.sample * (self.levels + 1) + self.grey


def count_cells(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Histogram of flat indices into a float64 tensor of this shape."""
    return torch.bincount(index, minlength=math.prod(shape)).reshape(shape).double()


def glcm(near: Neighbourhoods) -> Tensor:
    """Symmetric grey level co-occurrence counts, merged over directions: (B, G, G) float64."""
    shape = (near.shape[0], near.levels + 1, near.levels + 1)
    row = near.cell * (near.levels + 1)
    # pairs with the outside land in row or column 0 and are cut off
    pairs = (count_cells(row[:-step] + near.grey[step:], shape) for step in near.steps)
    total = sum(pairs, torch.zeros((), device=row.device))[:, 1:, 1:]
    return total + total.transpose(1, 2)


def glrlm(near: Neighbourhoods) -> Tensor:
    """Grey level run length counts, merged over directions: (B, G, R) float64, run length r at column r - 1."""
    longest = max(near.shape[1:])
    cell = near.cell
    shape = (near.shape[0], near.levels + 1)
    # stretches[k]: places where k neighbours in a row go on at the same level; a run of r voxels has r - k of them
    stretches = torch.zeros((longest + 2, *shape), dtype=torch.float64, device=cell.device)
    stretches[0] = len(near.steps) * count_cells(cell, shape)
    onward = torch.zeros(cell.shape, dtype=torch.int8, device=cell.device)
    for step, equal in zip(near.steps, near.equal, strict=True):
        onward[:-step] += equal
    stretches[1] = torch.bincount(cell, weights=onward.double(), minlength=math.prod(shape)).reshape(shape)
    for step, equal, going in zip(near.steps, near.equal, near.going, strict=True):
        position, length = going, 1
        while length < longest and len(position):
            position = position[equal[position + length * step]]
            length += 1
            stretches[length] += count_cells(cell[position], shape)
    exact = stretches[:-2] - 2 * stretches[1:-1] + stretches[2:]
    return exact.permute(1, 2, 0)[:, 1:]


def glszm(near: Neighbourhoods) -> tuple[Tensor, Tensor]:
    """Zones of equal grey level linked over 26 neighbours.

    Returns:
        (B, G, Z) float64 counts and the (Z,) sizes that occur, ascending: a dense matrix up to the largest zone would
        be nearly empty.
    """
    inside = near.grey > 0
    label = _components(near)[inside]
    size = torch.bincount(label)
    first = torch.zeros_like(size)
    # any voxel of a zone tells its sample and level
    first[label] = inside.nonzero().squeeze(1)
    zones = size.nonzero().squeeze(1)
    first, size = first[zones], size[zones]
    sizes, column = torch.unique(size, return_inverse=True)
    index = (near.sample[first] * near.levels + near.grey[first] - 1) * len(sizes) + column
    return count_cells(index, (near.shape[0], near.levels, len(sizes))), sizes


def _components(near: Neighbourhoods) -> Tensor:
    """(N,) number of each position's zone; any numbers that differ between zones."""
    if near.grey.is_cuda:
        return _hooked_components(near)
    count, directions = len(near.grey), len(near.steps)
    # one row of flags for each position: the links are in the order of a compressed matrix as they are found
    linked = np.zeros((count, directions), dtype=bool)
    for k, equal in enumerate(near.equal):
        linked[: len(equal), k] = equal.numpy()
    ends = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(linked.sum(1, dtype=np.int32), out=ends[1:])
    low, direction = np.divmod(np.flatnonzero(linked).astype(np.int32), np.int32(directions))
    high = low + np.array(near.steps, dtype=np.int32)[direction]
    links = sparse.csr_array((np.ones(len(high)), high, ends), (count, count))
    return torch.from_numpy(csgraph.connected_components(links, directed=False)[1].astype(np.int64))


def _hooked_components(near: Neighbourhoods) -> Tensor:
    """The same in torch alone: the root of a zone is its smallest position."""
    low = torch.cat(near.going)
    high = torch.cat([going + step for going, step in zip(near.going, near.steps, strict=True)])
    # hook roots along the edges that still join two, then shorten paths
    root = torch.arange(len(near.grey), device=near.grey.device)
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
    return root


def gldm(near: Neighbourhoods) -> Tensor:
    """Neighbouring grey level dependence counts, coarseness 0: (B, G, 27) float64, dependence j at column j - 1."""
    dependence = torch.zeros(near.grey.shape, dtype=torch.int8, device=near.grey.device)
    for step, equal in zip(near.steps, near.equal, strict=True):
        same = equal.to(torch.int8)
        dependence[:-step] += same
        dependence[step:] += same
    index = near.cell * _NEIGHBOURS + dependence
    return count_cells(index, (near.shape[0], near.levels + 1, _NEIGHBOURS))[:, 1:]
