"""How fast virtual patients are scanned, and how true they are: ``python -m benchmarks.phantom [--quick]``.

Times are given as wall time and as processor time of this process: on a shared machine only the second is steady.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.results import write_result
from osteo_daemon.phantom.labels import core_mask
from osteo_daemon.phantom.scanner import Scanner, coarse_scanner
from osteo_daemon.phantom.study import render_study, render_voi
from osteo_daemon.phantom.variants import draw_patient, draw_scanner

FIRST_SEED = 7_000_000
FULL_SLICES = 300
GOALS_S = {"full_300x512x512": 60.0, "coarse_3mm": 5.0, "voi_64": 0.2}


def timed(work: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Median wall and processor seconds of one call."""
    wall, cpu = [], []
    for repeat in range(repeats):
        start = time.perf_counter(), time.process_time()
        work(repeat)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"wall_s": round(statistics.median(wall), 3), "cpu_s": round(statistics.median(cpu), 3), "repeats": repeats}


def times(quick: bool) -> dict[str, dict[str, float]]:
    """Seconds of a full study, a coarse one and one VOI."""
    patients = [draw_patient(np.random.default_rng([FIRST_SEED, n]), anatomy="usual") for n in range(20)]
    full = Scanner(slice_thickness_mm=1.5, slice_spacing_mm=1.2, pixel_spacing_mm=0.8)
    slices = 30 if quick else FULL_SLICES
    render_voi(patients[0], "L1", Scanner())
    figures = {
        f"full_{slices}x512x512": timed(lambda n: render_study(patients[n], full, slices=slices), 1),
        "coarse_3mm": timed(lambda n: render_study(patients[n], coarse_scanner()), 1 if quick else 5),
        "voi_64": timed(lambda n: render_voi(patients[n], "L2", Scanner()), 3 if quick else 20),
    }
    for name, goal in GOALS_S.items():
        if name in figures:
            figures[name]["goal_s"] = goal
    return figures


def truth(patients: int) -> dict[str, float]:
    """Measured minus set attenuation of the trabecular core over random anatomy and technique, T12-L4."""
    errors = []
    for number in range(patients):
        rng = np.random.default_rng([FIRST_SEED, 1, number])
        patient = draw_patient(rng, metal_levels=(), cement_levels=(), bone_islands=())
        study = render_study(patient, draw_scanner(rng, coarse_scanner()), top="T12", bottom="L4")
        for v in study.vertebrae:
            core = core_mask(study.labels, v.level)
            if core.sum() >= 100:
                errors.append(float(study.voxels[core].mean()) - v.trabecular_hu_true)
    return {
        "patients": patients,
        "vertebrae": len(errors),
        "mean_error_hu": round(float(np.mean(errors)), 2),
        "sd_error_hu": round(float(np.std(errors)), 2),
        "largest_error_hu": round(float(np.max(np.abs(errors))), 2),
    }


def main() -> None:
    """Measure and write ``docs/results/phantom.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short form that shows the benchmark runs")
    quick = parser.parse_args().quick
    figures = {
        "load_average": round(os.getloadavg()[0], 1),
        "times": times(quick),
        "trabecular_core": truth(2 if quick else 20),
    }
    print(write_result("phantom", figures, quick=quick))


if __name__ == "__main__":
    main()
