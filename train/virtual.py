"""Virtual patients as training material: a cache folder of 3 mm volumes and patches cut from it.

``python -m train.virtual --out DIR --count N`` fills the folder.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from osteo_daemon.network.localizer import SpineClass
from osteo_daemon.phantom import labels as codes
from osteo_daemon.phantom.patient import Fracture, VirtualPatient
from osteo_daemon.phantom.scanner import Phase, Scanner, coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from train.synthesis import AIR_HU, Sample, field_of_view, scan
from train.torso import Plane, level_coordinate
from train.warp import sample_points

PHASES: tuple[Phase, ...] = ("native", "arterial", "portal", "delayed")
_KEYS = ("hu", "labels", "level_coordinate")


class PhantomCache:
    """A folder of ``*.npz``: hu (D, H, W) int16, labels uint8 (`SpineClass`), level_coordinate float16; 3 mm voxels,
    axes cranial, posterior, left.

    Raises:
        ValueError: the folder holds no volume.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))
        if not self._files:
            raise ValueError(f"no *.npz in {folder.name}")
        self._loaded: dict[Path, tuple[Tensor, Tensor, Tensor]] = {}

    def _volume(self, path: Path) -> tuple[Tensor, Tensor, Tensor]:
        if path not in self._loaded:
            with np.load(path, allow_pickle=False) as arrays:
                hu, labels, level = (torch.from_numpy(arrays[key]) for key in _KEYS)
            self._loaded[path] = hu, labels, level
        return self._loaded[path]

    def patch(self, shape: tuple[int, int, int], seed: int) -> Sample:
        """A patch of ``shape`` voxels from a random volume, mildly warped, scanned anew."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        hu_, labels_, level_ = self._volume(self._files[int(rng.integers(len(self._files)))])
        column = torch.nonzero((labels_ >= 1) & (labels_ <= 3))
        focus = column[int(rng.integers(len(column)))].numpy().astype(np.float64)
        size = np.array(hu_.shape)
        if rng.random() < 0.12:
            focus = rng.uniform(0, size - 1)
        q = sample_points(shape, rng, generator) + torch.from_numpy(focus.astype(np.float32)).view(3, 1, 1, 1)
        outside = ((q < -0.5) | (q > torch.from_numpy(size - 0.5).float().view(3, 1, 1, 1))).any(dim=0)
        # sampling reads only the box that the patch touches
        low = np.clip(np.floor(q.amin(dim=(1, 2, 3)).numpy()).astype(int), 0, size - 2)
        high = np.clip(np.ceil(q.amax(dim=(1, 2, 3)).numpy()).astype(int) + 1, low + 2, size)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        smooth = torch.stack([hu_[box].float(), level_[box].float()])[None]
        extent = torch.from_numpy((high - low).astype(np.float32)).view(3, 1, 1, 1)
        local = q - torch.from_numpy(low.astype(np.float32)).view(3, 1, 1, 1)
        grid = (local / (extent - 1) * 2 - 1).flip(0).permute(1, 2, 3, 0)[None]
        both = F.grid_sample(smooth, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
        label = F.grid_sample(
            labels_[box].float()[None, None], grid, mode="nearest", padding_mode="border", align_corners=True
        )[0, 0].long()
        hu = scan(torch.where(outside, AIR_HU, both[0]), rng, generator)
        seen = field_of_view(shape, rng) & ~outside
        hu = torch.where(seen, hu, AIR_HU)
        return Sample(hu=hu[None], labels=torch.where(seen, label, 0), level_coordinate=both[1])


def draw_patient(seed: int) -> VirtualPatient:
    """A virtual patient for training, from ranges that leave room for wider ones in evaluation."""
    rng = np.random.default_rng([seed, 20])
    sex = "F" if rng.random() < 0.6 else "M"
    lumbar = int(rng.choice([5, 5, 5, 5, 4, 6]))
    levels = [f"L{n}" for n in range(1, lumbar + 1)]
    fractures: tuple[Fracture, ...] = ()
    if rng.random() < 0.25:
        kind = ("wedge", "biconcave", "crush")[int(rng.integers(3))]
        level = str(rng.choice(["T12", *levels[:3]]))
        fractures = (Fracture(level, kind, float(rng.uniform(0.15, 0.5)), float(rng.uniform(0, 0.4))),)  # type: ignore[arg-type]
    return VirtualPatient(
        seed=seed,
        age_years=int(rng.integers(35, 88)),
        sex=sex,  # type: ignore[arg-type]
        density_mg_cm3=float(rng.uniform(20, 220)),
        stature_cm=float(rng.normal(163 if sex == "F" else 176, 7)),
        bmi_kg_m2=float(rng.uniform(20, 36)),
        sacral_slope_deg=float(rng.uniform(25, 52)),
        lordosis_deg=float(rng.uniform(30, 62)),
        scoliosis_deg=float(rng.choice([0.0, rng.uniform(-22, 22)])),
        lumbar_count=lumbar,
        sacralised=float(rng.choice([0.0, 0.0, rng.uniform(0, 1)])),
        fractures=fractures,
        osteophytes=float(rng.uniform(0, 0.8)),
        metal_levels=tuple(levels[-2:]) if rng.random() < 0.05 else (),
        cement_levels=(levels[0],) if rng.random() < 0.04 else (),
    )


def draw_scanner(seed: int) -> Scanner:
    """A coarse scan; noise and blur are added when patches are cut."""
    rng = np.random.default_rng([seed, 21])
    return coarse_scanner(
        3.0, kvp=float(rng.choice([80, 100, 120, 140])), phase=PHASES[int(rng.integers(4))], noise_hu=3.0, seed=seed
    )


def column_knots(study: PhantomStudy) -> list[Plane]:
    """Planes of discs and bodies from the L5-S1 disc upwards, in mm (z, y, x) from the first voxel."""
    origin = study.affine[:3, 3]
    found = sorted((v for v in study.vertebrae), key=lambda v: float(v.centre_lps_mm[2]))
    ordered = [v for v in found if v.level == "S1"] + [v for v in found if v.level != "S1"]
    planes = []
    for below, above in pairwise(ordered):
        low_axis, high_axis = below.axes[:, 2], above.axes[:, 2]
        half_low, half_high = below.heights_mm[1] / 2, above.heights_mm[1] / 2
        middle = (below.centre_lps_mm + half_low * low_axis + above.centre_lps_mm - half_high * high_axis) / 2
        for point, axis in ((middle, low_axis + high_axis), (above.centre_lps_mm, high_axis)):
            normal = np.asarray(axis[::-1] / np.linalg.norm(axis))
            planes.append(Plane(np.asarray((point - origin)[::-1]), normal))
    return planes


def class_map(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Phantom codes to `SpineClass` (uint8, same shape)."""
    table = np.zeros(256, dtype=np.uint8)
    s1 = codes.LEVEL_CODE["S1"]
    table[codes.BODY + 1 : codes.POSTERIOR] = SpineClass.BODY
    table[[codes.BODY + s1, codes.CORE + s1]] = SpineClass.S1_BODY
    table[codes.POSTERIOR + 1 :] = SpineClass.POSTERIOR
    table[codes.POSTERIOR + s1] = SpineClass.SACRUM
    table[codes.Tissue.SACRUM] = SpineClass.SACRUM
    table[codes.Tissue.DISC] = SpineClass.DISC
    table[codes.Tissue.CANAL] = SpineClass.CANAL
    table[codes.Tissue.RIB] = SpineClass.RIB
    table[[codes.Tissue.HIP, codes.Tissue.FEMUR]] = SpineClass.PELVIS
    return np.asarray(table[labels])


def write_phantom(path: Path, seed: int) -> None:
    """Render one virtual patient and store it for `PhantomCache`."""
    top = str(np.random.default_rng([seed, 22]).choice(["T10", "T9", "T12", "L1"]))
    study = render_study(draw_patient(seed), draw_scanner(seed), top=top, workers=1)
    axes = [torch.arange(n, dtype=torch.float32) * 3.0 for n in study.voxels.shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    coordinate = level_coordinate(column_knots(study), points).numpy().astype(np.float16)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, hu=study.voxels, labels=class_map(study.labels), level_coordinate=coordinate)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--first-seed", type=int, default=0, help="training seeds lie below 1,000,000")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in range(args.first_seed, args.first_seed + args.count):
        target = args.out / f"phantom-{seed:06d}.npz"
        if not target.exists():
            write_phantom(target, seed)


if __name__ == "__main__":
    main()
