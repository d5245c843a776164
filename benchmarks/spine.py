"""Localisation and measurement on virtual patients unlike any of training: ``python -m benchmarks.spine [--quick]``.

200 patients drawn outside training's ranges (`benchmarks.heldout`) over age, sex, density, curvature, voltage,
contrast, noise, thickness and coverage, and 25 with another number of vertebrae or ribs. Figures: names, refusals,
centres, bias and limits of agreement of the attenuation, by stratum, and a plot (`benchmarks.spine_figures`).

Scans and judgements are kept in ``runs/spine-phantoms``: a run that was stopped goes on where it was, and judges again
only what the source of the localiser, its weights or this file changed. ``--render`` fills the cache alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np

from benchmarks.heldout import ANATOMIES, RANGES, Draw, draw
from benchmarks.phantom_cache import FOLDER, phantom, source_digest
from benchmarks.results import write_result
from benchmarks.spine_figures import figures_of, plot
from osteo_daemon.domain.findings import MEASURED_LEVELS
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, find_bundle
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.vertebra import Vertebra
from osteo_daemon.phantom.calibration import trabecular_hu
from osteo_daemon.phantom.study import PhantomStudy, TrueVertebra
from osteo_daemon.phantom.truth import core_truth, region_truth

PATIENTS, QUICK_PATIENTS = 200, 3
VARIANTS_EACH = 5
NAMED_MM = 15.0
"""A found vertebra belongs to the true one whose centre lies nearer than this: half the distance of two bodies."""

Record = dict[str, Any]
T = TypeVar("T")


def draws(patients: int, variants_each: int) -> Iterator[Draw]:
    """The usual patients, then the numbering variants."""
    yield from (draw(seed) for seed in range(patients))
    for anatomy in ANATOMIES:
        yield from (draw(seed, anatomy) for seed in range(variants_each))


def judge(case: Draw, study: PhantomStudy, localizer: SpineLocalizer) -> Record:
    """Localise and measure one study and compare with its truth; plain JSON values."""
    volume = CtVolume(study.voxels.astype(np.float32), np.asarray(study.affine, dtype=np.float64))
    record: Record = {
        "seed": case.seed,
        "anatomy": case.anatomy,
        "patient_hu_true": trabecular_hu(case.patient.density_mg_cm3, case.scanner.kvp, case.scanner.phase),
        "in_view": [v.level for v in study.vertebrae if _wholly_in(v, study)],
        "refused": None,
        "flags": [],
        "vertebrae": [],
    }
    start = time.perf_counter()
    try:
        found = localizer(volume)
    except NotEligible as refusal:
        return {**record, "refused": str(refusal.code), "seconds": time.perf_counter() - start}
    record["flags"] = [flag.code for flag in found.flags]
    record["vertebrae"] = [_judge_vertebra(vertebra, study, volume) for vertebra in found.vertebrae]
    return {**record, "seconds": time.perf_counter() - start}


def _wholly_in(v: TrueVertebra, study: PhantomStudy) -> bool:
    z = study.affine[2, 3] + study.affine[2, 0] * np.array([0, len(study.voxels) - 1])
    half = 0.5 * v.size_mm[2]
    return bool(z[0] < v.centre_lps_mm[2] - half and v.centre_lps_mm[2] + half < z[1])


def _judge_vertebra(vertebra: Vertebra, study: PhantomStudy, volume: CtVolume) -> Record:
    """One found vertebra beside the true one it lies on (``true`` is None when it lies on none)."""
    nearest = min(study.vertebrae, key=lambda v: float(np.linalg.norm(vertebra.centre_lps_mm - v.centre_lps_mm)))
    distance = float(np.linalg.norm(vertebra.centre_lps_mm - nearest.centre_lps_mm))
    row: Record = {
        "named": str(vertebra.level),
        "true": nearest.level if distance <= NAMED_MM else None,
        "certain": vertebra.level_certain,
        "flags": [flag.code for flag in vertebra.flags],
        "distance_mm": round(distance, 3),
        "fractured": nearest.fractured,
    }
    if row["true"] is None or nearest.level not in (*MEASURED_LEVELS, "L6"):
        return row
    measured = measure(volume, vertebra.body_region, vertebra.axes_lps)
    row["flags"] += [flag.code for flag in measured.quality_flags]
    if measured.attenuation is not None:
        core, region = (
            core_truth(study, nearest.level),
            region_truth(study, nearest.level, measured.trabecular.mask, measured.trabecular.affine),
        )
        row |= {
            "mean": measured.attenuation.mean,
            "median": measured.attenuation.median,
            "set_mean": round(nearest.trabecular_hu_true, 2),
            "core_mean": round(core.mean_hu, 2),
            "core_median": round(core.median_hu, 2),
            "region_mean": round(region.mean_hu, 2),
            "region_median": round(region.median_hu, 2),
            "in_core_share": round(region.core_share, 3),
        }
    return row


class Judge:
    """Renders and judges one case; made once in each process."""

    _localizer: SpineLocalizer | None = None

    @classmethod
    def case(cls, case: Draw) -> Record:
        """The judgement of one case."""
        if cls._localizer is None:
            cls._localizer = SpineLocalizer.from_bundle(find_bundle("spine-localizer"))
        return judge(case, phantom(case), cls._localizer)


def render(case: Draw) -> str:
    """Put one case into the cache."""
    return f"{len(phantom(case).voxels)} slices"


def over(work: Callable[[Draw], T], cases: list[Draw], workers: int) -> Iterator[tuple[Draw, T]]:
    """Results in order, from this process or from several."""
    if workers == 1:
        yield from ((case, work(case)) for case in cases)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(cases, pool.map(work, cases), strict=True)


def judged(cases: list[Draw], path: Path, workers: int = 1) -> list[Record]:
    """Judgements of all cases in order; those in ``path`` are taken from there, the others added to it."""
    known: dict[tuple[str, int], Record] = {}
    if path.exists():
        # the last line of a killed run may be cut off
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                known[record["anatomy"], record["seed"]] = record
        path.write_text("".join(json.dumps(record) + "\n" for record in known.values()), encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [case for case in cases if (case.anatomy, case.seed) not in known]
    for number, (case, record) in enumerate(over(Judge.case, todo, workers), start=1):
        known[case.anatomy, case.seed] = record
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        said = record["refused"] or " ".join(f"{v['true']}={v['named']}" for v in record["vertebrae"])
        print(f"{number}/{len(todo)} {case.anatomy} {case.coverage}: {said}", flush=True)
    return [known[case.anatomy, case.seed] for case in cases]


def judgements_path(bundle: ModelBundle) -> Path:
    """File of judgements that belong to exactly this source and these weights: to every module that was loaded here."""
    parts = tuple(f"osteo_daemon.{name}." for name in ("imaging", "inference", "network", "phantom"))
    files = {module.__file__ for name, module in sys.modules.items() if name.startswith(parts)}
    here = Path(__file__)
    source = source_digest(*sorted(Path(file) for file in files if file), here, here.with_name("heldout.py"))
    whole = hashlib.sha256(f"{source}{bundle.files['models/model.safetensors']}".encode()).hexdigest()
    return FOLDER / f"judged-{whole[:16]}.jsonl"


def main() -> None:
    """Judge all patients and write ``docs/results/spine-phantoms.json`` and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PATIENTS} patients instead of {PATIENTS}")
    parser.add_argument("--patients", type=int, default=PATIENTS, help="another number of usual patients")
    parser.add_argument("--render", action="store_true", help="only fill the cache of scans")
    parser.add_argument("--workers", type=int, default=1, help="processes; set OMP_NUM_THREADS=1 with several")
    arguments = parser.parse_args()
    mpl.use("Agg")
    patients, variants = (QUICK_PATIENTS, 0) if arguments.quick else (arguments.patients, VARIANTS_EACH)
    cases = list(draws(patients, variants))
    if arguments.render:
        for number, (_, said) in enumerate(over(render, cases, arguments.workers), start=1):
            print(f"{number}/{len(cases)} {said}", flush=True)
        return
    bundle = find_bundle("spine-localizer", None)
    records = judged(cases, judgements_path(bundle), arguments.workers)
    figures = {
        "bundle": f"{bundle.name} {bundle.version}",
        "weights_sha256": bundle.files["models/model.safetensors"],
        "trained_and_benchmark_ranges": [
            {
                "quantity": name,
                "training": list(entry.training),
                "outside_training": " or ".join(f"{low:g} to {high:g}" for low, high in entry.outside),
                "share_outside": entry.share,
            }
            for name, entry in RANGES.items()
        ],
        **figures_of(cases, records),
    }
    if not arguments.quick:
        plot(cases, records, "spine-phantoms")
    print(write_result("spine-phantoms", figures, quick=arguments.quick))


if __name__ == "__main__":
    main()
