"""Run the localizer network over a volume in patches of the size it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from osteo_daemon.inference.canonical import AIR_HU
from osteo_daemon.network.localizer import N_CLASSES, N_PHASE, SpineClass, SpineLocalizerNet, window_input

Start = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class SpineMaps:
    """The network's answer on the canonical grid.

    Attributes:
        probabilities: (9, D, H, W) float32 in the order of `SpineClass`.
        phase: (2, D, H, W) float32 cosine and sine of the position between two disc planes.
    """

    probabilities: npt.NDArray[np.float32]
    phase: npt.NDArray[np.float32]


def _starts(length: int, patch: int, overlap: float) -> list[int]:
    """First voxels of evenly spread patches that cover ``length``; one centred patch where it fits into one."""
    if length <= patch:
        return [-((patch - length) // 2)]
    count = 1 + int(np.ceil((length - patch) / (patch * (1 - overlap))))
    return [round(v) for v in np.linspace(0, length - patch, count)]


class PatchRunner:
    """Collects weighted patch results over one volume of (D, H, W) HU."""

    def __init__(
        self, net: SpineLocalizerNet, hu: npt.NDArray[np.float32], device: torch.device, reduced: bool
    ) -> None:
        self._net, self._device, self._reduced = net, device, reduced
        self._patch = net.config.patch_voxels
        # patches may hang over the edge by at most half their size: the margin is air, as in training
        self._margin = tuple(n // 2 for n in self._patch)
        pad = [m for margin in reversed(self._margin) for m in (margin, margin)]
        self._hu = F.pad(torch.from_numpy(hu), pad, value=AIR_HU)
        self._shape = hu.shape
        self._sum = torch.zeros((N_CLASSES + N_PHASE, *self._hu.shape))
        self._weight = torch.zeros(self._hu.shape)
        ramps = [1 - 0.95 * torch.linspace(-1, 1, n).abs() for n in self._patch]
        self._importance = ramps[0][:, None, None] * ramps[1][None, :, None] * ramps[2][None, None, :]

    @torch.inference_mode()
    def run(self, starts: Iterable[Start], mirrored: bool = False) -> int:
        """Add the patches that begin at these voxels; ``mirrored`` adds each one's left-right mirror image too."""
        done = 0
        for start in starts:
            window = tuple(slice(s + m, s + m + n) for s, m, n in zip(start, self._margin, self._patch, strict=True))
            patch = self._hu[window]
            if float(patch.max()) < -300:
                self._weight[window] += self._importance
                self._sum[(slice(0, 1), *window)] += self._importance
                continue
            result = self._forward(patch)
            if mirrored:
                result = (result + self._forward(patch.flip(-1)).flip(-1)) / 2
            self._sum[(slice(None), *window)] += result * self._importance
            self._weight[window] += self._importance
            done += 1
        return done

    def _forward(self, patch: Tensor) -> Tensor:
        x = window_input(patch[None, None].to(self._device), self._net.config.windows_hu)
        x = x.to(memory_format=torch.channels_last_3d)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._reduced):
            logits, phase = self._net(x)
        return torch.cat([logits.float().softmax(dim=1), phase.float()], dim=1)[0].cpu()

    def maps(self) -> SpineMaps:
        """What was collected so far; background where no patch ran."""
        inner = tuple(slice(m, m + n) for m, n in zip(self._margin, self._shape, strict=True))
        weight = self._weight[inner]
        mean = self._sum[(slice(None), *inner)] / weight.clamp(min=1e-6)
        mean[SpineClass.BACKGROUND][weight < 1e-6] = 1.0
        array = mean.numpy()
        return SpineMaps(array[:N_CLASSES], array[N_CLASSES:])


def survey_starts(shape: tuple[int, ...], patch: tuple[int, int, int]) -> list[Start]:
    """Patches over the whole height, limited to the middle of the patient from left to right (the column's place)."""
    depth, height, width = shape
    z, y = _starts(depth, patch[0], 0.2), _starts(height, patch[1], 0.1)
    span = min(width, int(1.75 * patch[2]))
    first = (width - span) // 2
    x = [first + s for s in _starts(span, patch[2], 0.1)]
    return [(a, b, c) for a in z for b in y for c in x]


def column_starts(maps: SpineMaps, patch: tuple[int, int, int]) -> list[Start]:
    """Patches centred on the column that the survey found, overlapping by half along it."""
    column = maps.probabilities[[SpineClass.BODY, SpineClass.DISC, SpineClass.S1_BODY]].sum(axis=0) > 0.5
    profile = column.sum(axis=(1, 2))
    rows = np.flatnonzero(profile > 10)
    if not len(rows):
        return []
    step = patch[0] // 2
    centres = np.arange(rows[0] + step // 2, max(rows[-1], rows[0] + step // 2 + 1), step)
    starts = []
    for centre in centres:
        near = column[max(0, centre - step // 2) : centre + step // 2 + 1]
        if not near.any():
            continue
        _, y, x = np.nonzero(near)
        mid = (int(centre), round(float(np.median(y))), round(float(np.median(x))))
        limits = [(-(p // 2), n + p // 2 - p) for n, p in zip(column.shape, patch, strict=True)]
        start = [int(np.clip(m - p // 2, lo, hi)) for m, p, (lo, hi) in zip(mid, patch, limits, strict=True)]
        starts.append((start[0], start[1], start[2]))
    return starts
