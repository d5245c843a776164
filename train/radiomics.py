"""The radiomic vector of a vertebra: texture features of its core, cached on disk in chunks.

The region is an ellipsoid inside every lumbar body, so that no segmentation enters and cortex stays out; grey levels
have a fixed width in HU and begin at a fixed HU, so that they mean the same density in every scan.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

import osteo_daemon.imaging.texture as texture_module
import osteo_daemon.imaging.texture_matrices as matrices_module
from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.network.config import MoEConfig
from train.data import VoiSet, batches, digest_of

CORE_RADII_MM: Final = (8.0, 9.0, 12.0)
"""Half axes (caudal, posterior, left) of the region whose texture is learnt: trabecular in every lumbar body."""
LOW_HU: Final = -200.0
BIN_WIDTH_HU: Final = 25.0
GREY_LEVELS: Final = 32
CHUNK: Final = 128
"""VOIs computed and stored at once: what a stop can cost."""


def core_mask(config: MoEConfig) -> Tensor:
    """(D, H, W) True inside the ellipsoid of `CORE_RADII_MM`."""
    axes = [(torch.arange(n) - (n - 1) / 2) * config.voi_spacing_mm for n in config.voi_shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    squares = [(axis / radius) ** 2 for axis, radius in zip(grid, CORE_RADII_MM, strict=True)]
    return torch.stack(squares).sum(0) <= 1.0


class Radiomics:
    """Computes the vector of VOIs on one network's grid.

    Attributes:
        names: of the features, sorted: the order of every vector.
    """

    def __init__(self, config: MoEConfig) -> None:
        mask = core_mask(config)
        inside = mask.nonzero()
        low, high = inside.min(0).values, inside.max(0).values + 1
        self._box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        self._mask = mask[self._box]
        ramp = torch.linspace(0, 300, self._mask.numel()).reshape(self._mask.shape)
        self.names = tuple(sorted(self._features(ramp[None])))

    def __call__(self, hu: Tensor) -> npt.NDArray[np.float64]:
        """(B, D, H, W) HU on the network's grid to (B, F) features in the order of ``names``."""
        found = self._features(hu[(slice(None), *self._box)])
        return torch.stack([found[name] for name in self.names], dim=1).cpu().numpy()

    def _features(self, core: Tensor) -> dict[str, Tensor]:
        mask = self._mask.to(core.device).expand_as(core)
        return texture_features(discretise(core, mask, LOW_HU, BIN_WIDTH_HU, GREY_LEVELS), GREY_LEVELS)


def radiomics_version() -> str:
    """Digest of everything that decides a vector besides the VOI: source of the features, region and bins."""
    digest = hashlib.sha256()
    for module in (texture_module, matrices_module):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(repr((CORE_RADII_MM, LOW_HU, BIN_WIDTH_HU, GREY_LEVELS)).encode())
    return digest.hexdigest()


def radiomic_vectors(
    data: VoiSet, config: MoEConfig, folder: Path, indices: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """(N, F) features of these rows (None: all) and their names.

    Chunks are kept in ``folder`` under a name that holds everything they follow from, so that a stopped call goes on
    and changed code computes anew.
    """
    radiomics = Radiomics(config)
    chosen = np.arange(len(data.rows)) if indices is None else indices
    key = {
        "set": data.config["sha256"],
        "version": radiomics_version(),
        "grid": [config.voi_shape, config.voi_spacing_mm],
    }
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in tqdm(range(0, len(chosen), CHUNK), desc="radiomics", unit="chunk", mininterval=2):
        part = chosen[start : start + CHUNK]
        file = folder / f"radiomics-{digest_of({**key, 'rows': part.tolist()})[:24]}.npy"
        if not file.exists():
            rows = [radiomics(batch.hu) for batch in batches(data, part, config, [], 32)]
            temporary = file.with_suffix(".part")
            with temporary.open("wb") as stream:
                np.save(stream, np.concatenate(rows))
            temporary.replace(file)
        chunks.append(np.load(file, allow_pickle=False))
    values = np.concatenate(chunks) if chunks else np.zeros((0, len(radiomics.names)))
    return values, radiomics.names
