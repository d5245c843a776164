"""Heads and losses of the self-supervised mechanisms; only the encoder beneath them is kept.

a: the radiomic vector of the pool from an augmented view (smooth L1).
b: contrast guided by the pool: the positive of a vertebra is one of its nearest neighbours among other patients'
   (InfoNCE, van den Oord 2018; neighbours as positives after Dwibedi 2021, here in radiomic instead of learnt space).
c: masked reconstruction (He 2022): blocks of the view are blanked and drawn again by a linear decoder, and the local
   texture statistics of what was drawn have to be those of the original, since the error of single voxels alone is
   least for a drawing without texture.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import VertebraEncoder

Mechanism = Literal["a", "b", "c"]

BLOCK_VOXELS: Final = 8
_BLANK: Final = 0.0
_STATISTIC_FLOOR: Final = 1e-3
"""In units of the window's half width: 0.5 HU of the default window."""


class SelfSupervised(nn.Module):
    """An encoder with the heads of the chosen mechanisms.

    Args:
        mechanisms: letters out of ``abc``.
        features: width of the pool's vectors.
        projection: width of the space in which mechanism b contrasts.
    """

    def __init__(self, config: MoEConfig, mechanisms: str, features: int, projection: int = 64) -> None:
        super().__init__()
        self.encoder = VertebraEncoder(config)
        width = self.encoder.width
        self.vector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features)) if "a" in mechanisms else None
        self.projection = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, projection))
            if "b" in mechanisms
            else None
        )
        self.decoder = BlockDecoder(width // 2, config) if "c" in mechanisms else None


class BlockDecoder(nn.Module):
    """Feature maps to voxels: brought to the grid of blocks, one convolution, then a linear map for each block."""

    def __init__(self, channels: int, config: MoEConfig) -> None:
        super().__init__()
        self.grid = tuple(n // BLOCK_VOXELS for n in config.voi_shape)
        self.mix = nn.Sequential(nn.Conv3d(channels, 128, 3, padding=1), nn.GELU())
        self.linear = nn.Conv3d(128, BLOCK_VOXELS**3, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, d, h, w) maps to (B, blocks, BLOCK_VOXELS, BLOCK_VOXELS, BLOCK_VOXELS) in the window's units."""
        grown = functional.interpolate(maps, size=self.grid, mode="trilinear", align_corners=False)
        voxels = self.linear(self.mix(grown))
        side = BLOCK_VOXELS
        return torch.as_tensor(voxels.flatten(2).transpose(1, 2).reshape(len(maps), -1, side, side, side))


def blocks(volume: Tensor) -> Tensor:
    """(B, D, H, W) to (B, blocks, BLOCK_VOXELS, BLOCK_VOXELS, BLOCK_VOXELS)."""
    n, side = len(volume), BLOCK_VOXELS
    d, h, w = (size // side for size in volume.shape[1:])
    cut = volume.reshape(n, d, side, h, side, w, side).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(n, d * h * w, side, side, side)


def unblocks(cut: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `blocks`."""
    n, side = len(cut), BLOCK_VOXELS
    d, h, w = (size // side for size in shape)
    return cut.reshape(n, d, h, w, side, side, side).permute(0, 1, 4, 2, 5, 3, 6).reshape(n, *shape)


def mask_blocks(hu: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blank this share of the blocks of each VOI: (B, D, H, W) HU to the view and the (B, blocks) mask of the blank."""
    cut = blocks(hu)
    count = round(share * cut.shape[1])
    order = torch.rand(cut.shape[:2], generator=generator).argsort(1).to(hu.device)
    masked = order < count
    blanked = torch.where(masked[..., None, None, None], torch.full_like(cut, _BLANK), cut)
    shape = (hu.shape[1], hu.shape[2], hu.shape[3])
    return unblocks(blanked, shape), masked


def to_window(hu: Tensor, config: MoEConfig) -> Tensor:
    """HU to -1 to 1 over the network's window."""
    low, high = config.window_hu
    return (hu.clamp(low, high) - low) * (2.0 / (high - low)) - 1.0


def local_texture(cut: Tensor) -> Tensor:
    """(..., s, s, s) blocks to (..., 4) logs: SD, and mean absolute step along each axis."""
    sd = cut.flatten(-3).std(-1)
    steps = [cut.diff(dim=axis).abs().flatten(-3).mean(-1) for axis in (-3, -2, -1)]
    return torch.stack([sd, *steps], dim=-1).clamp_min(_STATISTIC_FLOOR).log()


def reconstruction_loss(drawn: Tensor, original: Tensor, masked: Tensor, texture_weight: float) -> Tensor:
    """Smooth L1 of voxels plus that of local texture statistics, over blanked blocks.

    Args:
        drawn: (B, blocks, s, s, s) in the window's units.
        original: (B, D, H, W) likewise, before blanking.
        masked: (B, blocks).
    """
    truth = blocks(original)[masked]
    found = drawn[masked]
    voxels = functional.smooth_l1_loss(found, truth, beta=0.1)
    texture = functional.smooth_l1_loss(local_texture(found), local_texture(truth))
    return voxels + texture_weight * texture


def contrast_loss(first: Tensor, second: Tensor, alike: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions: row i of both belongs together.

    Args:
        first, second: (B, P) projections of anchors and of their positives.
        alike: (B, B) True where another pair is a neighbour, too: neither positive nor negative.
        temperature: divides the cosines.
    """
    cosine = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T / temperature
    off = alike & ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    target = torch.arange(len(first), device=first.device)
    forward = functional.cross_entropy(cosine.masked_fill(off, float("-inf")), target)
    return 0.5 * (forward + functional.cross_entropy(cosine.T.masked_fill(off.T, float("-inf")), target))
