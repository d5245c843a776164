"""Codes of the true label map.

One ``uint8`` code a voxel. The three parts of a vertebra carry their level: ``BODY + n`` (cortical shell, endplates and
subcortical bone of the body), ``CORE + n`` (its trabecular core: at least 3 mm inside, away from the basivertebral
vein) and ``POSTERIOR + n``, where ``n`` is 1-13 for T1-T13, 14-19 for L1-L6 and 20 for S1. A body is BODY and CORE
together.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

LEVELS: Final = (*(f"T{n}" for n in range(1, 14)), *(f"L{n}" for n in range(1, 7)), "S1")
LEVEL_CODE: Final = {name: code for code, name in enumerate(LEVELS, start=1)}

BODY: Final = 100
CORE: Final = 130
POSTERIOR: Final = 160


class Tissue(IntEnum):
    """Codes below 100: what is not a vertebra."""

    OUTSIDE = 0
    FAT = 1
    MUSCLE = 2
    SKIN = 3
    LUNG = 4
    LIVER = 5
    SPLEEN = 6
    KIDNEY = 7
    AORTA = 8
    VEIN = 9
    BOWEL = 10
    GAS = 11
    BLADDER = 12
    ORGAN = 13
    CANAL = 14
    DISC = 15
    RIB = 16
    HIP = 17
    FEMUR = 18
    SACRUM = 19
    METAL = 20
    TABLE = 21


def body_mask(labels: npt.NDArray[np.uint8], level: str | None = None) -> npt.NDArray[np.bool_]:
    """(D, H, W) mask of one vertebral body (or of all of them, S1 included)."""
    if level is None:
        return (labels > BODY) & (labels < POSTERIOR)
    code = LEVEL_CODE[level]
    return np.asarray((labels == BODY + code) | (labels == CORE + code))


def core_mask(labels: npt.NDArray[np.uint8], level: str) -> npt.NDArray[np.bool_]:
    """(D, H, W) mask of the trabecular core of one vertebral body."""
    return np.asarray(labels == CORE + LEVEL_CODE[level])


def posterior_mask(labels: npt.NDArray[np.uint8], level: str | None = None) -> npt.NDArray[np.bool_]:
    """(D, H, W) mask of the posterior elements of one vertebra (or of all of them)."""
    return np.asarray(labels > POSTERIOR if level is None else labels == POSTERIOR + LEVEL_CODE[level])
