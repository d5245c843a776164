"""One vertebra: body with shell, endplates and trabecular core, disc, posterior elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from osteo_daemon.phantom.calibration import Palette, trabecular_hu
from osteo_daemon.phantom.canvas import F32, Canvas, Region, Vec, capsule, smooth_max
from osteo_daemon.phantom.labels import BODY, CORE, LEVEL_CODE, POSTERIOR, Tissue
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.spine import VertebraShape
from osteo_daemon.phantom.texture import STEP_MM, Texture, draw_texture, texture_of, texture_positions

CORE_DEPTH_MM: Final = 3.0
"""The true trabecular core begins this far under the surface (cortex and dense subcortical bone stay outside)."""
VEIN_MARGIN_MM: Final = 1.5
CONCAVITY_MM: Final = (1.3, 2.1)
"""Depth of the superior and inferior endplate's hollow."""


@dataclass(frozen=True, slots=True, eq=False)
class VertebraPainter:
    """Everything needed to paint one vertebra, drawn once.

    Attributes:
        shape: sizes and pose.
        texture: trabecular offsets, zero mean over the true core.
        core_hu: true mean attenuation of the core.
        cortex_mm, endplate_mm: shell thickness.
        rim: (amplitude in mm, angular waves) of marginal osteophytes.
    """

    shape: VertebraShape
    palette: Palette
    texture: Texture
    core_hu: float
    cortex_mm: float
    endplate_mm: float
    osteophyte_mm: float
    rim_phase: float
    sacralised: float

    def local(self, region: Region) -> tuple[F32, F32, F32]:
        """Coordinates of a region in vertebral axes: left, posterior, cranial (mm)."""
        c, axes = self.shape.centre.astype(np.float32), self.shape.axes.astype(np.float32)
        dx, dy, dz = region.x - c[0], region.y - c[1], region.z - c[2]
        x, y, z = ((dx * axes[0, k] + dy * axes[1, k]) + dz * axes[2, k] for k in range(3))
        return x, y, z

    def paint_body(self, canvas: Canvas) -> None:
        """Shell, endplates, trabecular bone, vein."""
        s = self.shape
        reach = 0.5 * np.array([s.width + 6, s.depth + 6, s.height + 8])
        region = canvas.region(*_box(s, -reach, reach))
        if region is None:
            return
        x, y, z = self.local(region)
        distance, axial = body_distance(s, x, y, z, self.osteophyte_mm, self.rim_phase)
        code = LEVEL_CODE[s.level]
        # the endplates are thicker than the walls: blend by which of the two borders is nearer
        region.paint(distance, self.palette.cortical, BODY + code)
        thickness = np.float32(self.cortex_mm) + np.float32(self.endplate_mm - self.cortex_mm) * np.clip(
            (axial - distance) * np.float32(0.5) + 1, 0, 1
        )
        inner = distance + thickness
        inside = np.flatnonzero(inner < region.canvas.grid.edge_mm)
        if inside.size == 0:
            return
        vein = vein_distance(s, x, y, z)
        fx, fy, fz, fd, fi, fv = (a.ravel()[inside] for a in (x, y, z, distance, inner, vein))
        bone = self.core_hu + self.texture.sample(fx, fy, fz)
        bone += np.float32(0.35 * max(self.core_hu, 60.0)) * np.clip(fd * np.float32(1 / CORE_DEPTH_MM) + 1, 0, 1)
        blood = region.cover(fv, 1.0)
        bone += blood * (np.float32(0.35 * self.core_hu + 12.0) - bone)
        share = region.cover(fi)
        hu, labels = region.hu, region.labels
        index = np.unravel_index(inside, hu.shape)
        old = hu[index]
        hu[index] = old + share * (bone - old)
        core = (fd < -CORE_DEPTH_MM) & (fv > VEIN_MARGIN_MM)
        labels[tuple(i[core] for i in index)] = CORE + code

    def paint_disc(self, canvas: Canvas, below: VertebraShape, gas: bool) -> None:
        """The disc between this vertebra and the one below it; endplates are painted over it."""
        s = self.shape
        top = s.at(0, 0, -0.5 * s.height)
        bottom = below.at(0, 0, 0.5 * below.height)
        up = top - bottom
        thickness = float(np.linalg.norm(up))
        if thickness < 0.5:
            return
        middle, axis = 0.5 * (top + bottom), 0.5 * (s.axes + below.axes)
        half_width, half_depth = 0.25 * (s.width + below.width), 0.25 * (s.depth + below.depth)
        reach = float(np.hypot(half_width, half_depth)) + 3
        span = np.array([reach, reach, 0.5 * reach])
        region = canvas.region(middle - span, middle + span)
        if region is None:
            return
        dx, dy, dz = (p - np.float32(c) for p, c in zip((region.x, region.y, region.z), middle, strict=True))
        x, y, z = (sum_of(dx, dy, dz, axis[:, k]) for k in range(3))
        bulge = 1.0 + 0.02 * (1.0 + self.osteophyte_mm)
        ring = _outline(x * np.float32(1 / (half_width * bulge)), y * np.float32(1 / (half_depth * bulge)), y, 0.04)
        rho = np.sqrt(ring)
        radial = np.sqrt(x * x + y * y)
        lateral = radial - radial / np.maximum(rho, np.float32(1e-3))
        slab = np.abs(z) - np.float32(0.5 * thickness + 4.0)
        distance = np.maximum(lateral, slab)
        hu = np.float32(self.palette.disc - 12.0) + np.float32(22.0) * np.clip(rho * rho, 0, 1)
        region.paint(distance, hu, Tissue.DISC)
        if gas:
            radii = (0.4 * half_width, 0.35 * half_depth, max(0.9, 0.16 * thickness))
            level = np.sqrt((x / radii[0]) ** 2 + ((y - 2) / radii[1]) ** 2 + (z / radii[2]) ** 2)
            region.paint((level - 1) * np.float32(radii[2]), -700.0, Tissue.GAS)

    def paint_posterior(self, canvas: Canvas) -> None:
        """Pedicles, laminae, facets, transverse and spinous processes."""
        s = self.shape
        wall = 0.5 * s.depth
        side = s.transverse + 16 * self.sacralised + 8
        low = np.array([-side, wall - 12, -0.5 * s.height - 18 - s.spinous_drop])
        high = np.array([side, wall + s.spinous + 7, 0.5 * s.height + 14])
        region = canvas.region(*_box(s, low, high))
        if region is None:
            return
        x, y, z = self.local(region)
        x = np.abs(x)
        near = np.flatnonzero(_may_be_posterior(s, x, y, z, self.sacralised))
        if near.size == 0:
            return
        distance = posterior_distance(s, x.ravel()[near], y.ravel()[near], z.ravel()[near], self.sacralised)
        code = POSTERIOR + LEVEL_CODE[s.level]
        inside = region.paint_at(near, distance, self.palette.cortical * 0.8, code)
        region.paint_at(inside, distance[distance < 0] + np.float32(1.2), self.palette.cancellous)


