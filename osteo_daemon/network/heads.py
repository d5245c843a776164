"""The three tasks' heads: ordinal diagnosis, BMD with its uncertainty, vertebral level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class OrdinalHead(nn.Module):
    """CORAL (Cao, Mirjalili, Raschka 2020): one score, K - 1 ordered thresholds.

    The thresholds are built from a first one and positive steps, so the cumulative probabilities are ordered for any
    weights, not only at the optimum.
    """

    def __init__(self, width: int, class_count: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.first = nn.Parameter(torch.tensor([1.0]))
        self.steps = nn.Parameter(torch.full((class_count - 2,), 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to (B, K - 1) logits of "worse than class k", decreasing in k."""
        falls = torch.cat([self.first.new_zeros(1), functional.softplus(self.steps).cumsum(0)])
        return torch.as_tensor(self.score(features) + self.first - falls)


class SoftmaxHead(nn.Module):
    """Plain K-class logits, the alternative to `OrdinalHead`."""

    def __init__(self, width: int, class_count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, class_count)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to (B, K) logits."""
        return torch.as_tensor(self.linear(features))


def class_probabilities(
    logits: Tensor, class_count: int, temperature: float = 1.0, shift: Sequence[float] = ()
) -> Tensor:
    """(B, K - 1) cumulative or (B, K) plain logits to (B, K) probabilities.

    Logits are divided by ``temperature``, then ``shift`` is added, one number for each logit or none.
    """
    scaled = logits / temperature
    if shift:
        scaled = scaled + torch.tensor(shift, dtype=logits.dtype, device=logits.device)
    if logits.shape[1] == class_count:
        return scaled.softmax(dim=1)
    # shifts of their own could put the thresholds out of order
    worse = scaled.sigmoid().cummin(dim=1).values
    one, zero = torch.ones_like(worse[:, :1]), torch.zeros_like(worse[:, :1])
    return torch.cat([one, worse], dim=1) - torch.cat([worse, zero], dim=1)


class BmdHead(nn.Module):
    """BMD with heteroscedastic uncertainty (Nix and Weigend 1994; Kendall and Gal 2017).

    The mean is a linear map of the HU statistics plus a term of the fused features: the first carries density beyond
    the range of the training set in proportion, the second corrects for scanner, texture and geometry. With ``limit``,
    in units of the scale, the correction ends there: what a network learnt of virtual patients can then turn the order
    of two vertebrae only where their lines lie closer than twice that.
    """

    LOG_VARIANCE_RANGE = (-7.0, 3.0)

    def __init__(self, width: int, hu_width: int, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.linear = nn.Linear(hu_width, 1) if hu_width else None
        self.hidden = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 2))

    def forward(self, features: Tensor, hu_statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, F) features and (B, S) standardised statistics to (B,) mean and log variance, in units of the scale."""
        correction, log_variance = self.hidden(features).unbind(1)
        if self.limit is not None:
            correction = self.limit * torch.tanh(correction / self.limit)
        if self.linear is not None:
            if hu_statistics is None:
                raise ValueError("this head needs the HU statistics")
            correction = correction + self.linear(hu_statistics).squeeze(1)
        low, high = self.LOG_VARIANCE_RANGE
        return correction, log_variance.clamp(low, high)
