"""From a VOI to features: the shared 3D encoder and the side channel of un-normalised HU."""

from __future__ import annotations

import math
from typing import Final, cast

import torch
from torch import Tensor, nn

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.monai_parts import ResNetBlock

HU_STATISTICS: Final = (
    "core_mean",
    "core_sd",
    "core_p10",
    "core_p50",
    "core_p90",
    "cranial_mean",
    "middle_mean",
    "caudal_mean",
    "body_mean",
    "body_sd",
    "surround_p10",
    "surround_p50",
    "surround_p90",
    "areal_bone",
)
"""Names of the statistics of `HuStatistics`, in order. All in HU, ``areal_bone`` in 100 HU cm."""

_CORE_RADII_MM: Final = (8.0, 8.0, 10.0)
"""Half axes (caudal, posterior, left) of an ellipsoid inside the trabecular part of every lumbar body."""
_BODY_RADII_MM: Final = (13.0, 16.0, 22.0)
"""Half axes of an ellipsoid about as large as a lumbar body, cortex included."""
_COLUMN_MM: Final = (10.0, 15.0)
"""Half height and half width of the central column that is projected along the antero-posterior axis."""
_WATER_EQUIVALENT_HU: Final = 0.0


class HuStatistics(nn.Module):
    """Statistics of un-normalised HU in fixed regions of the VOI.

    Normalisation destroys absolute density, so the numbers that a radiologist would measure go beside the image
    features. ``areal_bone`` is the mean over a central column of the line integral of positive HU along the
    antero-posterior axis: what a DXA projection sees of the vertebral body.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.spacing_mm = config.voi_spacing_mm
        axes = [(torch.arange(n) - (n - 1) / 2) * config.voi_spacing_mm for n in config.voi_shape]
        d, h, w = torch.meshgrid(*axes, indexing="ij")
        core = _ellipsoid((d, h, w), _CORE_RADII_MM)
        body = _ellipsoid((d, h, w), _BODY_RADII_MM)
        third = _CORE_RADII_MM[0] / 3
        self._index("core", core)
        self._index("cranial", core & (d < -third))
        self._index("middle", core & (d.abs() <= third))
        self._index("caudal", core & (d > third))
        self._index("body", body)
        surround = ~_ellipsoid((d, h, w), tuple(1.2 * radius for radius in _BODY_RADII_MM))
        if int(surround.sum()) < 5:
            raise ValueError(f"a VOI of {config.voi_shape} at {config.voi_spacing_mm} mm holds no surroundings")
        self._index("surround", surround)
        column = (d.abs() <= _COLUMN_MM[0]) & (w.abs() <= _COLUMN_MM[1])
        self.register_buffer("column", column[:, 0, :].clone(), persistent=False)
        self.register_buffer("mean", torch.zeros(len(HU_STATISTICS)))
        self.register_buffer("sd", torch.ones(len(HU_STATISTICS)))
        self.mean: Tensor
        self.sd: Tensor

    def _index(self, name: str, mask: Tensor) -> None:
        self.register_buffer(f"{name}_index", mask.flatten().nonzero().squeeze(1), persistent=False)

    def raw(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, S) statistics in HU, in the order of `HU_STATISTICS`."""
        flat = hu.flatten(1)

        def region(name: str) -> Tensor:
            return flat.index_select(1, cast(Tensor, getattr(self, f"{name}_index")))

        core, body = region("core"), region("body")
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=hu.dtype, device=hu.device)
        # every fifth voxel is plenty for a percentile of some tens of thousands and keeps the sort short
        surround = torch.quantile(region("surround")[:, ::5], quantiles, dim=1)
        p10, p50, p90 = torch.quantile(core, quantiles, dim=1)
        bone = (hu - _WATER_EQUIVALENT_HU).clamp_min(0).sum(dim=2) * (self.spacing_mm / 1000.0)
        areal = bone[:, cast(Tensor, self.column)].mean(dim=1)
        columns = [core.mean(1), core.std(1), p10, p50, p90]
        columns += [region(name).mean(1) for name in ("cranial", "middle", "caudal")]
        columns += [body.mean(1), body.std(1), surround[0], surround[1], surround[2], areal]
        return torch.stack(columns, dim=1)

    def fit(self, raw: Tensor) -> None:
        """Set the standardisation from the (N, S) statistics of a training set."""
        self.mean.copy_(raw.mean(0))
        self.sd.copy_(raw.std(0).clamp_min(1e-3))

    def forward(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, S) statistics, standardised with the training set's mean and SD."""
        return (self.raw(hu) - self.mean) / self.sd


