"""The spine localizer: a small 3D UNet that labels the column voxel by voxel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from osteo_daemon.network.monai_parts import UNet


class SpineClass(IntEnum):
    """What a voxel belongs to; the value is the network's output channel."""

    BACKGROUND = 0
    BODY = 1  # vertebral bodies above the sacrum
    DISC = 2
    S1_BODY = 3
    SACRUM = 4  # the sacrum without the body of S1
    POSTERIOR = 5  # arches and processes of the vertebrae
    RIB = 6
    PELVIS = 7  # hip bones and femora
    CANAL = 8


N_CLASSES = len(SpineClass)
N_PHASE = 2  # cosine and sine of the position between two disc planes


@dataclass(frozen=True, slots=True)
class LocalizerConfig:
    """Everything that fixes the network and its input.

    Attributes:
        channels: feature channels of each resolution level.
        strides: stride between consecutive levels; one fewer than ``channels``.
        residual_units: convolutions in each residual block.
        spacing_mm: voxel size of the cubic input grid.
        patch_voxels: (D, H, W) of the patches the network was trained on; instance normalisation makes the result
            depend on the patch size, so inference uses the same.
        windows_hu: one (low, high) window per input channel, each mapped to [-1, 1] with clipping.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128, 160)
    strides: tuple[int, ...] = (2, 2, 2, 2)
    residual_units: int = 2
    spacing_mm: float = 3.0
    patch_voxels: tuple[int, int, int] = (80, 64, 64)
    windows_hu: tuple[tuple[float, float], ...] = ((-160.0, 340.0), (-1024.0, 1200.0))

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(f"{len(self.channels)} levels need {len(self.channels) - 1} strides")
        if any(low >= high for low, high in self.windows_hu) or self.spacing_mm <= 0:
            raise ValueError("windows must be (low, high) and the spacing positive")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LocalizerConfig:
        """The configuration stored in a bundle's ``network.json``.

        Raises:
            ValueError: a key is unknown or a value does not fit.
        """
        known = set(cls.__dataclass_fields__)
        unknown = set(values) - known - {"architecture", "outputs"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        depth, height, width = (int(n) for n in values["patch_voxels"])
        return cls(
            channels=tuple(int(n) for n in values["channels"]),
            strides=tuple(int(n) for n in values["strides"]),
            residual_units=int(values["residual_units"]),
            spacing_mm=float(values["spacing_mm"]),
            patch_voxels=(depth, height, width),
            windows_hu=tuple((float(low), float(high)) for low, high in values["windows_hu"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads back."""
        return {
            "architecture": "spine-localizer",
            "outputs": [c.name.lower() for c in SpineClass] + ["phase_cos", "phase_sin"],
            **asdict(self),
        }


def window_input(hu: Tensor, windows_hu: Sequence[tuple[float, float]]) -> Tensor:
    """(N, 1, D, H, W) HU to (N, len(windows), D, H, W) in [-1, 1], one channel per window."""
    channels = [((hu - low) * (2.0 / (high - low)) - 1.0).clamp(-1.0, 1.0) for low, high in windows_hu]
    return torch.cat(channels, dim=1)


class SpineLocalizerNet(nn.Module):
    """UNet over cubic voxels, axes (D, H, W) running cranial, posterior and left.

    ``forward`` takes (N, windows, D, H, W) from `window_input`, each of D, H and W a multiple of the product of the
    strides, and gives class logits (N, 9, D, H, W) in the order of `SpineClass` and the phase (N, 2, D, H, W): cosine
    and sine of 2 pi u, where u counts disc planes along the column (0 at a disc's middle, 0.5 at mid-body). The phase
    means something only in bodies and discs.
    """

    def __init__(self, config: LocalizerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(
            spatial_dims=3,
            in_channels=len(config.windows_hu),
            out_channels=N_CLASSES + N_PHASE,
            channels=config.channels,
            strides=config.strides,
            num_res_units=config.residual_units,
            norm="INSTANCE",
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.unet(x)
        return out[:, :N_CLASSES], out[:, N_CLASSES:]
