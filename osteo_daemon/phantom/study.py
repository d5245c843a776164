"""Scans of virtual patients: whole studies and single vertebrae."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osteo_daemon.phantom.acquire import add_noise, add_streaks, blur_slices, blur_voi, finish, noise_level, noise_voi
from osteo_daemon.phantom.body import Body, build_body
from osteo_daemon.phantom.canvas import F32, U8, Canvas, Grid, Vec
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.spine import VertebraShape


@dataclass(frozen=True, slots=True, eq=False)
class TrueVertebra:
    """What is true of one vertebra.

    Attributes:
        level: name, ``"T1"`` to ``"S1"`` (with T13 and L6 where the patient has them).
        centre_lps_mm: (3,) middle of the body.
        axes: (3, 3), columns are its left, posterior and cranial directions in LPS.
        trabecular_hu_true: mean attenuation of the trabecular core on this scanner.
        density_mg_cm3: its density.
        size_mm: width, depth and mid height of the body.
        heights_mm: anterior, middle and posterior height, a fracture included.
        fractured: whether it is compressed.
    """

    level: str
    centre_lps_mm: Vec
    axes: Vec
    trabecular_hu_true: float
    density_mg_cm3: float
    size_mm: tuple[float, float, float]
    heights_mm: tuple[float, float, float]
    fractured: bool


@dataclass(frozen=True, slots=True, eq=False)
class PhantomStudy:
    """A scan and its truth.

    Attributes:
        voxels: (D, H, W) int16 HU.
        affine: (4, 4) maps (d, h, w, 1) to LPS mm.
        labels: (D, H, W) codes of `osteo_daemon.phantom.labels`.
        vertebrae: every vertebra of the patient whose body centre lies in the volume, from above.
        patient, scanner: what was scanned and how.
        ideal_hu: (D, H, W) float16 mean attenuation of each voxel's volume, before point spread, noise and
            miscalibration; None unless asked for.
    """

    voxels: npt.NDArray[np.int16]
    affine: Vec
    labels: U8
    vertebrae: tuple[TrueVertebra, ...]
    patient: VirtualPatient
    scanner: Scanner
    ideal_hu: npt.NDArray[np.float16] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PhantomVoi:
    """One vertebra in its own axes and its truth.

    Attributes:
        voxels: (D, H, W) float32 HU; D runs cranially, H posteriorly, W to the left of the vertebra.
        affine: (4, 4) maps (d, h, w, 1) to LPS mm.
        labels: (D, H, W) codes of `osteo_daemon.phantom.labels`.
        vertebra: its truth.
    """

    voxels: F32
    affine: Vec
    labels: U8
    vertebra: TrueVertebra


SLAB_SLICES = 12
"""Slices painted at once: small enough for the processor's cache, large enough to share per-slab work."""
_STREAKING_HU = 1900.0
"""Metal throws streaks, bone cement does not."""
_SOFT_STEP_MM = 1.6
"""VOIs finer than this get their soft tissue at half resolution."""
MAX_SUBSLICE_MM = 1.7
"""Thick slices are averaged from thinner ones of at most this thickness."""


def field_of_view(body: Body, top: str, bottom: str) -> tuple[float, float]:
    """Lowest and highest slice position in mm for named limits.

    Args:
        top: a level (its body is wholly in) or ``"thorax"``.
        bottom: a level, ``"pelvis"`` (to the femoral heads) or ``"thigh"``.
    """
    s1 = body.spine["S1"].centre[2]
    size = body.patient.size
    if bottom == "pelvis":
        low = s1 - 112 * size
    elif bottom == "thigh":
        low = s1 - 150 * size
    else:
        v = body.spine[bottom]
        low = float(v.centre[2]) - 0.5 * v.height - 6
    if top == "thorax":
        top = "T6"
    v = body.spine[top]
    return float(low), float(v.centre[2]) + 0.5 * v.height + 6