class GrainStatistics(nn.Module):
    """How noisy and how sharp the whole VOI is along each of its axes: what a scanner, kernel and slice leave in it.

    A voxel's difference from the mean of its two neighbours at one and at two voxels' distance, its size clipped at
    5, 15 and 50 HU, averaged: a coarse histogram without sorting. The logarithm makes noise of twice the SD one step.
    Standardised values end at 3 SD: beyond what training saw nothing is known that more of it could tell.
    """

    _WINDOW_HU: Final = (-200.0, 300.0)
    _STEPS: Final = (1, 2)
    _LIMITS_HU: Final = (5.0, 15.0, 50.0)
    _FLOOR_HU: Final = 1e-3
    _MOST_SD: Final = 3.0
    width: Final = 3 * len(_STEPS) * len(_LIMITS_HU)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("sd", torch.ones(self.width))
        self.mean: Tensor
        self.sd: Tensor

    def raw(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, 18) logarithms of HU: axis slowest, then distance, then limit."""
        clipped = hu.clamp(*self._WINDOW_HU)
        columns = []
        for axis in (1, 2, 3):
            for step in self._STEPS:
                size = hu.shape[axis] - 2 * step
                before, here, after = (clipped.narrow(axis, start, size) for start in (0, step, 2 * step))
                rough = (here - 0.5 * (before + after)).abs().flatten(1)
                columns += [rough.clamp_max(limit).mean(1) for limit in self._LIMITS_HU]
        return torch.log(torch.stack(columns, dim=1) + self._FLOOR_HU)

    def fit(self, raw: Tensor) -> None:
        """Set the standardisation from the (N, 18) statistics of a training set."""
        self.mean.copy_(raw.mean(0))
        self.sd.copy_(raw.std(0).clamp_min(1e-3))

    def forward(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, 18) statistics, standardised with the training set's mean and SD, within +-3."""
        return ((self.raw(hu) - self.mean) / self.sd).clamp(-self._MOST_SD, self._MOST_SD)


def _ellipsoid(axes: tuple[Tensor, Tensor, Tensor], radii: tuple[float, ...]) -> Tensor:
    squares = [(axis / radius) ** 2 for axis, radius in zip(axes, radii, strict=True)]
    return torch.stack(squares).sum(0) <= 1.0


class VertebraEncoder(nn.Module):
    """MONAI's residual blocks as a shared encoder, pooled by mean and by standard deviation.

    The standard deviation over space keeps how strongly a texture feature varies, which the mean loses. Group
    normalisation replaces batch normalisation, so that a result never depends on batch-mates. MONAI's own ``ResNet``
    can't be used for that: in 1.6.1 its ``norm`` reaches the stem only and the stages keep batch normalisation.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.low, self.high = config.window_hu
        norm = ("group", {"num_groups": config.norm_groups})
        width, kernel = config.stage_channels[0], config.stem_kernel
        self.stem = nn.Sequential(
            nn.Conv3d(1, width, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.GroupNorm(config.norm_groups, width),
            nn.ReLU(inplace=True),
        )
        stages = []
        for planes, count, stride in zip(config.stage_channels, config.stage_blocks, config.stage_strides, strict=True):
            shortcut = nn.Sequential(
                nn.Conv3d(width, planes, 1, stride=stride, bias=False), nn.GroupNorm(config.norm_groups, planes)
            )
            first = ResNetBlock(
                width, planes, 3, stride, shortcut if stride != 1 or width != planes else None, norm=norm
            )
            stages.append(nn.Sequential(first, *(ResNetBlock(planes, planes, 3, norm=norm) for _ in range(count - 1))))
            width = planes
        self.stages = nn.Sequential(*stages)
        self.width = 2 * width
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # channels last is ten times faster on a CPU with oneDNN and changes no result's meaning
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def maps(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to the last stage's (B, C, d, h, w) feature maps."""
        x = ((hu.clamp(self.low, self.high) - self.low) * (2.0 / (self.high - self.low)) - 1.0).unsqueeze(1)
        return cast(Tensor, self.stages(self.stem(x)))

    def forward(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, 2C) pooled features."""
        return self.pool(self.maps(hu))

    @staticmethod
    def pool(maps: Tensor) -> Tensor:
        """(B, C, d, h, w) feature maps to their (B, 2C) means and standard deviations over space."""
        maps = maps.flatten(2).float()
        mean = maps.mean(2)
        # the root of a plain variance has no gradient at zero
        sd = (maps.var(2, unbiased=False) + 1e-5).sqrt() - math.sqrt(1e-5)
        return torch.cat([mean, sd], dim=1)
