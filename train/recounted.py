"""The labelled torso with another number of vertebrae, or with two grown together: unusual anatomy of known truth.

For tests and figures. Training edits anatomy the same way (`train.warp`), but at random and together with much else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from osteo_daemon.imaging.volume import CtVolume
from train.synthesis import gather
from train.torso import N_LEVELS, SPACING_MM, Floats, Tissue, Torso
from train.warp import recount

_GROWTH_VOXELS = 14  # one vertebra and disc of the torso, so that what is pushed up stays in view
_MARROW_HU, _CORTEX_HU, _TEXTURE_SD_HU = 130.0, 250.0, 20.0
_CORTEX_MM = 3.1
_SMALLEST_BODY_VOXELS = 300
_AFFINE = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])[[2, 1, 0, 3]]  # (z, y, x) to LPS


@dataclass(frozen=True, slots=True, eq=False)
class Recounted:
    """A scan and its true column.

    Attributes:
        volume: 3 mm voxels, axes cranial, posterior, left.
        centres_lps_mm: (n, 3) of the bodies above S1, from below.
        bears_rib: (n,) whether the torso's T12 became this vertebra.
    """

    volume: CtVolume
    centres_lps_mm: Floats
    bears_rib: tuple[bool, ...]


def recounted(torso: Torso, at_disc: int, by: int) -> Recounted:
    """The torso without the vertebra above disc ``at_disc`` (``by`` = 1), or with the one below it twice (-1).

    Discs are numbered from L5-S1 (0); everything above the disc, ribs included, moves with it.
    """
    depth, height, width = torso.channels.shape[2:]
    sizes = (depth + (_GROWTH_VOXELS if by < 0 else 0), height, width)
    axes = [torch.arange(n, dtype=torch.float32) * SPACING_MM for n in sizes]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    edit = recount(torso, at_disc, by)
    hu, level, _, tissue = gather(torso, edit(places))
    number = torch.floor(level + edit.levels * (edit.upper.distance(places) + 1.0 >= 0)).numpy()
    origin = np.floor(level.numpy())
    volume = CtVolume(hu.numpy(), _AFFINE)
    centres, ribs = [], []
    for k in range(N_LEVELS + 2):
        body = (tissue.numpy() == Tissue.BODY) & (number == k)
        if np.count_nonzero(body) < _SMALLEST_BODY_VOXELS:
            break
        centres.append(volume.to_lps(np.argwhere(body).mean(axis=0)))
        ribs.append(bool(np.median(origin[body]) >= N_LEVELS - 1))
    return Recounted(volume, np.array(centres), tuple(ribs))


def fused(torso: Torso, disc: int, seed: int = 0) -> CtVolume:
    """The torso with marrow and a cortical shell in place of a disc and the endplates beside it."""
    hu = torso.channels[0, 0].numpy().copy()
    level = torso.channels[0, 1].numpy()
    tissue = torso.tissues[0, 0, ::2, ::2, ::2].numpy()
    bone = np.isin(tissue, (int(Tissue.BODY), int(Tissue.DISC))) & (np.abs(level - disc) < 1.0)
    zone = bone & (np.abs(level - disc) < 0.5)
    shell = ndimage.distance_transform_edt(ndimage.binary_closing(bone)) * SPACING_MM <= _CORTEX_MM
    texture = np.random.default_rng(seed).normal(0.0, _TEXTURE_SD_HU, hu.shape)
    block: npt.NDArray[np.float64] = np.where(shell, _CORTEX_HU, _MARROW_HU) + texture
    hu[zone] = block[zone]
    return CtVolume(hu, _AFFINE)
