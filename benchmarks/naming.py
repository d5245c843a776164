"""Names by two anchors in unusual anatomy, and what confidence is worth: ``python -m benchmarks.naming [--quick]``.

Three kinds of cases: the labelled torso with a vertebra left out, put in or grown together; the altered torso whose
network output is worst; virtual patients that no training saw, with four to six lumbar vertebrae, lumbar ribs and
curves. A vertebra is right when it has its true name (the true ones are counted down from the last thoracic rib) and
its centre lies within 8 mm.

The network's output is kept under ``runs/naming`` by weights and case, so that figures of a changed decoding cost
seconds; ``--fresh`` runs the network again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import ROOT, write_result
from benchmarks.torso import NAMED_MM, TORSO, torso_cases
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.decode import coronal_angle, decode
from osteo_daemon.inference.localize import Localization, SpineLocalizer
from osteo_daemon.inference.naming import LEVELS_FROM_SACRUM, N_MEASURED, T12
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.spine import build_spine
from osteo_daemon.phantom.study import render_study
from train.recounted import fused, recounted
from train.torso import load_torso

FIRST_SEED = 6_000_000
"""Training and the other benchmarks draw their virtual patients from other seeds."""

PATIENTS, QUICK_PATIENTS = 24, 1
RIGHT_MM = 8.0
CONFIDENT = 0.7
HARD = (
    "slices of 7.5 mm",
    "slices of 10.0 mm",
    "noise 80 HU",
    "trabecular bone 0 HU",
    "trabecular bone 0 HU, noise 40",
    "cut above L2",
    "no sacrum (cut in L5)",
    "no sacrum (cut in L4)",
    "cut through S1",
    "field of view of 200 mm",
)
UNSURE = ("possible_transitional_anatomy", "level_uncertain", "last_rib_not_seen")


@dataclass(frozen=True)
class Case:
    """A scan, the true names and centres (LPS mm) of vertebrae, and whether its count is unusual."""

    kind: str
    name: str
    volume: CtVolume
    truth: dict[str, npt.NDArray[np.float64]]
    unusual: bool = False
    fused: frozenset[str] = frozenset()
    cobb_degrees: float | None = None


@dataclass
class Found:
    """What came out of one case."""

    row: dict[str, Any]
    vertebrae: list[tuple[float, bool]] = field(default_factory=list)  # confidence, and whether it was right


def counted_names(bears_rib: tuple[bool, ...]) -> list[str]:
    """Names counted down from the lowest vertebra with ribs; what lies below L5 is called L6."""
    rib = bears_rib.index(True)
    places = [k - rib + T12 for k in range(len(bears_rib))]
    return [LEVELS_FROM_SACRUM[p] if p >= 0 else "L6" for p in places]


def torso_edits(folder: Path) -> Iterator[Case]:
    """The torso with another count, and with fused pairs."""
    torso = load_torso(folder)
    for at_disc, by in [(disc, by) for by in (1, -1) for disc in (1, 2, 3, 4)]:
        made = recounted(torso, at_disc, by)
        names = counted_names(made.bears_rib)
        truth = dict(zip(names, made.centres_lps_mm, strict=True))
        what = f"without {LEVELS_FROM_SACRUM[at_disc]}" if by > 0 else f"{LEVELS_FROM_SACRUM[at_disc - 1]} twice"
        yield Case("torso, other count", what, made.volume, truth, unusual=True)
    for disc in (1, 2, 3, 4):
        pair = frozenset(LEVELS_FROM_SACRUM[disc - 1 : disc + 1])
        yield Case("torso, fused pair", "-".join(sorted(pair)), fused(torso, disc), {}, fused=pair)


def patients(count: int) -> Iterator[Case]:
    """Virtual patients; every eighth kind in turn."""
    for seed in range(count):
        rng = np.random.default_rng([FIRST_SEED, seed])
        kind = ("usual", "six lumbar", "four lumbar", "lumbar rib", "scoliosis", "usual", "scoliosis", "scoliosis")[
            seed % 8
        ]
        patient = VirtualPatient(
            seed=FIRST_SEED + seed,
            age_years=int(rng.integers(35, 90)),
            sex="F" if rng.random() < 0.5 else "M",
            density_mg_cm3=float(rng.uniform(40, 170)),
            bmi_kg_m2=float(rng.uniform(19, 34)),
            scoliosis_deg=float(rng.uniform(6, 35) * rng.choice([-1, 1])) if kind == "scoliosis" else 0.0,
            scoliosis_apex="L2",
            lumbar_count={"six lumbar": 6, "four lumbar": 4}.get(kind, 5),
            lumbar_rib_mm=float(rng.uniform(30, 50)) if kind == "lumbar rib" else 0.0,
        )
        scanner = coarse_scanner(
            3.0, noise_hu=float(rng.uniform(8, 28)), slice_thickness_mm=float(rng.choice([3.0, 5.0])), seed=seed,
            slice_spacing_mm=3.0, phase=str(rng.choice(["native", "portal"])),
        )  # fmt: skip
        study = render_study(patient, scanner, top="T11", workers=1)
        column = [v for v in study.vertebrae if v.level != "S1"][::-1]
        truth = dict(
            zip(
                counted_names(tuple(v.level.startswith("T") for v in column)),
                [np.asarray(v.centre_lps_mm, dtype=np.float64) for v in column],
                strict=True,
            )
        )
        # the bodies that are named T12 to L5 by the sacrum, as the localiser measures the angle
        lean = [np.degrees(np.arctan2(v.axes[0, 2], v.axes[2, 2])) for v in build_spine(patient).vertebrae[1:7]]
        yield Case(
            f"virtual, {kind}",
            f"{seed}",
            CtVolume(study.voxels.astype(np.float32), np.asarray(study.affine, dtype=np.float64)),
            truth,
            unusual=kind in ("six lumbar", "four lumbar", "lumbar rib"),
            cobb_degrees=float(max(lean) - min(lean)),
        )


class KeptOutput:
    """Localises with the network's output of an earlier run where there is one (as float16)."""

    def __init__(self, localizer: SpineLocalizer, folder: Path, *, fresh: bool) -> None:
        self._localizer, self._folder, self._fresh = localizer, folder, fresh
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, case: Case) -> Localization:
        """As `SpineLocalizer`.

        Raises:
            NotEligible: as there.
        """
        canonical = self._localizer.canonical(case.volume)
        path = self._folder / (re.sub(r"[^a-z0-9.]+", "-", f"{case.kind} {case.name}".lower()) + ".npz")
        if self._fresh or not path.exists():
            maps = self._localizer.label(canonical)
            half = np.float16
            np.savez(path, probabilities=maps.probabilities.astype(half), phase=maps.phase.astype(half))
        with np.load(path, allow_pickle=False) as kept:
            maps = SpineMaps(kept["probabilities"].astype(np.float32), kept["phase"].astype(np.float32))
        return decode(maps, canonical)


