"""Ribs: arcs on the chest wall, and their joints with the spine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import Canvas, Grid, Vec, capsule
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.outline import Outline
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine

# of the rib counted from the last (12th): where it ends (degrees from the back), and how far it falls to the flank (mm)
_END_DEG: Final = (58.0, 92.0, 128.0, 140.0, 146.0, 150.0, 152.0)
_FALL_MM: Final = (96.0, 112.0, 118.0, 116.0, 108.0, 100.0, 90.0)
_REACH_MM: Final = 9.0
_ARC_START_RAD: Final = 0.30
_STUB_SHARE: Final = 0.25
"""Share of a last rib that lies between its vertebra and the start of its arc on the chest wall."""


@dataclass(frozen=True, slots=True)
class Rib:
    """One pair of ribs.

    Attributes:
        z: height in mm of its head.
        end_rad: angle from the back at which its bone ends.
        fall_mm: how far it sinks up to the flank.
    """

    z: float
    end_rad: float
    fall_mm: float


@dataclass(frozen=True, slots=True, eq=False)
class Ribs:
    """Painter of all ribs of a patient.

    Attributes:
        joints: (start, end) LPS mm of the piece between vertebra and wall.
    """

    outline: Outline
    palette: Palette
    ribs: tuple[Rib, ...]
    joints: tuple[tuple[Vec, Vec], ...]
    size: float

    def paint(self, canvas: Canvas) -> None:
        """Bone with a shell and marrow."""
        top = max(rib.z for rib in self.ribs) + 12
        bottom = min(rib.z - rib.fall_mm for rib in self.ribs) - 12
        region = canvas.region([-1e5, -1e5, bottom], [1e5, 1e5, top])
        if region is None:
            return
        for start, end in self.joints:
            part = canvas.region(np.minimum(start, end) - 8, np.maximum(start, end) + 8)
            if part is not None:
                distance = capsule(part.x, part.y, part.z, start, end, 5.0 * self.size, 4.5 * self.size)
                part.paint(distance, self.palette.cortical * 0.75, Tissue.RIB)
                part.paint(distance + np.float32(1.2), self.palette.marrow)
        o = self.outline
        if canvas.grid.axes is None and not self._near(canvas):
            return
        depth = o.distance(region, o.cavity) - np.float32(5.0)
        near = np.flatnonzero(np.abs(depth) < _REACH_MM)
        if near.size == 0:
            return
        shape = depth.shape
        d, h, w = np.unravel_index(near, shape)
        middle = region.along_z(o.heights, o.cavity.middle)
        shift = region.along_z(o.heights, o.x)
        x = np.broadcast_to(region.x - shift, shape)[d, h, w]
        y = np.broadcast_to(region.y - middle, shape)[d, h, w]
        z = np.broadcast_to(region.z, shape)[d, h, w]
        angle = np.arctan2(np.abs(x), y)
        radial = depth.ravel()[near]
        best = np.full(near.shape, 1e3, dtype=np.float32)
        for rib in self.ribs:
            if rib.z + 10 < z.min() or rib.z - rib.fall_mm - 12 > z.max():
                continue
            fall = np.float32(rib.fall_mm) * np.sin(np.minimum(angle * np.float32(0.68), np.float32(np.pi / 2)))
            along = np.maximum(np.float32(_ARC_START_RAD) - angle, angle - np.float32(rib.end_rad)) * np.float32(110.0)
            level = np.sqrt((radial / (3.6 * self.size)) ** 2 + ((z - rib.z + fall) / (6.8 * self.size)) ** 2) - 1
            np.minimum(best, np.maximum(level * np.float32(3.6 * self.size), along), out=best)
        share = region.cover(best)
        inner = region.cover(best + np.float32(1.1))
        hu = region.hu
        value = hu[d, h, w]
        value += share * (np.float32(self.palette.cortical * 0.85) - value)
        value += inner * (np.float32(self.palette.marrow) - value)
        hu[d, h, w] = value
        inside = best < 0
        region.labels[d[inside], h[inside], w[inside]] = Tissue.RIB

    def _near(self, canvas: Canvas) -> bool:
        """Whether an oblique box comes near the chest wall, from every fourth voxel of it."""
        g = canvas.grid
        few = tuple(slice(None, None, 4) for _ in range(3))
        thin = Grid(g.x[few], g.y[few], g.z[few], g.x[few].shape, 4 * g.edge_mm, None, g.affine)
        whole = Canvas(thin).whole()
        depth = self.outline.distance(whole, self.outline.cavity) - np.float32(5.0)
        return bool((np.abs(depth) < _REACH_MM + 4 * g.edge_mm).any())


def build_ribs(patient: VirtualPatient, spine: Spine, outline: Outline, palette: Palette) -> Ribs:
    """The ribs of the thoracic vertebrae, and a rudimentary lumbar pair where the patient has one."""
    rng = patient.rng("ribs")
    size = patient.size
    thoracic = [v for v in spine.vertebrae if v.level.startswith("T")]
    ribs, joints = [], []
    for i, v in enumerate(thoracic[:9]):
        k = min(i, len(_END_DEG) - 1)
        stretch = float(1 + (0.12 if i == 0 else 0.03) * rng.standard_normal())
        head = float(v.centre[2]) + 0.25 * v.height
        share = patient.last_rib if i == 0 else 1.0
        arc = float(np.clip((share - _STUB_SHARE) / (1 - _STUB_SHARE), 0.0, None))
        end = (1 - arc) * _ARC_START_RAD + arc * np.radians(_END_DEG[k]) * stretch
        rib = Rib(head, end, _FALL_MM[k] * size * float(1 + 0.05 * rng.standard_normal()))
        if share == 0.0:
            continue
        if arc > 0:
            ribs.append(rib)
        for side in (1.0, -1.0):
            start = v.at(side * (0.5 * v.width - 1), 0.5 * v.depth - 6, 0.25 * v.height)
            tip = v.at(side * (v.transverse + 3), 0.5 * v.depth + v.canal_depth, 0.1 * v.height)
            joints.append((start, tip))
            heights = np.array([tip[2] - 9 * size])
            back = float(np.interp(heights, outline.heights, outline.cavity.back)[0])
            wide = float(np.interp(heights, outline.heights, outline.cavity.half_width)[0])
            wall = np.array([side * 0.47 * wide, back + 1.0, heights[0] - 0.0])
            reach = min(1.0, share / _STUB_SHARE)
            joints.append((tip, (1 - reach) * tip + reach * wall))
    if patient.lumbar_rib_mm > 0:
        v = spine["L1"]
        for side in (1.0, -1.0):
            start = v.at(side * (v.transverse - 4), 0.5 * v.depth + 0.5 * v.canal_depth + 6, 4)
            drop = patient.lumbar_rib_mm * np.array([side * 0.8, 0.25, -0.55])
            joints.append((start, start + drop))
    return Ribs(outline, palette, tuple(ribs), tuple(joints), size)
