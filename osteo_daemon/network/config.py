"""Configuration of the multitask mixture-of-experts network.

The paper (Huang et al., MICCAI 2025, arXiv 2506.20282) says that there is a shared encoder, a learned gate over experts
and three tasks; sizes, counts and losses are not published. Every one of them is a key here with our own default, and
a bundle records them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from osteo_daemon.errors import BundleError

CLASSES = ("normal", "osteopenia", "osteoporosis")
"""Diagnosis classes in ordinal order (WHO: T > -1, -2.5 < T <= -1, T <= -2.5)."""


_LATER: Final = {"grain_channel": "none", "bmd_correction_g_cm2": None}
"""What a bundle that is older than a key means."""


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Shapes and choices of `osteo_daemon.network.multitask.MultitaskMoE`; ours unless the paper is named.

    Attributes:
        voi_shape: (D, H, W) voxels of the input, along the caudal, posterior and left axes of the vertebra.
        voi_spacing_mm: isotropic spacing of the input.
        window_hu: the image path clips to this window and scales it to [-1, 1].
        stage_channels: channels of the four residual stages (three tasks share them: the paper's shared encoder).
        stage_blocks: residual blocks of each stage.
        stage_strides: stride of each stage; the stem has halved the grid already.
        stem_kernel: kernel of the first convolution, stride 2.
        norm_groups: groups of group normalisation; it never looks at other samples of the batch.
        hu_channel: feed statistics of the un-normalised HU beside the image features.
        hu_width: width of the projected HU statistics.
        feature_width: width of the fused features that experts and heads see.
        expert_count: number of residual experts (the paper gives none; 3 simulated devices and one spare).
        expert_width: hidden width of an expert.
        top_k: use only the k largest gate weights, renormalised; None is the dense soft gate.
        gate_per_task: one gate per task instead of one for all.
        gate_temperature: divides the gate's logits.
        class_head: "ordinal" (CORAL, Cao 2020) or "softmax".
        levels: vertebral levels of the level head, cranial to caudal.
        bmd_levels: levels that DXA measures; BMD is given for these only.
        level_width: width of the level embedding that conditions BMD and class.
        bmd_centre_g_cm2: the BMD head predicts ``(BMD - centre) / scale``.
        bmd_scale_g_cm2: see above.
        device_count: devices that may supervise the gate in training; the first experts stand for them.
        dropout: on the fused features, in training only.
        grain_channel: who sees the statistics of noise and sharpness of `osteo_daemon.network.encoder`, which
            tell scanners apart where pooled image features were found not to: "none", the "gates", or "all", which puts
            them beside the HU statistics too (an unknown scanner then moves every prediction).
        bmd_correction_g_cm2: most that image features may move BMD away from the line in HU statistics and level;
            None is no bound.
    """

    voi_shape: tuple[int, int, int] = (40, 48, 56)
    voi_spacing_mm: float = 1.0
    window_hu: tuple[float, float] = (-200.0, 800.0)
    stage_channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    stage_blocks: tuple[int, int, int, int] = (1, 1, 1, 1)
    stage_strides: tuple[int, int, int, int] = (2, 2, 2, 1)
    stem_kernel: int = 5
    norm_groups: int = 8
    hu_channel: bool = True
    hu_width: int = 32
    feature_width: int = 128
    expert_count: int = 4
    expert_width: int = 64
    top_k: int | None = None
    gate_per_task: bool = False
    gate_temperature: float = 1.0
    class_head: Literal["ordinal", "softmax"] = "ordinal"
    levels: tuple[str, ...] = ("T12", "L1", "L2", "L3", "L4", "L5")
    bmd_levels: tuple[str, ...] = ("L1", "L2", "L3", "L4")
    level_width: int = 8
    bmd_centre_g_cm2: float = 1.0
    bmd_scale_g_cm2: float = 0.2
    device_count: int = 3
    dropout: float = 0.1
    grain_channel: Literal["none", "gates", "all"] = "none"
    bmd_correction_g_cm2: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "voi_shape": len(self.voi_shape) == 3 and all(n >= 16 and n % 8 == 0 for n in self.voi_shape),
            "voi_spacing_mm": self.voi_spacing_mm > 0,
            "window_hu": len(self.window_hu) == 2 and self.window_hu[0] < self.window_hu[1],
            "stage_channels": len(self.stage_channels) == 4
            and all(c % self.norm_groups == 0 for c in self.stage_channels),
            "stage_blocks": len(self.stage_blocks) == 4 and all(n >= 1 for n in self.stage_blocks),
            "stage_strides": len(self.stage_strides) == 4 and all(n in (1, 2) for n in self.stage_strides),
            "stem_kernel": self.stem_kernel % 2 == 1,
            "expert_count": self.expert_count >= 1,
            "top_k": self.top_k is None or 1 <= self.top_k <= self.expert_count,
            "gate_temperature": self.gate_temperature > 0,
            "class_head": self.class_head in ("ordinal", "softmax"),
            "levels": len(set(self.levels)) == len(self.levels) > 1,
            "bmd_levels": set(self.bmd_levels) <= set(self.levels),
            "bmd_scale_g_cm2": self.bmd_scale_g_cm2 > 0,
            "device_count": 0 <= self.device_count <= self.expert_count,
            "dropout": 0 <= self.dropout < 1,
            "bmd_correction_g_cm2": self.bmd_correction_g_cm2 is None
            or (self.hu_channel and self.bmd_correction_g_cm2 > 0),
            "grain_channel": self.grain_channel in (("none", "gates", "all") if self.hu_channel else ("none", "gates")),
        }
        for key, good in checks.items():
            if not good:
                raise ValueError(f"{key} may not be {getattr(self, key)!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with every key; `from_json` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MoEConfig:
        """Read configs/network.json of a bundle: every key must stand there but those of `_LATER`, none may be unknown.

        Raises:
            BundleError: keys differ or a value is out of range.
        """
        values = {**_LATER, **values}
        names = {field.name for field in fields(cls)}
        different = sorted(names ^ set(values))
        if different:
            raise BundleError(
                f"configs/network.json differs from the network of this version in: {', '.join(different)}"
            )
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)
        except (TypeError, ValueError) as error:
            raise BundleError(f"configs/network.json has an unusable value: {error}") from error


