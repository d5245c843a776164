"""Is a vertebra unlike those that the network was trained on: distance of its features, and doubt of its gate.

Mahalanobis distance of the encoder's features to those of the training set (Lee et al., NeurIPS 2018, without classes),
with a shrunk covariance. A flag for readers of the network's values; it decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from osteo_daemon.errors import BundleError

OUTLIERS_KEY: Final = "outliers"
"""Key of a bundle's configs/inference.json; a bundle without it raises no flag."""
OUTLIERS_NAME: Final = "models/outliers.safetensors"
"""File of a bundle with the tensors ``mean`` and ``whitening``."""

_NUMBERS: Final = ("distance_limit", "entropy_limit", "quantile", "fitted_on", "limits_from")


@dataclass(frozen=True, slots=True, eq=False)
class OutlierModel:
    """A summary of the training set's features with the limits that validation vertebrae gave.

    Attributes:
        mean: (F,) of the training vertebrae's `MoEOutput.encoded`.
        whitening: (F, F); the distance is the length of ``(encoded - mean) @ whitening``.
        distance_limit: quantile of the validation vertebrae's distances.
        entropy_limit: quantile of their gate entropies (`osteo_daemon.network.moe.gate_entropy`).
        quantile: of both limits.
        fitted_on: training vertebrae behind mean and whitening.
        limits_from: validation vertebrae behind the limits.
    """

    mean: Tensor
    whitening: Tensor
    distance_limit: float
    entropy_limit: float
    quantile: float
    fitted_on: int
    limits_from: int

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.mean.ndim != 1 or self.whitening.shape != (width, width):
            raise ValueError(f"mean {tuple(self.mean.shape)} and whitening {tuple(self.whitening.shape)} do not fit")
        if not (bool(torch.isfinite(self.mean).all()) and bool(torch.isfinite(self.whitening).all())):
            raise ValueError("mean or whitening is not finite")
        if not (math.isfinite(self.distance_limit) and self.distance_limit > 0 and self.entropy_limit >= 0):
            raise ValueError("a distance_limit must be positive and an entropy_limit at least 0")
        if not 0.5 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0.5 and 1, got {self.quantile}")

    def distance(self, encoded: Tensor) -> Tensor:
        """(B, F) features to (B,) distances in standard deviations of the training set, float64."""
        centred = encoded.double() - self.mean.to(encoded.device).double()
        white = centred @ self.whitening.to(encoded.device).double()
        return white.square().sum(dim=1).sqrt()

    def exceeds(self, distance: float, entropy: float) -> bool:
        """True when either lies above its limit; what is not a number always does."""
        return not (distance <= self.distance_limit and entropy <= self.entropy_limit)

    def to_json(self) -> dict[str, float | int]:
        """The numbers, as plain JSON values; the tensors travel in `OUTLIERS_NAME`."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def tensors(self) -> dict[str, Tensor]:
        """What `OUTLIERS_NAME` holds, float32."""
        return {"mean": self.mean.float(), "whitening": self.whitening.float()}

    @classmethod
    def from_parts(cls, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], width: int) -> OutlierModel:
        """Read back what `to_json` and `tensors` gave, for a network whose encoded features have this width.

        Raises:
            BundleError: keys differ, a value is out of range, or the width is another.
        """
        if set(numbers) != set(_NUMBERS):
            raise BundleError(f"configs/inference.json: outliers needs exactly the keys {', '.join(_NUMBERS)}")
        if set(tensors) != {"mean", "whitening"} or tensors["mean"].shape != (width,):
            raise BundleError(f"{OUTLIERS_NAME} does not fit the network; restore the bundle from where it came from")
        try:
            return cls(
                tensors["mean"],
                tensors["whitening"],
                float(numbers["distance_limit"]),
                float(numbers["entropy_limit"]),
                float(numbers["quantile"]),
                int(numbers["fitted_on"]),
                int(numbers["limits_from"]),
            )
        except (TypeError, ValueError) as error:
            raise BundleError(f"configs/inference.json has unusable outliers: {error}") from error
