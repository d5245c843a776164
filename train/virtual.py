"""Virtual patients as training material: a cache folder of 3 mm volumes and patches cut from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from train.synthesis import AIR_HU, Sample, scan
from train.warp import sample_points

_KEYS = ("hu", "labels", "level_coordinate")


class PhantomCache:
    """A folder of ``*.npz``: hu (D, H, W) int16, labels uint8 (`SpineClass`), level_coordinate float16; 3 mm voxels,
    axes cranial, posterior, left.

    Raises:
        ValueError: the folder holds no volume.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))
        if not self._files:
            raise ValueError(f"no *.npz in {folder.name}")
        self._loaded: dict[Path, tuple[Tensor, Tensor]] = {}

    def _volume(self, path: Path) -> tuple[Tensor, Tensor]:
        if path not in self._loaded:
            with np.load(path, allow_pickle=False) as arrays:
                hu, labels, level = (torch.from_numpy(arrays[k].astype(np.float32)) for k in _KEYS)
            self._loaded[path] = torch.stack([hu, level])[None], labels[None, None]
        return self._loaded[path]

    def patch(self, shape: tuple[int, int, int], seed: int) -> Sample:
        """A patch of ``shape`` voxels from a random volume, mildly warped, scanned anew."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        smooth, labels = self._volume(self._files[int(rng.integers(len(self._files)))])
        column = torch.nonzero((labels[0, 0] >= 1) & (labels[0, 0] <= 3))
        focus = column[int(rng.integers(len(column)))].numpy().astype(np.float64)
        size = np.array(smooth.shape[2:])
        if rng.random() < 0.12:
            focus = rng.uniform(0, size - 1)
        q = sample_points(shape, rng, generator) + torch.from_numpy(focus.astype(np.float32)).view(3, 1, 1, 1)
        extent = torch.from_numpy(size.astype(np.float32)).view(3, 1, 1, 1)
        grid = (q / (extent - 1) * 2 - 1).flip(0).permute(1, 2, 3, 0)[None]
        both = F.grid_sample(smooth, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
        label = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=True)[0, 0].long()
        outside = ((q < -0.5) | (q > extent - 0.5)).any(dim=0)
        hu = scan(torch.where(outside, AIR_HU, both[0]), rng, generator)
        hu = torch.where(outside, AIR_HU, hu)
        return Sample(hu=hu[None], labels=torch.where(outside, 0, label), level_coordinate=both[1])