@dataclass(frozen=True, slots=True)
class Calibration:
    """From the network's raw output to calibrated values; fitted on validation patients, kept in inference.json.

    Attributes:
        class_temperature: divides the class logits (Guo 2017).
        class_shift: added to the class logits after that, one number for each; empty adds nothing. It brings the
            probabilities back to the patients' own prior after a training with logit adjustment.
        level_temperature: divides the level logits.
        bmd_slope, bmd_intercept_g_cm2: ``BMD = slope * raw + intercept``; 1 and 0 unless a site recalibrates.
        bmd_sd_factor: on the predicted standard deviation, so that standardised residuals have unit variance.
        bmd_interval_90: half width of the 90 % prediction interval in calibrated standard deviations (split conformal).
    """

    class_temperature: float = 1.0
    level_temperature: float = 1.0
    bmd_slope: float = 1.0
    bmd_intercept_g_cm2: float = 0.0
    bmd_sd_factor: float = 1.0
    bmd_interval_90: float = 1.645
    class_shift: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(not -20.0 < value < 20.0 for value in self.class_shift):
            raise ValueError(f"class_shift must lie between -20 and 20, got {self.class_shift}")
        for key in ("class_temperature", "level_temperature", "bmd_slope", "bmd_sd_factor", "bmd_interval_90"):
            if not 0 < getattr(self, key) < 100:
                raise ValueError(f"{key} must lie between 0 and 100, got {getattr(self, key)}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "class_shift": list(self.class_shift)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Read the calibration of a bundle's inference.json; one without ``class_shift`` has none.

        Raises:
            BundleError: a key is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in fields(cls)}
        given = {"class_shift": (), **values}
        if names != set(given):
            raise BundleError(f"configs/inference.json: calibration needs exactly the keys {', '.join(sorted(names))}")
        try:
            shift = tuple(float(value) for value in given.pop("class_shift"))
            return cls(**{key: float(value) for key, value in given.items()}, class_shift=shift)
        except (TypeError, ValueError) as error:
            raise BundleError(f"configs/inference.json has an unusable calibration: {error}") from error


@dataclass(frozen=True, slots=True)
class BmdScale:
    """On which scale BMD is given and against which reference T-scores are computed; kept in inference.json.

    Attributes:
        name: of the scale, as reports print it.
        reference: of the T-score, as reports print it.
        reference_mean_g_cm2, reference_sd_g_cm2: young adults, mean of L1-L4, on this scale.
        level_offset_g_cm2: reference of a level minus the reference of the mean of L1-L4.
    """

    name: str
    reference: str
    reference_mean_g_cm2: float
    reference_sd_g_cm2: float
    level_offset_g_cm2: Mapping[str, float]

    def t_score(self, bmd_g_cm2: float, level: str) -> float | None:
        """T-score of one level, None when the reference does not know it."""
        if level not in self.level_offset_g_cm2:
            return None
        mean = self.reference_mean_g_cm2 + self.level_offset_g_cm2[level]
        return (bmd_g_cm2 - mean) / self.reference_sd_g_cm2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "level_offset_g_cm2": dict(self.level_offset_g_cm2)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BmdScale:
        """Read the scale of a bundle's inference.json.

        Raises:
            BundleError: a key is unknown or missing, or the reference has no spread.
        """
        try:
            scale = cls(**values)
            if not (scale.reference_sd_g_cm2 > 0 and isinstance(scale.level_offset_g_cm2, Mapping)):
                raise ValueError("reference_sd_g_cm2 must be positive and level_offset_g_cm2 an object")
        except (TypeError, ValueError) as error:
            raise BundleError(f"configs/inference.json has an unusable bmd_scale: {error}") from error
        return scale
