"""Where each vertebra stands and how large it is.

Sizes are for a man of 176 cm, by level: endplate width and depth, heights, canal and pedicle width after the cadaver
series of Panjabi et al. (Spine 1991;16:888 thoracic; Spine 1992;17:299 lumbar), enlarged by about 5 % to what CT of
the living shows (Zhou et al., Eur Spine J 2000;9:242), and rounded; `VirtualPatient.size` scales them (women 0.93).
The order of sagittal segment angles follows standing radiographs (most lordosis at L4-S1, thoracic kyphosis even);
their sums are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from osteo_daemon.phantom.canvas import Vec
from osteo_daemon.phantom.patient import Fracture, VirtualPatient

# level: width, depth, anterior height, posterior height, disc below, canal width, canal depth, pedicle width,
# pedicle height, transverse process half span, spinous tip behind the body wall, spinous drop
_TABLE: Final[dict[str, tuple[float, ...]]] = {
    "T1": (30, 18, 15, 15.5, 4.5, 21, 16, 8, 9.5, 36, 46, 22),
    "T2": (29, 19, 16, 17, 4.0, 19, 15, 7.5, 11, 34, 46, 24),
    "T3": (28, 21, 16.5, 17.5, 3.8, 18, 15.5, 6, 12, 31, 46, 26),
    "T4": (28, 23.5, 17, 18, 3.8, 17, 16, 5.5, 12, 30, 46, 28),
    "T5": (29, 25.5, 17.5, 18.5, 4.0, 17.5, 16, 5.5, 12, 31, 46, 30),
    "T6": (30, 27.5, 18, 19, 4.2, 17.5, 16, 5.5, 12.5, 31, 46, 31),
    "T7": (31, 29, 18.5, 19.5, 4.5, 17.5, 16, 6, 12.5, 31, 46, 31),
    "T8": (32.5, 30.5, 19.2, 20, 4.8, 17.5, 16, 6.5, 13, 31, 46, 30),
    "T9": (34.5, 31.5, 20, 20.6, 5.2, 17.5, 16, 7, 14, 31, 44, 27),
    "T10": (37, 33, 21.4, 22.2, 5.6, 18, 16, 8, 15.5, 30, 42, 22),
    "T11": (40, 34, 22.4, 23.4, 6.5, 19.5, 16.5, 9, 17, 27, 40, 16),
    "T12": (43, 34.5, 23.8, 25, 7.5, 22, 18, 9, 17, 24, 42, 12),
    "T13": (44, 34.8, 24.6, 25.6, 8.0, 22.5, 18, 8.5, 16.5, 28, 44, 11),
    "L1": (45, 35, 25.4, 26.6, 8.6, 23.5, 18.5, 8.5, 16, 37, 47, 9),
    "L2": (47, 36, 26.6, 27.2, 9.8, 24, 18, 9, 15.5, 40, 49, 8),
    "L3": (49, 36.5, 27.2, 27, 10.6, 24.5, 17.5, 10.5, 15, 45, 50, 7),
    "L4": (51, 37, 27.6, 26.2, 11.2, 25.5, 18, 13.5, 15.5, 42, 47, 7),
    "L5": (53, 37, 28.2, 23.6, 10.0, 27.5, 18.5, 17.5, 17, 46, 40, 8),
    "S1": (52, 34, 30, 25, 2.0, 30, 16, 18, 20, 40, 30, 8),
}
_COLUMNS: Final = (
    "width", "depth", "height_anterior", "height_posterior", "disc_below", "canal_width", "canal_depth",
    "pedicle_width", "pedicle_height", "transverse", "spinous", "spinous_drop",
)  # fmt: skip
_DISC_SHARE: Final = (0.33, 0.25, 0.185, 0.135, 0.10)  # of the discs' lordosis, from the sacrum up
_DENSITY_TREND: Final[dict[str, float]] = {
    **{f"T{n}": 1.16 - 0.008 * n for n in range(1, 14)},
    "L1": 1.03, "L2": 1.0, "L3": 0.97, "L4": 0.98, "L5": 1.02, "L6": 1.02, "S1": 0.85,
}  # fmt: skip
"""Trabecular density relative to the mean of L1-L3: falls to L3, as in QCT series (shape assumed, a few percent a
level)."""


@dataclass(frozen=True, slots=True, eq=False)
class VertebraShape:
    """Sizes of one vertebra in mm, and its place.

    Attributes:
        level: name, ``"T1"`` to ``"S1"``.
        centre: (3,) LPS mm of the body's middle.
        axes: (3, 3), columns are the vertebra's left, posterior and cranial directions in LPS.
        width, depth: of the endplates, left-right and front-back.
        height_anterior, height_posterior: of the body, before any fracture.
        disc_below: mean height of the disc under it.
        trabecular_mg_cm3: its own true density.
    """

    level: str
    centre: Vec
    axes: Vec
    width: float
    depth: float
    height_anterior: float
    height_posterior: float
    disc_below: float
    canal_width: float
    canal_depth: float
    pedicle_width: float
    pedicle_height: float
    transverse: float
    spinous: float
    spinous_drop: float
    trabecular_mg_cm3: float
    fracture: Fracture | None = None

    @property
    def height(self) -> float:
        """Mid-body height in mm, before any fracture."""
        return 0.5 * (self.height_anterior + self.height_posterior)

    def at(self, left: float, posterior: float, cranial: float) -> Vec:
        """Local millimetres to LPS millimetres."""
        return np.asarray(self.centre + self.axes @ np.array([left, posterior, cranial], dtype=np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class Spine:
    """The column from S1 upwards.

    Attributes:
        vertebrae: S1 first, T1 last.
        heights: ascending z (mm) of the points the curves below go through.
        curve_x, curve_y: the line through the body centres.
        canal_x, canal_y, canal_z: the line through the middle of the canal, by ascending z.
    """

    vertebrae: tuple[VertebraShape, ...]
    heights: Vec
    curve_x: Vec
    curve_y: Vec
    canal_z: Vec
    canal_x: Vec
    canal_y: Vec

    def __getitem__(self, level: str) -> VertebraShape:
        for vertebra in self.vertebrae:
            if vertebra.level == level:
                return vertebra
        raise KeyError(level)

    def z_of(self, above_sacrum: float) -> float:
        """Height of the n-th body above S1 (1 is the last lumbar one), fractions and ends extrapolated."""
        z = np.array([v.centre[2] for v in self.vertebrae])
        n = np.clip(above_sacrum, 0, len(z) - 1)
        return float(np.interp(n, np.arange(len(z)), z) + (above_sacrum - n) * 35.0)


def level_names(patient: VirtualPatient) -> tuple[str, ...]:
    """Names from S1 up to T1."""
    lumbar = [f"L{n}" for n in range(patient.lumbar_count, 0, -1)]
    thoracic = [f"T{n}" for n in range(patient.thoracic_count, 0, -1)]
    return ("S1", *lumbar, *thoracic)


def _row(level: str, patient: VirtualPatient) -> tuple[float, ...]:
    """Table row of a level; the last of four or six lumbar vertebrae has the shape of L5, the others slide."""
    if level.startswith("L"):
        n = int(level[1:])
        place = 1 + (n - 1) * 4.0 / (patient.lumbar_count - 1)
        low = int(np.floor(place))
        a, b = _TABLE[f"L{low}"], _TABLE[f"L{min(5, low + 1)}"]
        return tuple(float(p + (place - low) * (q - p)) for p, q in zip(a, b, strict=True))
    if level == "T11" and patient.thoracic_count == 11:
        return _TABLE["T12"]
    return _TABLE[level]


def _rotation(tilt: float, lean: float, turn: float) -> Vec:
    """Axes from sagittal tilt (cranial axis leaning back), lean (cranial axis to the left) and turn about it, in
    radians."""
    ct, st, cl, sl, cr, sr = np.cos(tilt), np.sin(tilt), np.cos(lean), np.sin(lean), np.cos(turn), np.sin(turn)
    about_x = np.array([[1, 0, 0], [0, ct, st], [0, -st, ct]])
    about_y = np.array([[cl, 0, sl], [0, 1, 0], [-sl, 0, cl]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_y @ about_x @ about_z)


def build_spine(patient: VirtualPatient) -> Spine:
    """The patient's column; the middle of the superior S1 endplate is the origin of the body's frame (LPS mm)."""
    names = level_names(patient)
    rng = patient.rng("spine")
    size, count = patient.size, patient.lumbar_count
    rows = []
    for name in names:
        jitter = 1.0 + 0.025 * rng.standard_normal(12)
        jitter[2:4] = 1.0 + 0.02 * rng.standard_normal()
        row = np.array(_row(name, patient)) * jitter * size
        row[1] *= patient.constitution.body_depth
        row[2:4] *= patient.constitution.body_height
        row[4] *= patient.constitution.disc_height
        row[4] *= 1.0 - 0.45 * patient.degeneration * float(rng.uniform(0.2, 1.0) ** 1.5)
        rows.append(row)
    wedges = np.array([np.arctan2(r[2] - r[3], r[1]) for r in rows])
    share = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, 5), _DISC_SHARE)
    share /= share.sum()
    disc_lordosis = np.radians(patient.lordosis_deg) - wedges[1 : count + 1].sum()
    disc_angles = np.zeros(len(names))  # of the disc above names[i]
    disc_angles[:count] = share * disc_lordosis
    thoracic = len(names) - 1 - count
    disc_angles[count + 1 :] = -(np.radians(patient.kyphosis_deg) + wedges[count + 1 :].sum()) / (thoracic - 1)
    disc_angles += np.radians(1.0) * rng.standard_normal(len(names)) * (np.arange(len(names)) > 0)

    apex = names.index(patient.scoliosis_apex) if patient.scoliosis_apex in names else 3
    steps = np.arange(len(names)) - apex
    cobb = np.radians(patient.scoliosis_deg)
    # the lean is half the Cobb angle at each end of a curve of three levels up and down, and dies out beyond
    leans = -0.5 * cobb * np.sin(np.clip(steps / 3.0, -1.6, 1.6) * np.pi / 2) * np.exp(-((steps / 5.0) ** 2))
    leans = leans + np.radians(0.8) * rng.standard_normal(len(names))
    leans[0] *= 0.2
    turns = -0.35 * cobb * np.exp(-((steps / 2.5) ** 2)) + np.radians(0.8) * rng.standard_normal(len(names))
    noise_mg = 3.0 * rng.standard_normal(len(names))
    fractures = {f.level: f for f in patient.fractures}

    vertebrae: list[VertebraShape] = []
    tilt = -np.radians(patient.sacral_slope_deg)
    point = np.zeros(3)  # middle of the endplate reached so far
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        height = float(0.5 * (row[2] + row[3]))
        if i == 0:
            axes = _rotation(tilt - 0.5 * wedges[0], leans[0], turns[0])
            centre = -0.5 * height * axes[:, 2]
        else:
            disc = float(rows[i][4])
            between = tilt + 0.5 * disc_angles[i - 1]
            point = point + disc * _rotation(between, 0.5 * (leans[i] + leans[i - 1]), 0.0)[:, 2]
            tilt += disc_angles[i - 1] + 0.5 * wedges[i]
            axes = _rotation(tilt, leans[i], turns[i])
            centre = point + 0.5 * height * axes[:, 2]
            point = centre + 0.5 * height * axes[:, 2]
            tilt += 0.5 * wedges[i]
        density = max(0.0, patient.density_mg_cm3 * _DENSITY_TREND[name] + float(noise_mg[i]))
        fracture = fractures.get(name)
        if fracture is not None:
            density *= 1.0 + fracture.densification
        sizes = dict(zip(_COLUMNS, (float(v) for v in row), strict=True))
        vertebrae.append(
            VertebraShape(level=name, centre=centre, axes=axes, trabecular_mg_cm3=density, fracture=fracture, **sizes)
        )
    return _with_curves(tuple(vertebrae))


def _with_curves(vertebrae: tuple[VertebraShape, ...]) -> Spine:
    """Add the lines through bodies and canal, the sacral part included."""
    centres = np.array([v.centre for v in vertebrae])
    canal = np.array([v.at(0, 0.5 * v.depth + 0.5 * v.canal_depth + 1.0, 0) for v in vertebrae])
    s1 = vertebrae[0]
    sacral_canal = np.array([s1.at(0, 0.5 * s1.depth + 5, -30), s1.at(0, 0.5 * s1.depth - 8, -62)])
    sacral_body = np.array([s1.at(0, 4, -28), s1.at(0, -4, -60)])
    canal = np.concatenate([sacral_canal, canal])
    centres = np.concatenate([sacral_body, centres])
    body_order, canal_order = np.argsort(centres[:, 2]), np.argsort(canal[:, 2])
    centres, canal = centres[body_order], canal[canal_order]
    return Spine(vertebrae, centres[:, 2], centres[:, 0], centres[:, 1], canal[:, 2], canal[:, 0], canal[:, 1])
