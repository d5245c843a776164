"""The torso's cross-sections: skin, muscle wall and cavity by height.

Proportions were read off one real torso (TotalSegmentator's example CT, a man) and vary with size, sex and body mass
index; heights count from the middle of the S1 body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from osteo_daemon.phantom.canvas import F32, Region, Vec, Waves
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine

# height over S1: half width of the muscle wall of a man, its front and back relative to the S1 body, half width of
# the cavity
_SECTIONS: Final = np.array(
    [
        [-190.0, 150, -85, 62, 60],
        [-123.0, 160, -96, 70, 74],
        [-93.0, 162, -98, 73, 74],
        [-63.0, 158, -104, 72, 76],
        [-33.0, 150, -112, 68, 88],
        [-3.0, 141, -120, 63, 100],
        [27.0, 138, -128, 58, 112],
        [57.0, 136, -134, 56, 116],
        [87.0, 135, -138, 55, 117],
        [117.0, 136, -140, 57, 119],
        [147.0, 139, -140, 62, 124],
        [177.0, 143, -138, 68, 130],
        [207.0, 146, -136, 70, 133],
        [250.0, 147, -134, 72, 134],
        [300.0, 145, -128, 74, 131],
        [360.0, 138, -118, 76, 124],
        [430.0, 122, -100, 76, 106],
        [500.0, 110, -80, 76, 80],
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One closed outline by height.

    Attributes:
        half_width: half axis along x at `Outline.heights`.
        front, back: y of the outline on the midline.
    """

    half_width: Vec
    front: Vec
    back: Vec
    middle: Vec
    half_depth: Vec


def _section(half_width: Vec, front: Vec, back: Vec) -> Section:
    return Section(half_width, front, back, 0.5 * (front + back), 0.5 * (back - front))


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """Skin, wall and cavity of one patient.

    Attributes:
        heights: z in mm at which the sections are given.
        x: the midline's offset by height (follows part of a scoliosis).
        skin, wall, cavity: outlines.
        ripple: slow random deformation of the skin.
        lumps: the same for the wall.
    """

    heights: Vec
    x: Vec
    skin: Section
    wall: Section
    cavity: Section
    ripple: Waves
    lumps: Waves

    def distance(self, region: Region, section: Section) -> F32:
        """Approximate signed distance (mm) of a section's outline, undeformed."""
        a = region.along_z(self.heights, section.half_width)
        b = region.along_z(self.heights, section.half_depth)
        dy = region.y - region.along_z(self.heights, section.middle)
        dx = region.x - region.along_z(self.heights, self.x)
        u2, v2 = (dx / a) ** 2, (dy / b) ** 2
        # between an ellipse and a fourth-power superellipse
        rho = np.sqrt(u2 + v2) * np.float32(0.6) + np.sqrt(np.sqrt(u2 * u2 + v2 * v2)) * np.float32(0.4)
        radial = np.sqrt(dx * dx + dy * dy)
        return np.asarray(radial - radial / np.maximum(rho, np.float32(1e-3)))


def build_outline(patient: VirtualPatient, spine: Spine) -> Outline:
    """The torso that fits a spine."""
    rng = patient.rng("outline")
    size = patient.size
    s1 = spine["S1"].centre
    heights = _SECTIONS[:, 0] * size + s1[2]
    over = patient.bmi_kg_m2 - 24.0
    sex_wall = 0.97 if patient.sex == "F" else 1.0
    girth = size * sex_wall * (1.0 + 0.008 * over) * float(1 + 0.03 * rng.standard_normal())
    upper = np.clip(_SECTIONS[:, 0] / 60.0 + 0.5, 0, 1)  # 0 in the pelvis, 1 above
    spine_y = np.interp(heights, spine.heights, spine.curve_y) - s1[1]
    usual = np.interp(_SECTIONS[:, 0], [-100, 0, 60, 100, 160, 200, 300, 430], [30, 0, -32, -32, -10, 4, 18, 10])
    shift = 0.75 * (spine_y - usual * size) * upper
    wall_width = _SECTIONS[:, 1] * girth
    visceral = over * (1.6 if patient.sex == "M" else 1.0) + 4.0 * rng.standard_normal()
    wall_front = _SECTIONS[:, 2] * size - visceral * (0.35 + 0.65 * upper) + s1[1] + 0.35 * shift
    wall_back = _SECTIONS[:, 3] * size + s1[1] + shift
    fat = max(5.0, 15.0 + 1.6 * over + (5.0 if patient.sex == "F" else 0.0) + 2.0 * rng.standard_normal())
    hips = np.exp(-(((_SECTIONS[:, 0] + 70) / 70.0) ** 2))
    chest = np.clip((_SECTIONS[:, 0] - 120) / 100.0, 0, 1)
    female = 1.0 if patient.sex == "F" else 0.4
    lateral_fat = fat * (1.0 + (0.9 * female) * hips - 0.3 * chest)
    front_fat = fat * (1.15 - 0.55 * chest)
    back_fat = fat * (0.9 + 0.5 * hips - 0.45 * chest)
    skin = _section(wall_width + lateral_fat, wall_front - front_fat, wall_back + back_fat)
    wall = _section(wall_width, wall_front, wall_back)
    cavity_back = np.interp(heights, spine.heights, spine.curve_y) + np.where(upper > 0.6, 46.0, 24.0) * size
    cavity_front = wall_front + 9.0 + 3.0 * chest
    cavity = _section(_SECTIONS[:, 4] * girth, cavity_front, np.minimum(cavity_back, wall_back - 14))
    x = np.interp(heights, spine.heights, spine.curve_x) * 0.35
    return Outline(heights, x, skin, wall, cavity, Waves.draw(rng, 190.0, count=12), Waves.draw(rng, 120.0, count=12))
