"""Pedicle screws with rods, and cement."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import Canvas, Vec, Waves, capsule, ellipsoid
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine, VertebraShape


@dataclass(frozen=True, slots=True, eq=False)
class Implants:
    """Painter of everything a surgeon left."""

    patient: VirtualPatient
    spine: Spine
    palette: Palette

    def _rod(self, canvas: Canvas, start: Vec, end: Vec, radius: float) -> None:
        region = canvas.region(np.minimum(start, end) - radius - 3, np.maximum(start, end) + radius + 3)
        if region is not None:
            rod = capsule(region.x, region.y, region.z, start, end, radius)
            region.paint(rod, self.palette.metal, Tissue.METAL)

    def _cement(self, canvas: Canvas, v: VertebraShape) -> None:
        rng = self.patient.rng("cement", v.level)
        radii = np.array([0.26 * v.width, 0.22 * v.depth, 0.28 * v.height]) * rng.uniform(0.8, 1.2, 3)
        centre = v.at(float(rng.uniform(-5, 5)), -0.08 * v.depth, float(rng.uniform(-2, 2)))
        reach = float(radii.max()) + 6
        region = canvas.region(centre - reach, centre + reach)
        if region is not None:
            plug = ellipsoid(region.x, region.y, region.z, centre, radii)
            plug = plug + np.float32(2.2) * region.waves(Waves.draw(rng, 9.0, count=14))
            region.paint(plug, self.palette.cement, Tissue.METAL)

    def paint(self, canvas: Canvas) -> None:
        """Screws and rods of ``metal_levels``, plugs of ``cement_levels``."""
        for side in (1.0, -1.0):
            heads = []
            for v in self.spine.vertebrae:
                if v.level not in self.patient.metal_levels:
                    continue
                lateral = 0.5 * v.canal_width + 0.5 * v.pedicle_width
                head = v.at(side * (lateral + 4), 0.5 * v.depth + v.canal_depth + 10, 0.2 * v.height)
                self._rod(canvas, head, v.at(side * 0.5 * lateral, -0.15 * v.depth, 0.12 * v.height), 2.8)
                self._rod(canvas, head, head + v.axes @ np.array([0.0, 6.0, 0.0]), 6.0)
                heads.append(head + v.axes @ np.array([0.0, 6.0, 0.0]))
            for lower, upper in pairwise(heads):
                self._rod(canvas, lower, upper, 2.75)
        for v in self.spine.vertebrae:
            if v.level in self.patient.cement_levels:
                self._cement(canvas, v)
