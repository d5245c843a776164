"""The whole body: every painter of one patient on one scanner, in the order of painting."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from osteo_daemon.phantom.calibration import Palette, trabecular_hu
from osteo_daemon.phantom.canvas import Canvas
from osteo_daemon.phantom.implants import Implants
from osteo_daemon.phantom.layout import build_organs
from osteo_daemon.phantom.organs import Organs
from osteo_daemon.phantom.outline import Outline, build_outline
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.pelvis import Pelvis, build_pelvis
from osteo_daemon.phantom.ribs import Ribs, build_ribs
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.spine import Spine, VertebraShape, build_spine
from osteo_daemon.phantom.table import Table, build_table
from osteo_daemon.phantom.torso import Torso, build_torso
from osteo_daemon.phantom.vertebra import VertebraPainter, prepare_vertebra


@dataclass(slots=True, eq=False)
class Body:
    """All parts of one patient on one scanner.

    Attributes:
        voxel_mm: edge of the voxels that will be painted (textures are averaged over it).
        painters: prepared vertebrae by level; filled before painting starts and only read afterwards.
    """

    patient: VirtualPatient
    scanner: Scanner
    voxel_mm: float
    spine: Spine
    outline: Outline
    palette: Palette
    torso: Torso
    organs: Organs
    ribs: Ribs
    pelvis: Pelvis
    implants: Implants
    table: Table
    painters: dict[str, VertebraPainter] = field(default_factory=dict)

    @property
    def girth_mm(self) -> tuple[float, float, float]:
        """Half width, half depth and middle (y) of the skin at L3."""
        o, z = self.outline, self.spine["L3"].centre[2]
        a, b, m = (float(np.interp(z, o.heights, v)) for v in (o.skin.half_width, o.skin.half_depth, o.skin.middle))
        return a, b, m

    @property
    def girth_factor(self) -> float:
        """Noise relative to a torso of 165 x 115 mm half axes: doubles with about 8 cm more water (half of it seen,
        since tube current modulation takes back part of it)."""
        a, b, _ = self.girth_mm
        return float(np.clip(np.exp(0.5 * np.log(2.0) * (2.0 * np.sqrt(a * b) - 275.0) / 80.0), 0.6, 1.8))

    @property
    def table_centre_y(self) -> float:
        """y of the middle of the field of view: the torso's middle, lowered so that the table top is seen."""
        return self.girth_mm[2] + 15.0

    def core_hu(self, v: VertebraShape) -> float:
        """True mean attenuation of a vertebra's core."""
        return trabecular_hu(v.trabecular_mg_cm3, self.scanner.kvp, self.scanner.phase)

    def prepare_vertebrae(self, low: float, high: float) -> None:
        """Draw the textures of all vertebrae between two heights (mm), with margin."""
        last = self.spine.vertebrae[1].level
        for v in self.spine.vertebrae:
            if low - 60 < v.centre[2] < high + 60 and v.level not in self.painters:
                self.painters[v.level] = prepare_vertebra(
                    self.patient, self.scanner, self.palette, v, self.voxel_mm, v.level == last
                )

    def paint(self, canvas: Canvas) -> None:
        """Paint everything, from the table and the skin inwards."""
        self.table.paint(canvas)
        self.paint_soft(canvas)
        self.paint_bones(canvas)

    def paint_soft(self, canvas: Canvas) -> None:
        """Skin, fat, muscle, organs, vessels, canal."""
        self.torso.paint_shell(canvas)
        self.organs.paint(canvas)
        self.torso.paint_spine_companions(canvas)

    def paint_bones(self, canvas: Canvas) -> None:
        """Ribs, pelvis, discs and vertebrae, implants last."""
        self.ribs.paint(canvas)
        self.pelvis.paint_sacrum(canvas)
        self.pelvis.paint_hips(canvas)
        self.pelvis.paint_femurs(canvas)
        order = [v.level for v in self.spine.vertebrae]
        below = dict(zip(order[1:], self.spine.vertebrae, strict=False))
        for level, painter in self.painters.items():
            if level in below:
                painter.paint_disc(canvas, below[level], self.organs.vacuum_disc == level)
        for painter in self.painters.values():
            painter.paint_posterior(canvas)
        for painter in self.painters.values():
            painter.paint_body(canvas)
        self.implants.paint(canvas)


def build_body(patient: VirtualPatient, scanner: Scanner, voxel_mm: float, only: str | None = None) -> Body:
    """Assemble a body.

    Args:
        voxel_mm: edge of the voxels that will be painted.
        only: prepare this vertebra and its neighbours at once (for a single VOI).

    Raises:
        KeyError: when the patient has no such level.
    """
    spine = build_spine(patient)
    outline = build_outline(patient, spine)
    palette = Palette.of(patient, scanner)
    s1_hu = trabecular_hu(spine["S1"].trabecular_mg_cm3, scanner.kvp, scanner.phase)
    body = Body(
        patient=patient,
        scanner=scanner,
        voxel_mm=voxel_mm,
        spine=spine,
        outline=outline,
        palette=palette,
        torso=build_torso(patient, spine, outline, palette),
        organs=build_organs(patient, spine, outline, palette),
        ribs=build_ribs(patient, spine, outline, palette),
        pelvis=build_pelvis(patient, spine, palette, s1_hu),
        implants=Implants(patient, spine, palette),
        table=build_table(scanner, spine, outline),
    )
    if only is not None:
        z = float(spine[only].centre[2])
        body.prepare_vertebrae(z + 15, z - 15)
    return body
