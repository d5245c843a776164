"""Where the organs of one patient lie, how large they are and what they hold."""

from __future__ import annotations

import numpy as np

from osteo_daemon.phantom.calibration import Palette
from osteo_daemon.phantom.canvas import Vec, Waves
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.organs import Colon, Organ, Organs
from osteo_daemon.phantom.outline import Outline
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.spine import Spine


def _turned(about_y: float, about_x: float) -> Vec:
    cy, sy, cx, sx = np.cos(about_y), np.sin(about_y), np.cos(about_x), np.sin(about_x)
    about = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.asarray(about @ np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]]))


def build_organs(patient: VirtualPatient, spine: Spine, outline: Outline, palette: Palette) -> Organs:
    """Draw the organs of one patient."""
    rng = patient.rng("organs")
    size = patient.size
    s1 = spine["S1"].centre

    def column(count: float) -> Vec:
        z = spine.z_of(count)
        x, y = (float(np.interp(z, spine.heights, c)) for c in (spine.curve_x, spine.curve_y))
        return np.array([x, y, z])

    def at(values: Vec, z: float) -> float:
        return float(np.interp(z, outline.heights, values))

    def jitter(mm: float) -> Vec:
        return mm * rng.standard_normal(3)

    def organ(centre: Vec, radii: tuple[float, ...], hu: float, tissue: Tissue, bump: float = 2.0,
              about_y: float = 0.0, about_x: float = 0.0) -> Organ:  # fmt: skip
        scale = size * float(1 + 0.07 * rng.standard_normal())
        return Organ(np.asarray(centre), np.array(radii) * scale, _turned(about_y, about_x), hu, tissue,
                     Waves.draw(rng, 45.0, count=12), bump)  # fmt: skip

    kidneys = []
    for side, count in ((1.0, 4.35), (-1.0, 4.0)):
        base = column(count) + np.array([side * 68 * size, 16 * size, 0]) + jitter(4.0)
        kidneys.append(organ(base, (30, 26, 54), palette.kidney_cortex, Tissue.KIDNEY, 1.2, side * -0.28, -0.22))
    z = spine.z_of(6.3)
    front, wide = at(outline.cavity.front, z), at(outline.cavity.half_width, z)
    middle = at(outline.cavity.middle, z)
    solids = [
        organ(np.array([0.80 * wide, middle + 30, spine.z_of(6.4)]) + jitter(4), (24, 48, 46), palette.spleen,
              Tissue.SPLEEN),
        organ(column(5.0) + np.array([15.0, -42, 0]) + jitter(4), (70, 12, 14), palette.pancreas, Tissue.ORGAN, 4.0,
              -0.25),
        organ(column(4.4) + np.array([-42.0, -44, 0]) + jitter(3), (17, 17, 34), palette.wall, Tissue.BOWEL, 3.0),
        organ(np.array([0, s1[1] - 58, s1[2] - 82 * size]) + jitter(4), tuple(rng.uniform(28, 46, 3)), palette.urine,
              Tissue.BLADDER, 2.0),
        organ(np.array([0, s1[1] + 16, s1[2] - 78 * size]) + jitter(3), (19, 17, 46), palette.wall - 5,
              Tissue.BOWEL, 2.5),
    ]  # fmt: skip
    if patient.sex == "F":
        solids.append(
            organ(np.array([0, s1[1] - 16, s1[2] - 58 * size]) + jitter(6), (28, 20, 30), palette.uterus, Tissue.ORGAN)
        )
    else:
        solids.append(organ(np.array([0, s1[1] - 50, s1[2] - 122 * size]), (24, 18, 18), palette.wall, Tissue.ORGAN))
    stomach = organ(np.array([0.42 * wide, front + 52, spine.z_of(5.9)]) + jitter(6), (48, 40, 58), palette.wall,
                    Tissue.BOWEL, 5.0, 0.35)  # fmt: skip
    flank_z = spine.z_of(3.0)
    fw, fm, ff = (at(v, flank_z) for v in (outline.cavity.half_width, outline.cavity.middle, outline.cavity.front))
    caecum = np.array([-0.62 * fw, fm - 12, s1[2] + 8])
    points = np.array([
        caecum, [-0.78 * fw, fm + 5, spine.z_of(2.2)], [-0.80 * fw, fm + 2, spine.z_of(3.6)], [-0.60 * fw, ff + 45,
        spine.z_of(4.0)], [-0.28 * fw, ff + 30, spine.z_of(3.0)], [0.2 * fw, ff + 28, spine.z_of(3.1)], [0.62 * fw, ff
        + 48, spine.z_of(4.6)], [0.84 * fw, fm + 18, spine.z_of(5.3)], [0.84 * fw, fm + 22, spine.z_of(3.6)], [0.82 *
        fw, fm + 10, spine.z_of(2.0)], [0.62 * fw, fm - 10, s1[2] + 5], [0.2 * fw, fm - 15, s1[2] - 30], [0.05 * fw,
        s1[1] + 5, s1[2] - 45],
    ])  # fmt: skip
    points = points + 5.0 * rng.standard_normal(points.shape)
    radii = np.array([27, 25, 23, 22, 20, 20, 20, 18, 15, 14, 14, 15, 15]) * size * (1 + 0.12 * rng.standard_normal(13))
    vacuum = ""
    if patient.degeneration > 0.4 and rng.uniform() < 0.5:
        vacuum = spine.vertebrae[int(rng.integers(1, 3))].level
    ribs_shift = 12 - patient.thoracic_count + 5 - patient.lumbar_count  # the diaphragm goes with the ribs
    dome_right = spine.z_of(8.6 - ribs_shift * 0.5) + float(8 * rng.standard_normal())
    return Organs(
        patient=patient,
        palette=palette,
        outline=outline,
        spine=spine,
        solids=tuple(solids),
        kidneys=tuple(kidneys),
        stomach=stomach,
        stomach_level=float(stomach.centre[1] - stomach.radii[1] * rng.uniform(0.0, 0.7)),
        colon=Colon(points, radii),
        dome=(dome_right, dome_right - 14.0),
        liver_low=spine.z_of(3.0) + float(10 * rng.standard_normal()),
        fields={
            "loop": Waves.draw(rng, 54.0), "coil": Waves.draw(rng, 54.0), "mood": Waves.draw(rng, 75.0),
            "vessel": Waves.draw(rng, 45.0), "vein": Waves.draw(rng, 45.0), "stool": Waves.draw(rng, 11.0, count=28),
            "haustra": Waves.draw(rng, 30.0), "organ": Waves.draw(rng, 90.0, count=12),
        },
        bowel_z=(s1[2] - 70 * size, spine.z_of(4.6)),
        vacuum_disc=vacuum,
    )  # fmt: skip
