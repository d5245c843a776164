"""Soft tissue: skin, fat, muscle, and the column's companions (psoas, erectors, canal, great vessels)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import F32, Canvas, Region, Vec, Waves, smooth_max
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.outline import Outline
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine


@dataclass(frozen=True, slots=True, eq=False)
class Tube:
    """A rod of elliptical axial cross-section along a line given by height.

    Attributes:
        z: ascending heights in mm; the tube ends at the first and last.
        x, y: its middle.
        rx, ry: half axes.
        sheath_mm: fat around it.
    """

    z: Vec
    x: Vec
    y: Vec
    rx: Vec
    ry: Vec
    sheath_mm: float = 0.9

    def region(self, canvas: Canvas, margin: float = 4.0) -> Region | None:
        """The part of a canvas around the tube."""
        low = [(self.x - self.rx).min() - margin, (self.y - self.ry).min() - margin, self.z[0] - margin]
        high = [(self.x + self.rx).max() + margin, (self.y + self.ry).max() + margin, self.z[-1] + margin]
        return canvas.region(low, high)

    def distance(self, region: Region) -> F32:
        """Approximate signed distance in mm."""
        rx, ry = region.along_z(self.z, self.rx), region.along_z(self.z, self.ry)
        dx = region.x - region.along_z(self.z, self.x)
        dy = region.y - region.along_z(self.z, self.y)
        level = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
        lateral = (level - 1) * np.minimum(rx, ry)
        ends = np.maximum(np.float32(self.z[0]) - region.z, region.z - np.float32(self.z[-1]))
        return smooth_max(lateral, np.broadcast_to(ends, lateral.shape), 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class Torso:
    """Painter of skin, fat and muscle wall, then of muscles and vessels along the spine."""

    outline: Outline
    palette: Palette
    strands: Waves
    marbling: Waves
    muscles: tuple[Tube, ...]
    vessels: tuple[tuple[Tube, float, Tissue], ...]
    plaques: tuple[tuple[float, float, float, float], ...]
    canal: Tube
    sac: Tube
    streak_level: float
    planes: Waves
    plane_depth: float

    def muscle_hu(self, region: Region) -> F32:
        """Muscle with fatty streaks."""
        field = region.waves(self.marbling)
        streak = np.clip((field - np.float32(self.streak_level)) * np.float32(0.6), 0, 1)
        return np.asarray(np.float32(self.palette.muscle) + 3 * field - streak * np.float32(85.0))

    def paint_shell(self, canvas: Canvas) -> None:
        """Skin, subcutaneous fat, muscle wall, visceral fat."""
        o, p = self.outline, self.palette
        s = o.skin
        low = [float((o.x - s.half_width).min()) - 8, float(s.front.min()) - 8, -1e5]
        high = [float((o.x + s.half_width).max()) + 8, float(s.back.max()) + 8, 1e5]
        region = canvas.region(low, high)
        if region is None:
            return
        furrow = (region.x - region.along_z(o.heights, o.x)) * np.float32(1 / 22.0)
        groove = np.float32(7.0) * np.exp(-furrow * furrow) * (region.y > region.along_z(o.heights, o.skin.middle))
        skin = o.distance(region, o.skin) + np.float32(3.0) * region.waves(o.ripple) + groove
        region.paint(skin, p.skin, Tissue.SKIN)
        fat = np.float32(p.fat) + np.float32(5.0) * region.waves(self.strands)
        region.paint(skin + np.float32(2.0), fat, Tissue.FAT, soft_mm=1.0)
        lumps = np.float32(2.0) * region.waves(o.lumps)
        wall = smooth_max(o.distance(region, o.wall) + lumps, skin + np.float32(5.0), 3.0)
        muscle = self.muscle_hu(region)
        # fat planes between the layers and bellies of muscle
        planes = np.clip(np.float32(1.1) - np.abs(region.waves(self.planes)) * np.float32(11.0), 0, 1)
        region.paint(wall, muscle - planes * np.float32(self.plane_depth), Tissue.MUSCLE)
        cavity = o.distance(region, o.cavity) + lumps
        visceral = fat + np.float32(p.visceral_fat - p.fat)
        region.paint(cavity, visceral, Tissue.FAT, soft_mm=1.0)

    def paint_spine_companions(self, canvas: Canvas) -> None:
        """Psoas and erectors with their fat planes, vessels with plaques, the canal with fat and thecal sac."""
        p = self.palette
        for tube in self.muscles:
            region = tube.region(canvas)
            if region is None:
                continue
            distance = tube.distance(region)
            region.paint(distance - np.float32(tube.sheath_mm), p.visceral_fat, Tissue.FAT, soft_mm=1.5)
            planes = np.clip(np.float32(1.1) - np.abs(region.waves(self.planes)) * np.float32(9.0), 0, 1)
            region.paint(distance, self.muscle_hu(region) - planes * np.float32(self.plane_depth), Tissue.MUSCLE)
        for tube, hu, tissue in self.vessels:
            region = tube.region(canvas)
            if region is not None:
                region.paint(tube.distance(region), hu, tissue)
        for x, y, z, radius in self.plaques:
            region = canvas.region([x - 6, y - 6, z - 8], [x + 6, y + 6, z + 8])
            if region is not None:
                away = np.sqrt((region.x - np.float32(x)) ** 2 + (region.y - np.float32(y)) ** 2
                               + ((region.z - np.float32(z)) * np.float32(0.5)) ** 2)  # fmt: skip
                region.paint(away - np.float32(radius), p.plaque)
        for tube, hu, tissue in ((self.canal, p.visceral_fat + 20, Tissue.CANAL), (self.sac, p.thecal, Tissue.CANAL)):
            region = tube.region(canvas)
            if region is not None:
                region.paint(tube.distance(region), hu, tissue)


def _muscles(patient: VirtualPatient, spine: Spine) -> list[Tube]:
    """Psoas (to the hip), erectors and quadratus lumborum, both sides."""
    rng = patient.rng("muscles")
    size = patient.size
    bulk = size * (1.0 - 0.18 * patient.ageing) * (0.92 if patient.sex == "F" else 1.05)
    s1 = spine["S1"].centre
    tubes = []
    for side in (1.0, -1.0):
        wobble = float(1 + 0.05 * rng.standard_normal())
        # heights by count above S1, then in mm below it: offset from the column, half axes
        n = np.array([6.3, 5.5, 5.0, 4.0, 3.0, 2.0, 1.0, 0.3])
        z = np.array([spine.z_of(k) for k in n])
        x = np.interp(z, spine.heights, spine.curve_x) + side * np.array([23, 26, 29, 34, 38, 43, 48, 54]) * size
        y = np.interp(z, spine.heights, spine.curve_y) + np.array([10, 9, 8, 5, 3, 2, 1, -4]) * size
        rx = np.array([2, 6, 9, 14, 17, 20, 22, 22]) * bulk * wobble
        ry = np.array([3, 9, 13, 19, 23, 25, 24, 22]) * bulk * wobble
        down = np.array([-30.0, -60, -90, -125]) * size
        z = np.concatenate([z, s1[2] + down])
        x = np.concatenate([x, side * np.array([70, 84, 93, 97]) * size])
        y = np.concatenate([y, s1[1] + np.array([-50, -70, -72, -60]) * size])
        rx = np.concatenate([rx, np.array([24, 24, 17, 14]) * bulk])
        ry = np.concatenate([ry, np.array([20, 15, 14, 13]) * bulk])
        order = np.argsort(z)
        tubes.append(Tube(z[order], x[order], y[order], rx[order], ry[order]))
        # iliacus lining the iliac wing
        z = s1[2] + np.array([-45.0, -15, 10, 30]) * size
        tubes.append(
            Tube(z, side * np.array([88.0, 94, 100, 108]) * size, s1[1] + np.array([-58.0, -42, -30, -22]) * size,
                 np.array([22.0, 24, 18, 6]) * bulk, np.array([22.0, 24, 20, 9]) * bulk)
        )  # fmt: skip
        # erectors and multifidus
        z = np.array([spine.z_of(k) for k in (-1.2, -0.3, 1, 2, 3.5, 5, 7, 9, 12)])
        cy = np.interp(z, spine.heights, spine.curve_y)
        cx = np.interp(z, spine.heights, spine.curve_x)
        off = np.array([30.0, 44, 57, 59, 58, 56, 55, 55, 54]) * size
        rx = np.array([5.0, 20, 32, 36, 37, 37, 38, 34, 28]) * bulk
        ry = np.array([5.0, 15, 25, 27, 26, 25, 22, 18, 15]) * bulk
        tubes.append(Tube(z, cx + side * (rx + 1.5), cy + off, rx, ry, 0.0))
        # quadratus lumborum
        z = np.array([spine.z_of(k) for k in (0.6, 2, 3.5, 5, 5.8)])
        cy = np.interp(z, spine.heights, spine.curve_y)
        cx = np.interp(z, spine.heights, spine.curve_x)
        tubes.append(
            Tube(z, cx + side * np.array([84.0, 76, 66, 52, 44]) * size, cy + np.array([20.0, 24, 28, 30, 28]) * size,
                 np.array([13.0, 16, 15, 10, 5]) * bulk, np.array([7.0, 9, 9, 7, 4]) * bulk)
        )  # fmt: skip
    return tubes


def _vessels(patient: VirtualPatient, spine: Spine, palette: Palette) -> list[tuple[Tube, float, Tissue]]:
    """Aorta to its fork at L4, caval vein, iliac vessels."""
    rng = patient.rng("vessels")
    size = patient.size
    n = np.array([2.1, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.5])
    z = np.array([spine.z_of(k) for k in n])
    cx, cy = np.interp(z, spine.heights, spine.curve_x), np.interp(z, spine.heights, spine.curve_y)
    front = np.array([v.depth for v in spine.vertebrae])[np.clip(np.round(n).astype(int), 0, 12)] * 0.5
    wide = (9.0 + 2.5 * patient.ageing) * size * float(1 + 0.08 * rng.standard_normal())
    ax = cx + np.array([6.0, 11, 12, 12, 10, 8, 10, 16, 20]) * size
    ar = wide * np.array([0.9, 0.92, 0.95, 1.0, 1.08, 1.15, 1.2, 1.25, 1.25])
    ay = cy - front - ar - np.array([3.0, 4, 4, 3, 2, 1, 0, -2, -6])
    vessels = [(Tube(z, ax, ay, ar, ar), palette.aorta, Tissue.AORTA)]
    vx = cx - np.array([8.0, 15, 16, 17, 18, 20, 24, 26, 26]) * size
    vr = np.array([9.0, 11, 11, 11.5, 12.5, 13, 13, 12, 12]) * size
    vy = cy - front - vr - np.array([1.0, 1, 2, 4, 8, 14, 20, 24, 24])
    keep = slice(0, 8)
    vessels.append((Tube(z[keep], vx[keep], vy[keep], (vr * 1.15)[keep], (vr * 0.8)[keep]), palette.vein, Tissue.VEIN))
    s1 = spine["S1"].centre
    for side in (1.0, -1.0):
        low = s1[2] + np.array([-120.0, -80, -40, 0]) * size
        zz = np.concatenate([low, [z[0] + 2]])
        x = np.concatenate([side * np.array([72.0, 66, 54, 34]) * size, [ax[0] + side * 4]])
        y = np.concatenate([s1[1] + np.array([-88.0, -82, -66, -46]) * size, [ay[0]]])
        r = np.array([5.0, 5.2, 5.5, 6, 6.5]) * size
        vessels.append((Tube(zz, x, y, r, r), palette.aorta, Tissue.AORTA))
        x = np.concatenate([side * np.array([64.0, 60, 50, 32]) * size, [vx[0] + side * 5]])
        y = np.concatenate([s1[1] + np.array([-80.0, -72, -55, -33]) * size, [vy[0] + 3]])
        vessels.append((Tube(zz, x, y, r * 1.25, r * 1.1), palette.vein, Tissue.VEIN))
    return vessels


def build_torso(patient: VirtualPatient, spine: Spine, outline: Outline, palette: Palette) -> Torso:
    """Draw the torso's soft tissue for one patient."""
    rng = patient.rng("torso")
    vessels = _vessels(patient, spine, palette)
    aorta = vessels[0][0]
    count = int(rng.poisson(14.0 * patient.ageing**2.5))
    plaques = []
    for _ in range(count):
        z = float(rng.uniform(aorta.z[0], aorta.z[5]))
        angle = float(rng.uniform(0, 2 * np.pi))
        ring = float(np.interp(z, aorta.z, aorta.rx))
        x = float(np.interp(z, aorta.z, aorta.x)) + ring * float(np.cos(angle))
        y = float(np.interp(z, aorta.z, aorta.y)) + ring * float(np.sin(angle))
        plaques.append((x, y, z, float(rng.uniform(0.8, 2.4))))
    lumbar = spine["L3"]
    ordered = sorted(spine.vertebrae, key=lambda v: float(v.centre[2]))
    rx = np.interp(spine.canal_z, [float(v.centre[2]) for v in ordered], [0.5 * v.canal_width for v in ordered])
    ry = np.full_like(rx, 0.5 * lumbar.canal_depth + 0.5)
    low = spine.canal_z < spine["S1"].centre[2]
    rx, ry = np.where(low, rx * 0.8, rx), np.where(low, ry * 0.75, ry)
    sac_taper = np.clip((spine.canal_z - spine["S1"].centre[2] + 40) / 40.0, 0.2, 1.0)
    return Torso(
        outline=outline,
        palette=palette,
        strands=Waves.draw(rng, 22.0, count=16),
        marbling=Waves.draw(rng, 12.0, stretch=np.array([2.4, 0.7, 5.0]), count=24),
        muscles=tuple(_muscles(patient, spine)),
        vessels=tuple(vessels),
        plaques=tuple(plaques),
        canal=Tube(spine.canal_z, spine.canal_x, spine.canal_y, rx, ry),
        sac=Tube(spine.canal_z, spine.canal_x, spine.canal_y, 0.80 * rx * sac_taper, 0.84 * ry * sac_taper),
        streak_level=float(1.8 - 0.9 * patient.ageing),
        planes=Waves.draw(rng, 62.0, stretch=np.array([1.0, 1.0, 3.0]), count=14),
        plane_depth=38.0 + 45.0 * patient.ageing,
    )
