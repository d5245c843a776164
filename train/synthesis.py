"""Random scans of random anatomy: one training patch from the labelled torso.

Two kinds of contrast: most patches keep the real attenuation with every tissue shifted and bone re-mineralised, the
others get a random value per tissue (the idea of SynthSeg, Billot et al., Med Image Anal 2023;86:102789).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from osteo_daemon.network.localizer import N_CLASSES
from train.torso import BONES, N_TISSUES, SPACING_MM, Floats, Tissue, Torso
from train.warp import sample_source_points

AIR_HU = -1000.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One training patch.

    Attributes:
        hu: (1, D, H, W) attenuation in HU.
        labels: (D, H, W) `SpineClass` as int64.
        level_coordinate: (D, H, W) position along the column in levels: 0 at the disc on S1, 1 at the next, ...
    """

    hu: Tensor
    labels: Tensor
    level_coordinate: Tensor


def gather(torso: Torso, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HU, level coordinate, depth in bone and tissue at the source points, each (D, H, W)."""
    size = torch.tensor(torso.channels.shape[2:], dtype=torch.float32).view(3, 1, 1, 1)
    index = q / SPACING_MM
    grid = (index / (size - 1) * 2 - 1).flip(0).permute(1, 2, 3, 0)[None]
    smooth = F.grid_sample(torso.channels, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
    fine_size = torch.tensor(torso.tissues.shape[2:], dtype=torch.float32).view(3, 1, 1, 1)
    fine = (index * 2 / (fine_size - 1) * 2 - 1).flip(0).permute(1, 2, 3, 0)[None]
    tissue = F.grid_sample(torso.tissues, fine, mode="nearest", padding_mode="zeros", align_corners=True)[0, 0].long()
    outside = ((index < -0.5) | (index > size - 0.5)).any(dim=0)
    hu = torch.where(outside, AIR_HU, smooth[0])
    return hu, smooth[1], smooth[2], torch.where(outside, 0, tissue)


def _tissue_table(torso: Torso, rng: np.random.Generator, synthetic: bool) -> tuple[Tensor, Tensor]:
    """(N_TISSUES,) gain on the deviation from the tissue's mean, and the new mean."""
    mean = torso.tissue_mean_hu.numpy().copy()
    gain = np.ones(N_TISSUES)
    if synthetic:
        muscle = rng.uniform(0, 90)
        new = muscle + rng.normal(0, 30, N_TISSUES)
        new[[Tissue.FAT_SUBCUTANEOUS, Tissue.FAT_VISCERAL]] = rng.uniform(-130, -40, 2)
        new[[Tissue.GAS, Tissue.LUNG]] = rng.uniform(-1000, -600, 2)
        new[Tissue.OUTSIDE], new[Tissue.TABLE] = AIR_HU, rng.uniform(-900, 100)
        new[Tissue.DISC] = rng.uniform(20, 160)
        new[Tissue.CANAL] = rng.uniform(-20, 90)
        new[[int(b) for b in BONES]] = mean[[int(b) for b in BONES]] * rng.uniform(0.6, 1.5)
        gain[:] = rng.uniform(0.0, 1.0)
    else:
        new = mean + rng.normal(0, 12, N_TISSUES)
        new[Tissue.DISC] = mean[Tissue.DISC] + rng.normal(0, 25)
        new[Tissue.OUTSIDE] = mean[Tissue.OUTSIDE]
    if rng.random() < 0.5:  # a contrast phase
        artery, portal = rng.uniform(0, 330), rng.uniform(0, 160)
        new[Tissue.ARTERY] += artery
        new[Tissue.VEIN] += portal * rng.uniform(0.3, 1.3)
        new[Tissue.KIDNEY] += max(artery * 0.5, portal) * rng.uniform(0.5, 1.4)
        new[Tissue.LIVER] += 0.45 * portal
        new[Tissue.SPLEEN] += 0.3 * artery + 0.4 * portal
        new[Tissue.BLADDER] += rng.choice([0, 0, rng.uniform(100, 800)])
        new[Tissue.SOFT] += 0.2 * portal
    if rng.random() < 0.2:
        new[Tissue.BOWEL] += rng.uniform(50, 500)  # oral contrast
        gain[Tissue.BOWEL] = rng.uniform(0.0, 0.6)
    return torch.from_numpy(gain.astype(np.float32)), torch.from_numpy(new.astype(np.float32))


def _remineralise(hu: Tensor, tissue: Tensor, depth: Tensor, torso: Torso, rng: np.random.Generator) -> Tensor:
    """Set trabecular interior and cortical shell apart: down to dark interiors within a kept cortex."""
    bone = torch.zeros(N_TISSUES, dtype=torch.bool)
    bone[[int(b) for b in BONES]] = True
    is_bone = bone[tissue]
    edge = float(rng.uniform(1.2, 2.6))
    inner = ((depth - edge) / float(rng.uniform(1.0, 2.5))).clamp(0, 1) * is_bone
    draw = rng.random()
    target = rng.uniform(-5, 70) if draw < 0.3 else rng.uniform(70, 160) if draw < 0.65 else rng.uniform(160, 340)
    body_like = (tissue == Tissue.BODY) | (tissue == Tissue.S1_BODY)
    elsewhere = float(target) * float(rng.uniform(0.5, 1.4))
    goal = torch.where(body_like, float(target), elsewhere)
    # each vertebra of the column differs a little: a slow random gradient along z
    goal = goal + torch.linspace(-1, 1, hu.shape[0]).view(-1, 1, 1) * float(rng.normal(0, 20))
    texture = float(rng.uniform(0.3, 1.3))
    reference = torch.where(body_like, 115.0, torso.tissue_mean_hu[tissue])
    interior = goal + texture * (hu - reference)
    shell_gain, shell_add = float(rng.uniform(0.75, 1.7)), float(rng.uniform(-40, 80))
    if target < 90 and rng.random() < 0.7:
        shell_add += float(rng.uniform(0, 160))
    shell = torch.where(hu > 0, hu * shell_gain, hu) + shell_add * (depth > 0.3)
    return torch.where(is_bone, inner * interior + (1 - inner) * shell, hu)


def _points(q: Tensor, point: Floats) -> Tensor:
    return q - torch.from_numpy(point.astype(np.float32)).view(3, 1, 1, 1)


def _segment_distance(q: Tensor, start: Floats, end: Floats) -> Tensor:
    direction = end - start
    length = float(np.linalg.norm(direction))
    unit = torch.from_numpy((direction / length).astype(np.float32)).view(3, 1, 1, 1)
    offset = _points(q, start)
    along = (offset * unit).sum(dim=0).clamp(0, length)
    across: Tensor = offset - along * unit
    distance: Tensor = across.norm(dim=0)
    return distance


def _implants(hu: Tensor, tissue: Tensor, q: Tensor, torso: Torso, rng: np.random.Generator) -> Tensor:
    """Pedicle screws with rods, or cement in a body."""
    level = int(rng.integers(0, len(torso.bodies) - 1))
    if rng.random() < 0.5:
        plane = torso.bodies[level]
        centre = plane.centre + rng.normal(0, 4, 3)
        scatter = 1 + 0.3 * torch.sin(q[0] * 0.9) * torch.sin(q[1] * 0.8 + 1) * torch.sin(q[2] * 0.7 + 2)
        distance = _points(q, centre).norm(dim=0)
        cement = (distance * scatter < rng.uniform(6, 14)) & (tissue == Tissue.BODY)
        return torch.where(cement, float(rng.uniform(600, 2200)), hu)
    metal = torch.zeros_like(hu)
    for side in (-1.0, 1.0):
        heads = []
        for lv in range(level, min(level + int(rng.integers(2, 4)), len(torso.bodies))):
            plane = torso.bodies[lv]
            tip = plane.centre + np.array([4.0, -6.0, side * 9.0])
            head = plane.centre + np.array([6.0 + 40 * plane.normal[1] * -1, 48.0, side * 23.0])
            heads.append(head)
            metal = metal + torch.sigmoid((float(rng.uniform(2.5, 3.8)) - _segment_distance(q, tip, head)) * 1.5)
        for a, b in pairwise(heads):
            metal = metal + torch.sigmoid((3.5 - _segment_distance(q, a, b)) * 1.5)
    metal = metal.clamp(0, 1)
    streaks = F.avg_pool3d(metal[None, None], (3, 9, 25), stride=1, padding=(1, 4, 12))[0, 0]
    return hu * (1 - metal) + 2800 * metal - float(rng.uniform(100, 900)) * streaks * (metal < 0.3)


def _lungs(hu: Tensor, tissue: Tensor, q: Tensor, torso: Torso, rng: np.random.Generator) -> Tensor:
    """Air above a random dome-shaped diaphragm in place of abdominal organs."""
    y0, x0 = torso.column[-1][1] - 60, torso.column[-1][2]
    level = torso.column[-1][0] + float(rng.uniform(-110, 30))
    radius2 = ((q[1] - y0) ** 2 + (q[2] - x0) ** 2) / 100.0**2
    dome = level + float(rng.uniform(0, 60)) * (1 - radius2)
    organs = torch.zeros(N_TISSUES, dtype=torch.bool)
    replaced = (Tissue.LIVER, Tissue.SPLEEN, Tissue.KIDNEY, Tissue.BOWEL, Tissue.FAT_VISCERAL, Tissue.SOFT, Tissue.GAS)
    organs[[int(t) for t in replaced]] = True
    air = organs[tissue] & (q[0] > dome)
    vessels = 120 * torch.sin(q[0] * 0.31) * torch.sin(q[1] * 0.27) * torch.sin(q[2] * 0.29)
    return torch.where(air, float(rng.uniform(-920, -650)) + vessels.clamp(min=0) * 3, hu)


def _blur(hu: Tensor, sigma: tuple[float, float, float]) -> Tensor:
    out = hu[None, None]
    for axis, s in enumerate(sigma):
        if s <= 0.05:
            continue
        radius = max(1, int(2.5 * s + 0.5))
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / s) ** 2)
        shape, pad = [1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]
        shape[2 + axis] = 2 * radius + 1
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        out = F.conv3d(F.pad(out, pad, mode="replicate"), (taps / taps.sum()).view(shape))
    return out[0, 0]


