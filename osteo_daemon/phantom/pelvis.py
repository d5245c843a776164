"""Sacrum below S1, hip bones, proximal femurs.

The hip bone is a bent plate whose ends and thickness were read by height off one real pelvis (TotalSegmentator's
example CT, a man), joined to a cup, rami and ischium; it turns with the sacral slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import F32, Canvas, Region, Vec, Waves, capsule, ellipsoid, smooth_max, smooth_min
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine, VertebraShape

_REFERENCE_SLOPE_DEG: Final = 40.0
# height over the S1 body; front end x, y; rear end x, y; bow (outwards, mm)
_WING: Final = np.array(
    [
        [-70.0, 96, -62, 72, 2, 4],
        [-48.0, 107, -72, 66, 8, 6],
        [-33.0, 116, -74, 54, 27, 7],
        [-18.0, 128, -80, 47, 41, 9],
        [-3.0, 134, -78, 43, 46, 11],
        [12.0, 138, -65, 40, 47, 13],
        [27.0, 140, -51, 45, 38, 12],
        [42.0, 134, -36, 58, 24, 7],
        [52.0, 122, -22, 76, 8, 4],
        [58.0, 110, -12, 90, 0, 2],
    ]
)
# sacral plate in S1's own axes: posterior, cranial, half width, half thickness
_PLATE: Final = np.array(
    [
        [3.0, 12, 54, 14],
        [9.0, -22, 52, 13],
        [17.0, -48, 38, 10],
        [11.5, -69, 29, 7.5],
        [0.5, -86, 13, 5],
        [-9.0, -102, 6, 4],
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Pelvis:
    """Painter of the pelvic ring.

    Attributes:
        origin: (3,) LPS mm of the middle of S1.
        axes: (3, 3) pelvic axes in LPS.
        s1: the first sacral vertebra.
        size: linear scale.
        wide: extra factor on width (women's pelves are relatively wider).
    """

    origin: Vec
    axes: Vec
    s1: VertebraShape
    size: float
    wide: float
    palette: Palette
    spongy: Waves
    cortex_mm: float
    sacral_hu: float
    prosthesis: tuple[float, ...]

    def _local(self, region: Region, axes: Vec) -> tuple[F32, F32, F32]:
        o = self.origin.astype(np.float32)
        a = axes.astype(np.float32) / np.float32(self.size)
        dx, dy, dz = region.x - o[0], region.y - o[1], region.z - o[2]
        x, y, z = ((dx * a[0, k] + dy * a[1, k]) + dz * a[2, k] for k in range(3))
        return x / np.float32(self.wide), y, z

    def _region(self, canvas: Canvas, axes: Vec, low: tuple[float, ...], high: tuple[float, ...]) -> Region | None:
        corners = np.array([[(low, high)[i >> k & 1][k] for k in range(3)] for i in range(8)]) * self.size
        corners[:, 0] *= self.wide
        points = corners @ axes.T + self.origin
        return canvas.region(points.min(axis=0), points.max(axis=0))

    def _bone(self, region: Region, distance: F32, shell_mm: float, inner_hu: float, tissue: Tissue) -> None:
        distance = distance * np.float32(self.size)
        region.paint(distance, self.palette.cortical, tissue)
        inside = np.float32(inner_hu) + np.float32(32.0) * region.waves(self.spongy)
        # denser towards the shell
        inside += np.float32(0.5 * self.palette.cancellous) * np.clip(distance * np.float32(1 / 5.0) + 1, 0, 1)
        region.paint(distance + np.float32(shell_mm), inside, tissue)

    def paint_sacrum(self, canvas: Canvas) -> None:
        """Sacral bodies and wings below and beside S1, foramina, dorsal wall."""
        region = self._region(canvas, self.s1.axes, (-60, -30, -115), (60, 45, 28))
        if region is None:
            return
        x, y, z = self._local(region, self.s1.axes)
        x = np.abs(x * np.float32(self.wide))
        distance, dorsal = _sacral_plate(x, y, z)
        wall = np.maximum(np.abs(dorsal - 24) - np.float32(2.5), x - 24 - np.float32(0.12) * z)
        wall = np.maximum(wall, np.maximum(-z - 62, z - 2))
        crest = capsule(x, y, z, (0, 29, -6), (0, 29, -44), 3.0, 2.2)
        sides = capsule(x, y, z, (25, 22, 0), (21, 25, -48), 6.0, 4.0, deep=1.3)
        distance = smooth_min(distance, np.minimum(np.minimum(wall, crest), sides), 2.0)
        self._bone(region, distance, 0.6 * self.cortex_mm, self.sacral_hu, Tissue.SACRUM)
        for pz, py, px, r in ((-14.0, 8.0, 22.0, 5.0), (-37.0, 15.0, 19.0, 4.5), (-58.0, 16.0, 16.0, 3.6)):
            hole = capsule(x, y, z, (px, py - 14, pz - 2), (px - 1, py + 14, pz + 3), r) * np.float32(self.size)
            region.paint(hole, self.palette.visceral_fat + 40, Tissue.FAT)
        # the fused discs
        for pz, py, half in ((-17.0, 8.0, 17.0), (-41.0, 14.5, 13.0), (-62.0, 13.5, 10.0)):
            disc = ellipsoid(x, y, z, (0, py, pz), (half, 8.0, 1.5)) * np.float32(self.size)
            region.paint(disc, 0.5 * (self.palette.disc + self.palette.cancellous))

    def paint_hips(self, canvas: Canvas) -> None:
        """Iliac wings with their cartilage towards the sacrum, cups, rami, ischium."""
        region = self._region(canvas, self.axes, (-150, -110, -190), (150, 70, 70))
        if region is None:
            return
        x, y, z = self._local(region, self.axes)
        x = np.abs(x)
        wing = _wing(x, y, z)
        hip = smooth_min(wing, capsule(x, y, z, (90, -31, -66), (93, -26, -26), 21.0, 7.0, deep=1.3), 10.0)
        head = np.sqrt((x - 87) ** 2 + (y + 33) ** 2 + (z + 92) ** 2)
        cup = smooth_max(head - 34, (x - 87) * np.float32(0.75) - (z + 92) * np.float32(0.6) - 6, 4.0)
        hip = smooth_min(hip, cup, 8.0)
        hip = np.minimum(hip, capsule(x, y, z, (64, -58, -88), (11, -74, -116), 8.5, 8.0, tall=1.2))
        hip = np.minimum(hip, capsule(x, y, z, (12, -72, -122), (46, -22, -165), 7.5, 6.5))
        hip = np.minimum(hip, capsule(x, y, z, (80, 4, -82), (60, 4, -162), 13.0, 15.0))
        hip = np.maximum(hip, 27.0 - head)
        hip = np.maximum(hip, np.float32(2.2) - x)
        joint = np.maximum(wing - np.float32(2.6), np.maximum(x - 80, -15 - y))
        region.paint(joint * np.float32(self.size), self.palette.cartilage, Tissue.MUSCLE)
        self._bone(region, hip, 0.95 * self.cortex_mm, self.palette.marrow, Tissue.HIP)

    def paint_femurs(self, canvas: Canvas) -> None:
        """Heads, necks, trochanters and shafts; a prosthesis where there is one."""
        region = self._region(canvas, self.axes, (-170, -70, -320), (170, 30, -62))
        if region is None:
            return
        x, y, z = self._local(region, self.axes)
        a = np.abs(x)
        head = np.sqrt((a - 87) ** 2 + (y + 33) ** 2 + (z + 92) ** 2)
        region.paint((head - 26) * np.float32(self.size), self.palette.cartilage, Tissue.MUSCLE)
        bone = smooth_min(head - 24, capsule(a, y, z, (88, -33, -93), (120, -22, -122), 15.0, 17.0), 5.0)
        bone = smooth_min(bone, ellipsoid(a, y, z, (133, -12, -116), (14, 17, 24)), 6.0)
        bone = smooth_min(bone, capsule(a, y, z, (128, -15, -130), (112, -14, -330), 17.0, 13.5), 6.0)
        self._bone(region, bone, 1.1 * self.cortex_mm, self.palette.marrow * 1.1, Tissue.FEMUR)
        for side in self.prosthesis:
            own = x * np.float32(side)
            metal = np.minimum(
                np.sqrt((own - 87) ** 2 + (y + 33) ** 2 + (z + 92) ** 2) - 27,
                np.minimum(capsule(own, y, z, (88, -33, -93), (122, -20, -128), 7.0),
                           capsule(own, y, z, (122, -20, -126), (115, -14, -260), 8.0, 5.0)),
            )  # fmt: skip
            region.paint(metal * np.float32(self.size), self.palette.metal, Tissue.METAL)


def _wing(x: F32, y: F32, z: F32) -> F32:
    """Signed distance of the iliac wing (right and left folded together), in the reference's millimetres."""
    z1 = np.ascontiguousarray(z)
    ends = [np.interp(z1, _WING[:, 0], _WING[:, k]).astype(np.float32) for k in range(1, 6)]
    fx, fy, rx, ry, bow = ends
    dx, dy = rx - fx, ry - fy
    length2 = dx * dx + dy * dy
    px, py = x - fx, y - fy
    t = np.clip((px * dx + py * dy) / length2, 0, 1)
    arch = 4 * t * (1 - t) * bow
    length = np.sqrt(length2)
    # outwards of the wing is left and posterior of the chord: (-dy, dx) / length points out
    ox, oy = px - t * dx + arch * dy / length, py - t * dy - arch * dx / length
    back = t * t * t
    front = (1 - t) ** 4
    half = np.float32(2.6) + 7.2 * back + 3.6 * front
    distance = np.sqrt(ox * ox + oy * oy) - half
    return smooth_max(distance, np.maximum(z - 59, -70 - z), 4.0)


def _sacral_plate(x: F32, y: F32, z: F32) -> tuple[F32, F32]:
    """Signed distance of the ventral sacral plate, and how far (mm) a point lies behind its middle surface."""
    best: F32 | None = None
    dorsal: F32 | None = None
    nearest: F32 | None = None
    for p, q in pairwise(_PLATE):
        py, pz, qy, qz = (np.float32(v) for v in (p[0], p[1], q[0], q[1]))
        ey, ez = qy - py, qz - pz
        length2 = ey * ey + ez * ez
        t = np.clip(((y - py) * ey + (z - pz) * ez) / length2, 0, 1)
        oy, oz = y - py - t * ey, z - pz - t * ez
        away = np.sqrt(oy * oy + oz * oz)
        half = np.float32(p[3]) + t * np.float32(q[3] - p[3])
        width = np.float32(p[2]) + t * np.float32(q[2] - p[2])
        part = smooth_max(away - half, x - width, 9.0)
        # positive behind: to the left of the downward direction
        behind = np.where(oy * -ez + oz * ey > 0, away, -away)
        if best is None or nearest is None or dorsal is None:
            best, nearest, dorsal = part, away, behind
        else:
            best = np.minimum(best, part)
            dorsal = np.where(away < nearest, behind, dorsal)
            nearest = np.minimum(away, nearest)
    if best is None or dorsal is None:
        raise AssertionError("the sacral plate has segments")
    # the wings' upper surface falls away from the midline
    top = z - 14 + np.float32(0.22) * np.maximum(x - 20, 0)
    return smooth_max(best, np.broadcast_to(top, best.shape), 4.0), dorsal


def build_pelvis(patient: VirtualPatient, spine: Spine, palette: Palette, sacral_hu: float) -> Pelvis:
    """The pelvic ring that belongs to a spine."""
    rng = patient.rng("pelvis")
    turn = np.radians(patient.sacral_slope_deg - _REFERENCE_SLOPE_DEG)
    c, s = np.cos(turn), np.sin(turn)
    axes = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    sides = {"": (), "left": (1.0,), "right": (-1.0,), "both": (1.0, -1.0)}[patient.hip_prosthesis]
    wide = 1.04 if patient.sex == "F" else 1.0
    return Pelvis(
        origin=spine["S1"].centre,
        axes=axes,
        s1=spine["S1"],
        size=patient.size,
        wide=wide * float(1 + 0.02 * rng.standard_normal()),
        palette=palette,
        spongy=Waves.draw(rng, 6.0, count=24),
        cortex_mm=float(np.clip(0.7 + 0.5 * patient.density_mg_cm3 / 150.0, 0.7, 1.3)),
        sacral_hu=0.75 * sacral_hu,
        prosthesis=sides,
    )