def sum_of(dx: F32, dy: F32, dz: F32, axis: Vec) -> F32:
    """Projection of an offset onto an axis."""
    a = axis.astype(np.float32)
    return np.asarray((dx * a[0] + dy * a[1]) + dz * a[2])


def _box(shape: VertebraShape, low: Vec, high: Vec) -> tuple[Vec, Vec]:
    """LPS box around a box in vertebral axes."""
    corners = np.array([shape.at(*((low, high)[i >> k & 1][k] for k in range(3))) for i in range(8)])
    return corners.min(axis=0), corners.max(axis=0)


def _outline(u: F32, v: F32, y: F32, hollow: float) -> F32:
    """Squared normalised radius of the axial outline: elliptic in front, squarer and hollowed behind.

    Args:
        u, v: left-right and front-back position relative to the half axes.
        y: front-back position, for its sign only.
        hollow: depth of the posterior hollow, relative to the half depth.
    """
    u2 = u * u
    behind = v + np.float32(hollow) * np.maximum(1 - u2 * np.float32(1.6), 0)
    b2 = behind * behind
    return np.asarray(np.where(y < 0, u2 + v * v, np.sqrt(u2 * u2 + b2 * b2)))


def body_distance(s: VertebraShape, x: F32, y: F32, z: F32, osteophyte_mm: float, rim_phase: float) -> tuple[F32, F32]:
    """Signed distance (mm) of the body, and of its endplates alone, at local positions."""
    lumbar = s.level[0] in "LS"
    half = 0.5 * s.height
    rise = np.minimum(np.abs(z) * np.float32(1 / half), np.float32(1.3))
    narrow = np.float32(0.10 if lumbar else 0.065) * (1 - rise * rise)
    scale = 1 / (1 - narrow)
    if osteophyte_mm > 0:
        spur = np.clip((rise - np.float32(0.72)) * np.float32(1 / 0.28), 0, 1)
        rim = np.float32(2 * osteophyte_mm / s.width) * spur * spur * (1 + np.sin(x * np.float32(0.16) + rim_phase))
        scale = scale / (1 + np.where(y < 4, rim, rim * np.float32(0.3)))
    u = x * np.float32(2 / s.width) * scale
    v = y * np.float32(2 / s.depth) * scale
    ring = _outline(u, v, y, 0.10)
    radial = np.sqrt(x * x + y * y)
    lateral = radial - radial / np.maximum(np.sqrt(ring), np.float32(1e-3))
    dish = np.maximum(1 - ring, 0)
    slope = np.float32((s.height_anterior - s.height_posterior) / (2 * s.depth))
    level = np.float32(half) - slope * y
    top = level - np.float32(CONCAVITY_MM[0]) * dish
    bottom = level - np.float32(CONCAVITY_MM[1]) * dish
    if s.fracture is not None:
        lost = np.float32(s.fracture.height_loss * s.height)
        if s.fracture.kind == "wedge":
            front = np.clip(np.float32(0.5) - y * np.float32(1 / s.depth), 0, 1)
            top = top - lost * front ** np.float32(1.3)
        elif s.fracture.kind == "crush":
            top = top - lost * np.float32(0.85)
        else:
            top = top - lost * np.float32(0.65) * dish
            bottom = bottom - lost * np.float32(0.35) * dish
    axial = np.where(z > 0, z - top, -z - bottom)
    return smooth_max(lateral, axial, 3.0), axial