def judge(case: Case, locate: KeptOutput) -> Found:
    """Names, places, flags and angle of one case against its truth."""
    row: dict[str, Any] = {"kind": case.kind, "case": case.name, "unusual": case.unusual, "refused": None}
    try:
        found = locate(case)
    except NotEligible as refusal:
        return Found({**row, "refused": refusal.code})
    flags = {flag.code for flag in found.flags}
    result = Found(row)
    wrong = 0
    for vertebra in found.vertebrae:
        if vertebra.level not in LEVELS_FROM_SACRUM[:N_MEASURED] or not case.truth:
            continue
        distances = {name: float(np.linalg.norm(vertebra.centre_lps_mm - c)) for name, c in case.truth.items()}
        nearest = min(distances, key=lambda name: distances[name])
        if distances[nearest] > NAMED_MM and len(case.truth) < N_MEASURED:
            continue  # a vertebra whose truth is not known
        named = nearest == vertebra.level and distances[nearest] <= NAMED_MM
        wrong += not named
        result.vertebrae.append((vertebra.confidence, named and distances[nearest] <= RIGHT_MM))
    fused_found = {v.level for v in found.vertebrae if any(flag.code == "fused_vertebra" for flag in v.flags)}
    angle = coronal_angle(list(found.vertebrae))
    row.update(
        anchor=found.anchor,
        transitional="possible_transitional_anatomy" in flags,
        unsure=bool(flags & set(UNSURE)),
        wrong_names=wrong,
        fused_right=fused_found == set(case.fused),
        cobb_degrees=None if case.cobb_degrees is None else round(case.cobb_degrees, 1),
        measured_cobb_degrees=None if case.cobb_degrees is None else round(angle, 1),
    )
    return result