def scan(hu: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """What a scanner makes of a (D, H, W) patch: kernel, slice thickness, noise, scale error."""
    draw = rng.random()
    if draw < 0.55:
        in_plane = float(rng.uniform(0.2, 0.9))
        hu = _blur(hu, (0.3 * in_plane, in_plane, in_plane))
    elif draw < 0.8:
        hu = hu + float(rng.uniform(0.2, 1.0)) * (hu - _blur(hu, (0.0, 0.8, 0.8)))
    noise = float(np.exp(rng.uniform(np.log(3), np.log(60)))) if rng.random() < 0.85 else 0.0
    shape = hu.shape
    if rng.random() < 0.6:
        thickness = float(rng.uniform(3.2, 9.0) if rng.random() < 0.3 else rng.uniform(3.2, 6.0))
        hu = _blur(hu, (thickness / SPACING_MM * 0.35, 0.0, 0.0))
        slices = max(8, round(shape[0] * SPACING_MM / thickness))
        hu = F.interpolate(hu[None, None], size=(slices, *shape[1:]), mode="trilinear", align_corners=True)[0, 0]
    if noise:
        white = torch.randn(hu.shape, generator=generator)
        if rng.random() < 0.6:
            coarse = torch.randn((1, 1, hu.shape[0], shape[1] // 2, shape[2] // 2), generator=generator)
            white = 0.6 * white + 1.1 * F.interpolate(coarse, size=tuple(hu.shape), mode="trilinear")[0, 0]
        hu = hu + noise * white
    if hu.shape != shape:
        mode = "trilinear" if rng.random() < 0.8 else "nearest"
        hu = F.interpolate(hu[None, None], size=shape, mode=mode, align_corners=True if mode == "trilinear" else None)[
            0, 0
        ]
    hu = AIR_HU + (hu - AIR_HU) * float(1 + rng.normal(0, 0.03)) + float(rng.normal(0, 6))
    return hu.clamp(-1024, 3071)


def field_of_view(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """(D, H, W) true where the scan has data: cut at the top, the bottom, the front and the sides."""
    seen = torch.ones(shape, dtype=torch.bool)
    depth, height, width = shape
    if rng.random() < 0.25:
        seen[depth - int(rng.integers(1, int(np.ceil(depth * 0.45)))) :] = False
    if rng.random() < 0.25:
        seen[: int(rng.integers(1, int(np.ceil(depth * 0.45))))] = False
    if rng.random() < 0.1:
        seen[:, : int(rng.integers(1, int(np.ceil(height * 0.35))))] = False
    if rng.random() < 0.06:
        seen[:, height - int(rng.integers(1, int(np.ceil(height * 0.2)))) :] = False
    if rng.random() < 0.08:
        side = int(rng.integers(1, int(np.ceil(width * 0.25))))
        seen[:, :, slice(0, side) if rng.random() < 0.5 else slice(width - side, width)] = False
    return seen


def synthesise(torso: Torso, shape: tuple[int, int, int], seed: int) -> Sample:
    """One random patch of ``shape`` voxels of 3 mm; the same seed gives the same patch."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    q, gained = sample_source_points(torso, shape, rng, generator)
    hu, level_coordinate, depth, tissue = gather(torso, q)
    level_coordinate = level_coordinate + gained
    synthetic = rng.random() < 0.35
    gain, mean = _tissue_table(torso, rng, synthetic)
    hu = mean[tissue] + gain[tissue] * (hu - torso.tissue_mean_hu[tissue])
    hu = _remineralise(hu, tissue, depth, torso, rng)
    if rng.random() < 0.1:  # vacuum phenomenon: gas in a disc
        gas = (tissue == Tissue.DISC) & (depth > float(rng.uniform(2.0, 4.0)))
        hu = torch.where(gas, float(rng.uniform(-500, -50)), hu)
    if rng.random() < 0.5:
        hu = _lungs(hu, tissue, q, torso, rng)
    if rng.random() < 0.06:
        hu = _implants(hu, tissue, q, torso, rng)
    seen = field_of_view(shape, rng)
    hu = torch.where(seen, scan(hu, rng, generator), AIR_HU)
    labels = torch.where((tissue < N_CLASSES) & seen, tissue, 0)
    return Sample(hu=hu[None], labels=labels, level_coordinate=level_coordinate)
