"""Organs of chest base, abdomen and pelvis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import F32, Canvas, Region, Vec, Waves, capsule, ellipsoid, smooth_max
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.outline import Outline
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine


@dataclass(frozen=True, slots=True, eq=False)
class Organ:
    """An ellipsoid with a random surface.

    Attributes:
        axes: (3, 3) columns are its own axes in LPS.
    """

    centre: Vec
    radii: Vec
    axes: Vec
    hu: float
    tissue: Tissue
    bumps: Waves
    bump_mm: float

    def region(self, canvas: Canvas) -> Region | None:
        """The part of a canvas around it."""
        reach = np.abs(self.axes) @ self.radii + self.bump_mm * 2 + 2
        return canvas.region(self.centre - reach, self.centre + reach)

    def local(self, region: Region) -> tuple[F32, F32, F32]:
        """Coordinates in its own axes."""
        c, a = self.centre.astype(np.float32), self.axes.astype(np.float32)
        dx, dy, dz = region.x - c[0], region.y - c[1], region.z - c[2]
        x, y, z = ((dx * a[0, k] + dy * a[1, k]) + dz * a[2, k] for k in range(3))
        return x, y, z

    def distance(self, region: Region) -> F32:
        """Signed distance in mm."""
        x, y, z = self.local(region)
        return ellipsoid(x, y, z, (0, 0, 0), self.radii) + np.float32(self.bump_mm) * region.waves(self.bumps)


@dataclass(frozen=True, slots=True, eq=False)
class Colon:
    """A chain of rods with haustra, full of stool and gas."""

    points: Vec
    radii: Vec


@dataclass(frozen=True, slots=True, eq=False)
class Organs:
    """Painter of everything in the cavity."""

    patient: VirtualPatient
    palette: Palette
    outline: Outline
    spine: Spine
    solids: tuple[Organ, ...]
    kidneys: tuple[Organ, ...]
    stomach: Organ
    stomach_level: float
    colon: Colon
    dome: tuple[float, float]
    liver_low: float
    fields: dict[str, Waves]
    bowel_z: tuple[float, float]
    vacuum_disc: str

    def paint(self, canvas: Canvas) -> None:
        """Bowel, liver, spleen and others, colon, kidneys, lungs."""
        self._paint_small_bowel(canvas)
        for organ in self.solids:
            region = organ.region(canvas)
            if region is not None:
                self._solid(region, organ.distance(region), organ.hu, organ.tissue)
        self._paint_stomach(canvas)
        self._paint_liver_and_lungs(canvas)
        self._paint_colon(canvas)
        self._paint_kidneys(canvas)

    def _solid(self, region: Region, distance: F32, hu: float | F32, tissue: Tissue) -> None:
        region.paint(distance - np.float32(1.2), self.palette.visceral_fat, Tissue.FAT, soft_mm=1.5)
        region.paint(distance, hu, tissue, soft_mm=0.8)

    def _cavity(self, region: Region) -> F32:
        return self.outline.distance(region, self.outline.cavity)

    def _paint_small_bowel(self, canvas: Canvas) -> None:
        low, high = self.bowel_z
        o = self.outline
        wide = float(o.cavity.half_width.max())
        region = canvas.region([-wide, float(o.cavity.front.min()) - 5, low], [wide, 40, high])
        if region is None:
            return
        f = self.fields
        one, two = region.waves(f["loop"]), region.waves(f["coil"])
        cavity = self._cavity(region)
        column = region.along_z(self.spine.heights, self.spine.curve_y) - np.float32(34)
        # loops lie in front of the column and inside the cavity
        inside = np.maximum(np.maximum(cavity + 4, region.y - column), np.maximum(low - region.z, region.z - high))
        tube = (np.sqrt(one * one + two * two) - np.float32(0.90)) * np.float32(10.0)
        loops = smooth_max(tube, inside, 5.0)
        region.paint(loops, self.palette.wall, Tissue.BOWEL, soft_mm=1.0)
        mood = region.waves(f["mood"])
        content = np.float32(self.palette.bowel_content - 4) + 9 * mood + 5 * region.waves(f["stool"])
        region.paint(loops + np.float32(2.6), content, Tissue.BOWEL, soft_mm=1.5)
        front = region.along_z(o.heights, o.cavity.front)
        bubble = np.maximum(
            loops + np.float32(3.4), (np.float32(1.45) - mood) * 14 + (region.y - front) * np.float32(0.12)
        )
        region.paint(bubble, -930.0, Tissue.GAS)
        threads = np.abs(region.waves(f["vessel"])) + np.abs(region.waves(f["vein"]))
        threads = (threads - np.float32(0.22)) * np.float32(7.0)
        threads = np.maximum(threads, np.maximum(inside + 4, np.float32(3.0) - loops))
        region.paint(threads, self.palette.vein)

    def _paint_stomach(self, canvas: Canvas) -> None:
        region = self.stomach.region(canvas)
        if region is None:
            return
        distance = np.maximum(self.stomach.distance(region), self._cavity(region) + 5)
        self._solid(region, distance, self.palette.wall + 6, Tissue.BOWEL)
        lumps = region.waves(self.fields["stool"])
        region.paint(distance + 4, self.palette.bowel_content + 9 * lumps, Tissue.BOWEL, soft_mm=1.5)
        # gas rises to the front of a patient who lies on the back, with a flat level
        gas = np.maximum(distance + 4, region.y - np.float32(self.stomach_level))
        region.paint(gas, -960.0, Tissue.GAS)

    def _dome(self, region: Region) -> F32:
        """Height (mm) of the diaphragm."""
        o = self.outline
        right, left = self.dome
        middle = float(np.interp(right, o.heights, o.cavity.middle))
        wide = float(np.interp(right, o.heights, o.cavity.half_width))
        deep = float(np.interp(right, o.heights, o.cavity.half_depth))
        dy = (region.y - np.float32(middle - 8)) * np.float32(1 / deep)
        back = np.float32(38.0) * np.clip(dy - np.float32(0.2), 0, 1.2)
        surfaces = []
        for top, cx in ((right, -0.46 * wide), (left, 0.50 * wide)):
            dx = (region.x - np.float32(cx)) * np.float32(1 / (0.62 * wide))
            r2 = dx * dx + dy * dy * np.float32(1.1)
            surfaces.append(np.float32(top) - np.float32(34.0) * r2 - np.float32(26.0) * r2 * r2 - back)
        # each lung over its own half; the middle is the heart's floor
        return np.asarray(np.maximum(surfaces[0], surfaces[1]))

    def _paint_liver_and_lungs(self, canvas: Canvas) -> None:
        o, p = self.outline, self.palette
        top = float(o.heights.max())
        region = canvas.region([-1e4, -1e4, self.liver_low - 20], [1e4, 1e4, top])
        if region is None:
            return
        cavity = self._cavity(region)
        dome = self._dome(region)
        bumps = region.waves(self.fields["organ"])
        wide = float(np.interp(self.dome[0], o.heights, o.cavity.half_width))
        middle = region.along_z(o.heights, o.cavity.middle)
        lower = np.float32(self.liver_low) + np.float32(0.62) * np.maximum(region.x + np.float32(0.85 * wide), 0)
        lower = lower + np.float32(0.30) * (region.y - middle) + np.float32(5.0) * bumps
        column = region.along_z(self.spine.heights, self.spine.curve_y) + np.float32(12)
        liver = smooth_max(cavity + 3, region.z - dome + 3, 6.0)
        liver = smooth_max(liver, (lower - region.z) * np.float32(0.8), 14.0)
        front = region.along_z(o.heights, o.cavity.front)
        lobe = (region.x - np.float32(0.30 * wide)) * np.float32(0.75) + (region.y - front - 38) * np.float32(0.65)
        liver = smooth_max(liver, lobe + 6 * bumps, 16.0)
        behind = region.y - column - np.maximum(-region.x - 30, 0) * np.float32(0.8)
        liver = smooth_max(liver, np.broadcast_to(behind, liver.shape), 10.0)
        vessels = np.abs(region.waves(self.fields["vessel"])) + np.abs(region.waves(self.fields["vein"]))
        hu = np.float32(p.liver) + np.float32(0.6 * (p.vein - p.liver)) * np.clip(np.float32(1.4) - 7 * vessels, 0, 1)
        self._solid(region, liver, hu, Tissue.LIVER)
        lung = smooth_max(cavity + 2, dome - region.z, 4.0)
        heart_x = np.abs(region.x - np.float32(18)) - np.float32(38)
        heart = np.maximum(region.y - middle - 42, heart_x)
        spine_gap = np.float32(30) - np.sqrt(region.x**2 + (region.y - column + 12) ** 2)
        lung = smooth_max(lung, -np.broadcast_to(heart, lung.shape), 6.0)
        lung = smooth_max(lung, spine_gap, 8.0)
        strands = np.clip(np.float32(1.35) - 8 * vessels, 0, 1)
        depth = np.clip((region.y - middle) * np.float32(0.01), -1, 1)
        air = np.float32(p.lung) + 28 * region.waves(self.fields["mood"]) + 45 * depth + strands * np.float32(700)
        region.paint(lung, air, Tissue.LUNG, soft_mm=1.0)
        front_fat = smooth_max(cavity + 2, np.maximum(dome - region.z - 4, heart), 4.0)
        region.paint(front_fat, p.visceral_fat, Tissue.FAT, soft_mm=2.0)
        beat = ellipsoid(region.x, region.y - middle, region.z, (20, -18, self.dome[0] + 22), (44, 52, 48))
        region.paint(smooth_max(beat, front_fat + 3, 4.0), p.aorta * 0.9 + 5, Tissue.ORGAN, soft_mm=2.0)

    def _paint_colon(self, canvas: Canvas) -> None:
        f, p = self.fields, self.palette
        for a, b, ra, rb in zip(self.colon.points[:-1], self.colon.points[1:], self.colon.radii[:-1],
                                self.colon.radii[1:], strict=True):  # fmt: skip
            reach = max(ra, rb) + 8
            region = canvas.region(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if region is None:
                continue
            haustra = region.waves(f["haustra"])
            distance = capsule(region.x, region.y, region.z, a, b, float(ra), float(rb)) + np.float32(3.0) * haustra
            distance = np.maximum(distance, self._cavity(region) + 3)
            self._solid(region, distance, p.wall, Tissue.BOWEL)
            stool = region.waves(f["stool"])
            crumbs = np.float32(p.bowel_content - 5) + 14 * stool
            region.paint(distance + 2.5, crumbs, Tissue.BOWEL)
            speckle = np.maximum((np.float32(1.25) - stool) * np.float32(2.0), distance + 3.5)
            region.paint(speckle, -560.0, Tissue.GAS)
            middle_y = np.float32(0.5 * (a[1] + b[1]))
            mood = region.waves(f["mood"])
            gas = np.maximum(distance + 3, (np.float32(0.5) - mood) * 9 + (region.y - middle_y) * np.float32(0.7))
            region.paint(gas, -960.0, Tissue.GAS)

    def _paint_kidneys(self, canvas: Canvas) -> None:
        p = self.palette
        for organ in self.kidneys:
            region = organ.region(canvas)
            if region is None:
                continue
            region.paint(
                ellipsoid(*organ.local(region), (0, 0, 0), organ.radii + 5), p.visceral_fat, Tissue.FAT, soft_mm=3
            )
            distance = organ.distance(region)
            side = 1.0 if organ.centre[0] > 0 else -1.0
            x, y, z = organ.local(region)
            sinus = ellipsoid(x, y, z, (-side * 0.62 * organ.radii[0], 0, 0), organ.radii * [0.75, 0.42, 0.55])
            sinus = sinus + 2 * region.waves(organ.bumps)
            region.paint(distance, p.kidney_cortex, Tissue.KIDNEY, soft_mm=0.8)
            pyramid = np.maximum(distance + 6, (np.float32(0.25) - region.waves(self.fields["haustra"])) * 5)
            region.paint(pyramid, p.kidney_medulla, None, soft_mm=1.0)
            region.paint(np.maximum(sinus, distance - 1), p.visceral_fat + 15, Tissue.FAT, soft_mm=1.0)
            pelvis = ellipsoid(x, y, z, (-side * 0.75 * organ.radii[0], 0, -2), organ.radii * [0.42, 0.2, 0.28])
            region.paint(pelvis, p.renal_pelvis, None, soft_mm=1.0)
