"""The localizer on its altered training torso and on random anatomy: ``python -m benchmarks.torso [--quick]``.

The torso was trained on, so these figures say nothing about new patients: they find what breaks the count (dark bone,
thick slices, noise, size, tilt, cut fields of view, another number of vertebrae). Random anatomy uses seeds that
training doesn't reach.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from benchmarks.results import ROOT, write_result
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import read_bundle
from osteo_daemon.inference.canonical import grid_affine
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.naming import LEVELS_FROM_SACRUM
from osteo_daemon.network.localizer import SpineClass
from train.synthesis import synthesise
from train.torso import load_torso

TORSO = "totalsegmentator_example"
FIRST_SEED = 990_000_000
LEVEL_LABELS = {"L5": 27, "L4": 28, "L3": 29, "L2": 30, "L1": 31, "T12": 32}
NAMED_MM = 15.0
Truth = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """A volume and the true centres (LPS mm) of the bodies wholly in it."""

    name: str
    volume: CtVolume
    truth: Truth


def _read(folder: Path, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    image = nib.load(folder / f"{name}.nii.gz")  # type: ignore[attr-defined]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # RAS to LPS
    return np.asarray(image.dataobj, dtype=np.float32), affine


def torso_cases(folder: Path) -> Iterator[Case]:
    """The torso as it is, and changed in one respect each."""
    hu, affine = _read(folder, "example_ct")
    labels, _ = _read(folder, "totalseg")
    bodies, _ = _read(folder, "totalseg_vertebrae_body")
    index = {name: np.argwhere((labels == label) & (bodies == 1)).mean(axis=0) for name, label in LEVEL_LABELS.items()}
    sacral = np.argwhere((labels == 26) & (bodies == 1)).mean(axis=0)

    def case(
        name: str,
        voxels: npt.NDArray[Any],
        to_lps: npt.NDArray[np.float64],
        *,
        levels: tuple[str, ...] = tuple(LEVEL_LABELS),
        index: Truth = index,
    ) -> Case:
        volume = CtVolume(np.ascontiguousarray(voxels), to_lps)
        return Case(name, volume, {level: volume.to_lps(index[level]) for level in levels})

    yield case("as it is", hu, affine)
    flipped = {k: np.array([v[0], v[1], hu.shape[2] - 1 - v[2]]) for k, v in index.items()}
    reverse = np.eye(4)
    reverse[2, 2], reverse[2, 3] = -1, hu.shape[2] - 1
    yield case("slices from the head", hu[:, :, ::-1], affine @ reverse, index=flipped)
    order = [2, 0, 1]
    turned = {k: v[order] for k, v in index.items()}
    yield case("axes in another order", hu.transpose(order), affine[:, [*order, 3]], index=turned)
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    yield case("mirrored left-right", hu, mirror @ affine)
    for factor in (0.8, 0.9, 1.1, 1.2):
        yield case(f"size {factor}", hu, np.diag([factor, factor, factor, 1.0]) @ affine)
    for degrees, axis in ((-12, 0), (12, 0), (10, 1), (-10, 2)):
        turn = np.eye(4)
        others = [a for a in range(3) if a != axis]
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn[np.ix_(others, others)] = [[cos, -sin], [sin, cos]]
        yield case(f"turned {degrees} degrees about {'LPS'[axis]}", hu, turn @ affine)
    for thickness in (5.0, 7.5, 10.0):
        n = int(hu.shape[2] * 3 / thickness)
        blurred = ndimage.gaussian_filter1d(hu, thickness / 3 * 0.35, axis=2)
        z = np.arange(n) * thickness / 3
        thick = ndimage.map_coordinates(
            blurred, np.stack(np.meshgrid(*[np.arange(s) for s in hu.shape[:2]], z, indexing="ij")), order=1
        )
        stretched = affine @ np.diag([1, 1, thickness / 3, 1])
        yield case(
            f"slices of {thickness} mm",
            thick,
            stretched,
            index={k: v * [1, 1, 3 / thickness] for k, v in index.items()},
        )
    noise = np.random.default_rng(1).normal(0, 1, hu.shape)
    for sd in (40, 80):
        yield case(f"noise {sd} HU", hu + sd * noise, affine)
    bone = np.isin(labels, [*range(25, 34)]) & (bodies != 2)
    depth = ndimage.distance_transform_edt(bone) * 3.0
    inside = np.clip((depth - 2.5) / 2.0, 0, 1)
    for target in (0, 30, 50, 80, 200):
        darker = hu + inside * (target - 110.0) * np.where(bone, 1, 0)
        yield case(f"trabecular bone {target} HU", darker, affine)
        if target <= 50:
            shell = darker + 150 * ((depth > 0) & (depth <= 3.5))
            yield case(f"trabecular bone {target} HU, shell +150", shell, affine)
            yield case(f"trabecular bone {target} HU, noise 40", darker + 40 * noise, affine)
    top = int(index["L1"][2] - 8)
    yield case("cut above L2", hu[:, :, :top], affine, levels=("L2", "L3", "L4", "L5"))
    above = {"L5": ("L4", "L3", "L2", "L1", "T12"), "L4": ("L3", "L2", "L1", "T12")}
    for level, levels in above.items():
        first_slice = int(index[level][2])
        lifted = affine.copy()
        lifted[:3, 3] = (affine @ [0, 0, first_slice, 1])[:3]
        kept = {k: v - [0, 0, first_slice] for k, v in index.items()}
        yield case(f"no sacrum (cut in {level})", hu[:, :, first_slice:], lifted, index=kept, levels=levels)
    cut = int(sacral[2])
    lifted = affine.copy()
    lifted[:3, 3] = (affine @ [0, 0, cut, 1])[:3]
    shifted = {k: v - [0, 0, cut] for k, v in index.items()}
    yield case("cut through S1", hu[:, :, cut:], lifted, index=shifted)
    yield _narrow(hu, affine, index)


def _narrow(hu: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], index: Truth) -> Case:
    """A spine field of view of 200 mm."""
    first = (28, 0)
    moved = affine.copy()
    moved[:3, 3] = (affine @ [first[0], first[1], 0, 1])[:3]
    volume = CtVolume(np.ascontiguousarray(hu[28:95, 0:67]), moved)
    truth = {k: volume.to_lps(v - [first[0], first[1], 0]) for k, v in index.items()}
    return Case("field of view of 200 mm", volume, truth)


def random_cases(folder: Path, count: int) -> Iterator[Case]:
    """Random anatomy with S1 and at least three vertebrae wholly in view."""
    torso = load_torso(folder)
    seed = FIRST_SEED
    while count:
        seed += 1
        sample = synthesise(torso, (140, 100, 110), seed)
        labels, u = sample.labels.numpy(), sample.level_coordinate.numpy()
        if np.count_nonzero(labels == SpineClass.S1_BODY) * 27 < 12_000:
            continue
        truth: Truth = {}
        affine = grid_affine(np.zeros(3), 3.0)
        for k, level in enumerate(LEVELS_FROM_SACRUM[:6]):
            voxels = np.argwhere((labels == SpineClass.BODY) & (np.floor(u) == k))
            upper = np.argwhere((labels == SpineClass.BODY) & (np.floor(u) == k + 1))
            if len(voxels) * 27 < 9000 or len(upper) * 27 < 2000 or (voxels == 0).any():
                break
            truth[level] = (affine[:3, :3] @ voxels.mean(axis=0)) + affine[:3, 3]
        if len(truth) < 3:
            continue
        count -= 1
        yield Case(f"random {seed - FIRST_SEED}", CtVolume(sample.hu[0].numpy(), affine), truth)


def judge(case: Case, localizer: SpineLocalizer) -> dict[str, Any]:
    """One row of figures."""
    began = time.perf_counter()
    row: dict[str, Any] = {"case": case.name, "refused": None, "right": 0, "wrong": 0, "missed": 0}
    try:
        found = localizer(case.volume)
    except NotEligible as refusal:
        row.update(refused=refusal.code, missed=len(case.truth))
        return {**row, "uncertain": True, "silent_error": False, "worst_mm": None, "seconds": _since(began)}
    errors = []
    for level, centre in case.truth.items():
        distances = {v.level: float(np.linalg.norm(v.centre_lps_mm - centre)) for v in found.vertebrae}
        nearest = min(distances, key=lambda name: distances[name])
        if distances[nearest] > NAMED_MM:
            row["missed"] += 1
        elif nearest == level:
            row["right"] += 1
            errors.append(distances[nearest])
        else:
            row["wrong"] += 1
    uncertain = any(flag.code in ("level_uncertain", "possible_transitional_anatomy") for flag in found.flags)
    silent = not uncertain and row["wrong"] > 0
    worst = round(max(errors), 1) if errors else None
    return {**row, "uncertain": uncertain, "silent_error": silent, "worst_mm": worst, "seconds": _since(began)}


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the unaltered torso and two random ones")
    parser.add_argument("--random", type=int, default=40, help="random anatomies")
    parser.add_argument("--bundle", type=Path, default=ROOT / "model_zoo" / "spine-localizer")
    arguments = parser.parse_args()
    data = Path(os.environ.get("OSTEO_TEST_DATA") or ROOT.parent / "shared" / "data") / TORSO
    if not data.is_dir():
        sys.exit(f"skipped: no {TORSO} (set OSTEO_TEST_DATA)" if not arguments.quick else 0)
    bundle = read_bundle(arguments.bundle)
    localizer = SpineLocalizer.from_bundle(bundle)
    rows = []
    cases = list(torso_cases(data))[: 1 if arguments.quick else None]
    for part in (cases, random_cases(data, 2 if arguments.quick else arguments.random)):
        for case in part:
            rows.append(judge(case, localizer))
            print(rows[-1], flush=True)
    named = [row for row in rows if row["refused"] is None]
    right, wrong = sum(row["right"] for row in rows), sum(row["wrong"] for row in rows)
    figures = {
        "bundle": f"{bundle.name} {bundle.version} {bundle.sha256[:12]}",
        "weights_sha256": bundle.files["models/model.safetensors"],
        "cases": len(rows),
        "refused": len(rows) - len(named),
        "vertebrae_named": right + wrong,
        "named_right_percent": round(100 * right / max(1, right + wrong), 1),
        "cases_named_wrong_without_warning": sum(row["silent_error"] for row in rows),
        "worst_centre_error_mm": max((row["worst_mm"] or 0.0 for row in rows), default=None),
        "rows": rows,
    }
    print(write_result("localizer-torso", figures, quick=arguments.quick))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