def vein_distance(s: VertebraShape, x: F32, y: F32, z: F32) -> F32:
    """Signed distance (mm) of the basivertebral vein: a flat funnel from the posterior wall towards the middle."""
    return capsule(x, y, z, (0, 0.5 * s.depth, 0), (0, -0.02 * s.depth, 0), 3.4, 1.0, tall=0.75)


def _may_be_posterior(s: VertebraShape, x: F32, y: F32, z: F32, sacralised: float) -> npt.NDArray[np.bool_]:
    """A cheap outer bound of `posterior_distance`, with a margin for soft borders."""
    wall, facet_x = 0.5 * s.depth, 0.5 * s.canal_width + 3.5 * s.depth / 36.0
    roof = wall + s.canal_depth
    arch = (x < max(facet_x + 15.0, 0.5 * s.canal_width + s.pedicle_width + 4.0)) & (y < roof + 13.0)
    spine = x < 9.0
    if sacralised > 0:
        wings = (y < roof + 15.0) & (z < 0.17 * s.height + 14.0)
    else:
        wings = (np.abs(z - np.float32(0.17 * s.height + 1.0)) < 13.0) & (y < roof + 15.0)
    return np.asarray((arch | spine | wings) & (y > wall - 16.0))


def posterior_distance(s: VertebraShape, x: F32, y: F32, z: F32, sacralised: float) -> F32:
    """Signed distance (mm) of the posterior elements; ``x`` is the distance from the midplane."""
    lumbar = s.level[0] in "LS"
    k = s.depth / 36.0
    wall, canal = 0.5 * s.depth, s.canal_depth
    high = 0.17 * s.height
    pedicle_x = 0.5 * s.canal_width + 0.5 * s.pedicle_width - 0.5
    facet_x = 0.5 * s.canal_width + 3.5 * k
    roof = wall + canal
    mid = wall + 0.6 * canal
    parts = [
        # pedicle
        capsule(x, y, z, (pedicle_x, wall - 4, high), (pedicle_x, mid, high), 0.5 * s.pedicle_width,
                tall=s.pedicle_height / s.pedicle_width),
        # isthmus, from the pedicle down to the lower facet
        capsule(x, y, z, (facet_x + 1, mid, high), (facet_x - 2, wall + 0.95 * canal, -0.4 * s.height), 6.2 * k,
                5.6 * k),
        # upper facet: a plate that faces backwards and inwards
        capsule(x, y, z, (facet_x + 2.5, mid - 1, high), (facet_x + 4.5, mid + 1, 0.5 * s.height + 5), 6.0 * k, 5.0 * k,
                deep=1.25),
        # lower facet, in the hollow of the next one's upper facet
        capsule(x, y, z, (facet_x - 3, wall + 0.95 * canal + 1, -0.3 * s.height),
                (facet_x - 3.5, wall + 0.95 * canal + 3, -0.5 * s.height - 9 * k), 6.0 * k, 5.4 * k),
        # lamina
        capsule(x, y, z, (facet_x - 2, wall + 0.95 * canal, -2), (1, roof + 4, -6), 3.2 * k, tall=2.6),
        # spinous process, thicker at its tip
        capsule(x, y, z, (0, roof + 3, -6), (0, wall + s.spinous - 4, -6 - s.spinous_drop), 2.7 * k, 3.8 * k,
                tall=2.4 if lumbar else 1.8),
    ]  # fmt: skip
    root = (facet_x + 2, wall + 0.5 * canal, high - 2)
    if lumbar:
        stout = 1.5 if s.pedicle_width > 15 * k else 1.0
        tip = (s.transverse, wall + 0.5 * canal + 7, high + 2)
        parts.append(capsule(x, y, z, root, tip, 4.2 * k * stout, 2.7 * k * stout, tall=1.5))
    else:
        parts.append(capsule(x, y, z, root, (s.transverse, roof + 6, high + 4), 5.0 * k, 4.6 * k, tall=1.3))
    if sacralised > 0:
        tip = (s.transverse + 12 * sacralised, wall + 4, -0.5 * s.height - 5)
        parts.append(capsule(x, y, z, root, tip, 7 * k, (6 + 5 * sacralised) * k, tall=1.3))
    distance = parts[0]
    for part in parts[1:]:
        np.minimum(distance, part, out=distance)
    return distance