def confidence_figures(vertebrae: list[tuple[float, bool]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How confidence and being right go together: figures, and shares by interval of confidence."""
    right = [confidence for confidence, good in vertebrae if good]
    wrong = [confidence for confidence, good in vertebrae if not good]
    bins = []
    for low, high in ((0.0, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        inside = [good for confidence, good in vertebrae if low <= confidence < high]
        share = round(100 * float(np.mean(inside)), 1) if inside else None
        bins.append({"from": low, "to": min(high, 1.0), "vertebrae": len(inside), "right_percent": share})
    pairs = len(right) * len(wrong)
    above = sum(r > w for r in right for w in wrong) + 0.5 * sum(r == w for r in right for w in wrong)
    figures = {
        "vertebrae": len(vertebrae),
        "not_right": len(wrong),
        "highest_confidence_of_one_that_is_not_right": round(max(wrong), 3) if wrong else None,
        f"not_right_above_{CONFIDENT}": sum(confidence >= CONFIDENT for confidence in wrong),
        f"right_below_{CONFIDENT}": sum(confidence < CONFIDENT for confidence in right),
        "area_under_curve": round(above / pairs, 3) if pairs else None,
    }
    return figures, bins


def summary(results: list[Found]) -> dict[str, Any]:
    """Figures over all cases."""
    rows = [result.row for result in results if result.row["refused"] is None]
    unusual, usual = [r for r in rows if r["unusual"]], [r for r in rows if not r["unusual"]]
    curved = [r for r in rows if r["cobb_degrees"] is not None]
    confidence, bins = confidence_figures([v for result in results for v in result.vertebrae])
    errors = np.array([r["measured_cobb_degrees"] - r["cobb_degrees"] for r in curved])
    return {
        "cases": len(results),
        "refused": len(results) - len(rows),
        "unusual_counts": len(unusual),
        "unusual_counts_flagged": sum(r["transitional"] for r in unusual),
        "usual_counts": len(usual),
        "usual_counts_flagged": sum(r["transitional"] for r in usual),
        "cases_with_wrong_names_and_no_flag": sum(r["wrong_names"] > 0 and not r["unsure"] for r in rows),
        "fused_pairs_right": sum(r["fused_right"] for r in rows if r["kind"] == "torso, fused pair"),
        "fused_flagged_without": sum(not r["fused_right"] for r in rows if r["kind"] != "torso, fused pair"),
        "cobb_bias_degrees": round(float(errors.mean()), 2) if errors.size else None,
        "cobb_sd_degrees": round(float(errors.std(ddof=1)), 2) if errors.size > 1 else None,
        "scoliosis_from_10_degrees": {
            "true": sum(r["cobb_degrees"] > 10 for r in curved),
            "both": sum(r["cobb_degrees"] > 10 and r["measured_cobb_degrees"] > 10 for r in curved),
            "measured_only": sum(r["cobb_degrees"] <= 10 < r["measured_cobb_degrees"] for r in curved),
        },
        "confidence": confidence,
        "confidence_bins": bins,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one edit of the torso and one virtual patient")
    parser.add_argument("--patients", type=int, help="another number of virtual patients")
    parser.add_argument("--fresh", action="store_true", help="run the network even where its output was kept")
    arguments = parser.parse_args()
    data = Path(os.environ.get("OSTEO_TEST_DATA") or ROOT.parent / "shared" / "data") / TORSO
    if not data.is_dir():
        sys.exit(f"skipped: no {TORSO} (set OSTEO_TEST_DATA)" if not arguments.quick else 0)
    bundle = find_bundle("spine-localizer", None)
    weights = bundle.files["models/model.safetensors"]
    folder = ROOT / "runs" / "naming" / weights[:12]
    locate = KeptOutput(SpineLocalizer.from_bundle(bundle), folder, fresh=arguments.fresh or arguments.quick)

    def hard() -> Iterator[Case]:
        for case in torso_cases(data):
            if case.name in HARD:
                yield Case("torso, altered", case.name, case.volume, case.truth)

    results = []
    patient_count = arguments.patients or (QUICK_PATIENTS if arguments.quick else PATIENTS)
    kinds = (torso_edits(data), patients(patient_count)) if arguments.quick else (
        torso_edits(data), patients(patient_count), hard()
    )  # fmt: skip
    # in turn, and written after every case: a run that is cut short still shows each kind
    for turn in zip_longest(*(islice(kind, 1 if arguments.quick else None) for kind in kinds)):
        for case in turn:
            if case is None:
                continue
            results.append(judge(case, locate))
            print(results[-1].row, [(round(c, 2), good) for c, good in results[-1].vertebrae], flush=True)
        figures = {
            "bundle": f"{bundle.name} {bundle.version} {bundle.sha256[:12]}",
            "weights_sha256": weights,
            **summary(results),
            "rows": [result.row for result in results],
        }
        written = write_result("localizer-naming", figures, quick=arguments.quick)
    print(written)


if __name__ == "__main__":
    main()