def render_study(
    patient: VirtualPatient,
    scanner: Scanner,
    *,
    top: str = "T10",
    bottom: str = "pelvis",
    slices: int | None = None,
    workers: int = 2,
    ideal: bool = False,
) -> PhantomStudy:
    """Scan a virtual patient.

    Args:
        patient: who.
        scanner: how.
        top, bottom: limits of the scan, see `field_of_view`.
        slices: exact number of slices, centred on those limits; None covers them.
        workers: threads that paint slabs side by side; the result does not depend on it.
        ideal: whether to keep `PhantomStudy.ideal_hu` too.

    Returns:
        The volume along the patient axes: D runs cranially, H posteriorly, W to the left. The origin of LPS lies on the
        middle of the superior S1 endplate.
    """
    spacing = scanner.spacing_mm
    body = build_body(patient, scanner, float(np.mean([min(spacing[0], MAX_SUBSLICE_MM), *spacing[1:]])))
    low, high = field_of_view(body, top, bottom)
    count = slices if slices is not None else int(np.ceil((high - low) / spacing[0])) + 1
    z = 0.5 * (low + high) + (np.arange(count) - (count - 1) / 2.0) * spacing[0]
    n = scanner.matrix
    middle_y = body.table_centre_y
    x = (np.arange(n) - (n - 1) / 2.0) * spacing[1] + scanner.truncate_mm
    y = (np.arange(n) - (n - 1) / 2.0) * spacing[2] + middle_y
    body.prepare_vertebrae(float(z[0]), float(z[-1]))

    voxels = np.empty((count, n, n), dtype=np.int16)
    labels = np.empty((count, n, n), dtype=np.uint8)
    ideal_hu = np.empty((count, n, n), dtype=np.float16) if ideal else None
    subs = max(1, 2 * int(np.ceil(scanner.slice_thickness_mm / MAX_SUBSLICE_MM / 2 - 0.5)) + 1)
    offsets = (np.arange(subs) - (subs - 1) / 2.0) * scanner.slice_thickness_mm / subs
    edge = float(np.mean([scanner.slice_thickness_mm / subs, spacing[1], spacing[2]]))
    noise_map = noise_level(body, scanner, y, x)

    def slab(start: int) -> None:
        stop = min(start + max(1, SLAB_SLICES // subs), count)
        heights = (z[start:stop, None] + offsets[None, :]).ravel()
        order = np.argsort(heights, kind="stable")
        canvas = Canvas(Grid.aligned(heights[order], y, x, edge))
        body.paint(canvas)
        back = np.argsort(order, kind="stable")
        if subs > 1:
            hu = canvas.hu[back].reshape(stop - start, subs, n, n).mean(axis=1, dtype=np.float32)
            codes = canvas.labels[back].reshape(stop - start, subs, n, n)[:, subs // 2]
        else:
            hu, codes = canvas.hu, canvas.labels
        if ideal_hu is not None:
            ideal_hu[start:stop] = hu
        hu = blur_slices(hu, scanner)
        add_streaks(hu, (codes == Tissue.METAL) & (hu > _STREAKING_HU), patient, scanner)
        add_noise(hu, noise_map, patient, scanner, start)
        voxels[start:stop] = finish(hu, scanner, x, y, middle_y)
        labels[start:stop] = codes

    starts = range(0, count, max(1, SLAB_SLICES // subs))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(slab, starts))
    else:
        for start in starts:
            slab(start)

    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, spacing[1]], [0, spacing[2], 0], [spacing[0], 0, 0]])
    affine[:3, 3] = [x[0], y[0], z[0]]
    truth = true_vertebrae(body, float(z[0]), float(z[-1]))
    return PhantomStudy(voxels, affine, labels, truth, patient, scanner, ideal_hu)


def true_vertebrae(body: Body, low_mm: float, high_mm: float) -> tuple[TrueVertebra, ...]:
    """The vertebrae whose centre lies between two heights, from above."""
    return tuple(true_vertebra(body, v) for v in reversed(body.spine.vertebrae) if low_mm <= v.centre[2] <= high_mm)


def true_vertebra(body: Body, v: VertebraShape) -> TrueVertebra:
    """The record of one vertebra on this scanner."""
    front, middle, back = v.height_anterior, v.height, v.height_posterior
    if v.fracture is not None:
        loss = v.fracture.height_loss * v.height
        lost = {"wedge": (1.0, 0.41, 0.0), "crush": (0.85, 0.85, 0.85), "biconcave": (0.0, 1.0, 0.0)}[v.fracture.kind]
        front, middle, back = front - loss * lost[0], middle - loss * lost[1], back - loss * lost[2]
    return TrueVertebra(
        level=v.level,
        centre_lps_mm=v.centre.copy(),
        axes=v.axes.copy(),
        trabecular_hu_true=body.core_hu(v),
        density_mg_cm3=v.trabecular_mg_cm3,
        size_mm=(v.width, v.depth, v.height),
        heights_mm=(front, middle, back),
        fractured=v.fracture is not None,
    )


def render_voi(
    patient: VirtualPatient,
    level: str,
    scanner: Scanner,
    size: int | tuple[int, int, int] = 64,
    spacing_mm: float = 1.0,
    rng: np.random.Generator | None = None,
    *,
    shift_mm: float = 0.0,
    turn_deg: float = 0.0,
) -> PhantomVoi:
    """One vertebra with its surroundings, as if cut from a scan and resampled to vertebral axes.

    Args:
        level: which vertebra.
        size: voxels along (D, H, W), or one number for all.
        spacing_mm: isotropic.
        rng: draws the noise (and the jitter, if any); None takes the patient's and scanner's seeds.
        shift_mm, turn_deg: SD of a random displacement and rotation of the box, as a localiser's error would cause.

    Returns:
        Voxels, labels and the truth. Slice thickness blurs along the patient's z, whatever the vertebra's tilt.

    Raises:
        KeyError: when the patient has no such level.
    """
    shape = (size, size, size) if isinstance(size, int) else size
    body = build_body(patient, scanner, spacing_mm, only=level)
    v = body.spine[level]
    source = rng if rng is not None else patient.rng("voi", level, scanner.seed)
    axes, centre = v.axes, v.centre.copy()
    if turn_deg > 0:
        axes = _small_turn(np.radians(turn_deg) * source.standard_normal(3)) @ axes
    if shift_mm > 0:
        centre = centre + shift_mm * source.standard_normal(3)
    affine = np.eye(4)
    affine[:3, :3] = axes[:, ::-1] * spacing_mm
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2.0)
    canvas = Canvas(Grid.oblique(shape, affine))
    if spacing_mm < _SOFT_STEP_MM:
        _soft_at_half_resolution(body, canvas, shape, affine)
    else:
        body.paint_soft(canvas)
    body.paint_bones(canvas)
    hu = blur_voi(canvas.hu, scanner, spacing_mm, axes)
    hu += noise_voi(source, shape, scanner, spacing_mm, body.girth_factor)
    hu = (hu + np.float32(1000)) * np.float32(scanner.hu_scale) + np.float32(scanner.hu_offset - 1000)
    return PhantomVoi(
        np.asarray(np.maximum(hu, -1024), dtype=np.float32), affine, canvas.labels, true_vertebra(body, v)
    )


def _soft_at_half_resolution(body: Body, canvas: Canvas, shape: tuple[int, int, int], affine: Vec) -> None:
    """Paint soft tissue on every second voxel and fill the rest linearly: an eighth of the work, and no bone in it."""
    half = (shape[0] // 2 + 2, shape[1] // 2 + 2, shape[2] // 2 + 2)
    wide = affine.copy()
    wide[:3, :3] *= 2.0
    wide[:3, 3] -= affine[:3, :3].sum(axis=1)  # the first sample lies one voxel before the box
    coarse = Canvas(Grid.oblique(half, wide))
    body.paint_soft(coarse)
    hu = coarse.hu
    for axis, n in enumerate(shape):
        below = np.moveaxis(hu, axis, 0)
        doubled = np.empty((2 * (len(below) - 1), *below.shape[1:]), dtype=np.float32)
        doubled[0::2] = 0.5 * (below[:-1] + below[1:])
        doubled[1::2] = below[1:]
        hu = np.moveaxis(doubled[:n], 0, axis)
    canvas.hu[...] = hu
    nearest = [(np.arange(n) + 1) // 2 for n in shape]
    canvas.labels[...] = coarse.labels[np.ix_(*nearest)]


def _small_turn(angles: Vec) -> Vec:
    """Rotation matrix of a rotation vector (radians)."""
    theta = float(np.linalg.norm(angles))
    if theta < 1e-9:
        return np.eye(3)
    k = angles / theta
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    return np.asarray(np.eye(3) + np.sin(theta) * cross + (1 - np.cos(theta)) * cross @ cross)