def prepare_vertebra(
    patient: VirtualPatient,
    scanner: Scanner,
    palette: Palette,
    shape: VertebraShape,
    voxel_mm: float,
    last_lumbar: bool,
) -> VertebraPainter:
    """Draw the texture of one vertebra and set its mean over the true core.

    Args:
        voxel_mm: edge of the voxels it will be painted on.
        last_lumbar: whether this is the vertebra above the sacrum (only that one can be sacralised).
    """
    rng = patient.rng("vertebra", shape.level)
    core_hu = trabecular_hu(shape.trabecular_mg_cm3, scanner.kvp, scanner.phase)
    own = patient.constitution
    character = texture_of(shape.trabecular_mg_cm3, patient.ageing, own.texture_length, own.texture_spread)
    field = draw_texture(rng, character, core_hu, (shape.height + 6, shape.depth + 4, shape.width + 4), voxel_mm)
    zc, yc, xc = texture_positions(field)
    z, y, x = (a.astype(np.float32) for a in (zc[:, None, None], yc[None, :, None], xc[None, None, :]))
    # more bone near the endplates and behind, less in the anterior middle
    field += np.float32(max(core_hu, 40.0)) * (
        np.float32(0.16) * ((z * np.float32(2 / shape.height)) ** 2 - np.float32(0.2))
        + np.float32(0.09) * (y * np.float32(2 / shape.depth))
    )
    osteophyte = 3.5 * patient.osteophytes * float(rng.uniform(0.3, 1.0))
    phase = float(rng.uniform(0, 6.28))
    # the core is the same on both sides but for osteophytes, which lie outside it: one half is enough
    left = x[..., x.shape[2] // 2 :]
    half = (*field.shape[:2], left.shape[2])
    xh, yh, zh = np.broadcast_to(left, half), np.broadcast_to(y, half), np.broadcast_to(z, half)
    distance, _ = body_distance(shape, xh, yh, zh, 0.0, 0.0)
    side = (distance < -CORE_DEPTH_MM) & (vein_distance(shape, xh, yh, zh) > VEIN_MARGIN_MM)
    core = np.concatenate([side[..., ::-1][..., : field.shape[2] - side.shape[2]], side], axis=2)
    if core.any():
        field -= field[core].mean()
    if shape.level in patient.bone_islands:
        spot = rng.uniform(-0.25, 0.25, 3) * [shape.width, shape.depth, shape.height]
        radius = float(rng.uniform(3.0, 5.0))
        away = np.sqrt((x - float(spot[0])) ** 2 + (y - float(spot[1])) ** 2 + (z - float(spot[2])) ** 2)
        field += np.float32(500.0) * np.clip((radius - away) / np.float32(2 * STEP_MM) + 0.5, 0, 1)
    solid = own.cortex * float(np.clip(0.55 + 0.45 * patient.density_mg_cm3 / 130.0, 0.55, 1.25))
    return VertebraPainter(
        shape=shape,
        palette=palette,
        texture=Texture(field),
        core_hu=core_hu,
        cortex_mm=0.42 * solid,
        endplate_mm=0.58 * solid,
        osteophyte_mm=osteophyte,
        rim_phase=phase,
        sacralised=patient.sacralised if last_lumbar else 0.0,
    )
