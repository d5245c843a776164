"""Contrast phase, measured in the aorta, the vena cava and the kidneys: headers often leave it empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import ndimage

from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.paravertebral import STEP_MM, sample_box
from osteo_daemon.inference.vertebra import Vertebra

ENHANCED_VESSEL_HU = 100.0
"""Unenhanced blood reads 35 to 60 HU; a great vessel above this value holds contrast agent."""

ENHANCED_KIDNEY_HU = 100.0
"""Unenhanced kidneys read about 30 HU; their medulla alone 145 HU in the nephrographic phase (Eur J Radiol
2007;63:420)."""

FADING_VESSEL_HU = 70.0
"""With enhanced kidneys, blood above this value still holds agent; below, it left the blood long ago."""

ARTERIAL_DIFFERENCE_HU = 80.0
"""An aorta that much brighter than the vena cava: the agent has not come back yet. In the late arterial phase the aorta
reads 290 to 360 HU; 70 s after injection both vessels are within some 30 HU of each other."""

LATE_VESSEL_HU = 125.0
"""Below this, with kidneys brighter than the aorta, the agent has spread and is being excreted."""

_SHARE_PERCENT = 30.0  # of a ball's voxels may be darker: calcified walls and bone are too thin to fill the rest


class Phase(StrEnum):
    """Where the contrast agent is."""

    UNENHANCED = "unenhanced"
    ARTERIAL = "arterial"
    PORTAL_VENOUS = "portal_venous"
    LATE = "late"
    UNCLEAR = "unclear"  # agent in the blood, but vessels and kidneys fit no phase


@dataclass(frozen=True, slots=True)
class _Window:
    """Where an organ's middle may lie, in mm along a vertebra's own axes, sideways from the middle of its body.

    Attributes:
        forward: from the body's front (negative: behind it).
        left: from its middle.
        radius_mm: of the ball that must fit into the organ.
        levels: where the organ is looked for.
        spread_hu: a ball whose voxels differ more than this holds bone.
    """

    forward: tuple[float, float]
    left: tuple[float, float]
    radius_mm: float
    levels: frozenset[str]
    spread_hu: float = float("inf")


_AORTA = _Window((8.0, 24.0), (-6.0, 28.0), 6.0, frozenset({"T12", "L1", "L2", "L3"}))
_CAVA = _Window((6.0, 24.0), (-36.0, -10.0), 6.0, frozenset({"L1", "L2", "L3", "L4"}))
_KIDNEYS = tuple(
    _Window((-46.0, -4.0), left, 8.0, frozenset({"L1", "L2", "L3"}), 200.0) for left in ((-80.0, -42.0), (42.0, 80.0))
)


@dataclass(frozen=True, slots=True)
class Enhancement:
    """Measured attenuation in HU, None where it is not in view, and the phase that follows from it."""

    aorta_hu: float | None
    vena_cava_hu: float | None
    kidney_hu: float | None
    phase: Phase

    @property
    def enhanced(self) -> bool:
        """True when there is contrast agent in the blood."""
        return self.phase is not Phase.UNENHANCED


def measure_enhancement(volume: CtVolume, vertebrae: Sequence[Vertebra]) -> Enhancement:
    """Attenuation of great vessels and kidneys, and the phase.

    An organ's value at one level is the brightest ball of its size that fits between the limits where it must lie;
    vessels take the median over the levels, kidneys the brighter side's brightest level.
    """

    def values(window: _Window) -> list[float]:
        found = [_brightest(volume, vertebra, window) for vertebra in vertebrae if vertebra.level in window.levels]
        return [value for value in found if value is not None]

    aorta, cava = values(_AORTA), values(_CAVA)
    kidneys = [max(side) for window in _KIDNEYS if (side := values(window))]
    aorta_hu = float(np.median(aorta)) if aorta else None
    cava_hu = float(np.median(cava)) if cava else None
    kidney_hu = max(kidneys) if kidneys else None
    return Enhancement(aorta_hu, cava_hu, kidney_hu, phase_of(aorta_hu, cava_hu, kidney_hu))


def phase_of(aorta_hu: float | None, vena_cava_hu: float | None, kidney_hu: float | None) -> Phase:
    """Phase from the measured organs; without an aorta in view nothing is said but `Phase.UNENHANCED`."""
    if aorta_hu is None:
        return Phase.UNENHANCED if kidney_hu is None or kidney_hu < ENHANCED_KIDNEY_HU else Phase.UNCLEAR
    kidneys = kidney_hu is not None and kidney_hu >= ENHANCED_KIDNEY_HU
    if aorta_hu < ENHANCED_VESSEL_HU:
        return Phase.LATE if kidneys and aorta_hu >= FADING_VESSEL_HU else Phase.UNENHANCED
    if vena_cava_hu is not None and aorta_hu - vena_cava_hu >= ARTERIAL_DIFFERENCE_HU:
        return Phase.ARTERIAL
    if not kidneys or vena_cava_hu is None or kidney_hu is None:
        return Phase.UNCLEAR
    return Phase.LATE if aorta_hu < LATE_VESSEL_HU and kidney_hu > aorta_hu else Phase.PORTAL_VENOUS


def _brightest(volume: CtVolume, vertebra: Vertebra, window: _Window) -> float | None:
    reach = int(np.ceil(window.radius_mm / STEP_MM))
    margin = reach * STEP_MM
    values = sample_box(
        volume,
        vertebra,
        (-margin, margin),
        (window.forward[0] - margin, window.forward[1] + margin),
        (window.left[0] - margin, window.left[1] + margin),
    )
    if values is None:
        return None
    offsets = np.arange(-reach, reach + 1) * STEP_MM
    z, y, x = np.meshgrid(offsets, offsets, offsets, indexing="ij")
    ball = z**2 + y**2 + x**2 <= window.radius_mm**2
    middle = (reach, slice(reach, -reach), slice(reach, -reach))
    filtered = ndimage.percentile_filter(values, _SHARE_PERCENT, footprint=ball)[middle]
    if np.isfinite(window.spread_hu):
        bright = ndimage.percentile_filter(values, 100.0 - _SHARE_PERCENT / 3, footprint=ball)[middle]
        filtered = filtered[bright - filtered <= window.spread_hu]
    return float(filtered.max()) if filtered.size else None
