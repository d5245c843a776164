"""Time and memory of one screening, stage by stage: ``python -m benchmarks.screening [--quick] [--folder DIR]``.

Without a folder a virtual patient of 100 slices is scanned. The models are warm in the second run, as in the daemon.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_result
from osteo_daemon.inference.bundle import WEIGHTS_NAME, find_bundle
from osteo_daemon.inference.screening import StudyScreener
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_study
from osteo_daemon.reporting import build_report
from osteo_daemon.settings import Settings

SLICES = 100
GOAL_S, GOAL_GB, GOAL_MB = 15.0, 3.0, 40.0
"""For finding and measuring the vertebrae of 100 slices on two cores, for memory, and for the file of weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run instead of three")
    parser.add_argument("--folder", type=Path, help="a real study instead of a virtual one")
    arguments = parser.parse_args()
    settings = Settings()
    start = time.perf_counter()
    screener = StudyScreener.load(settings)
    load_s = time.perf_counter() - start
    bundle = find_bundle(settings.screener.localizer_bundle, settings.models_dir)
    with tempfile.TemporaryDirectory() as name:
        if arguments.folder is None:
            patient = VirtualPatient(seed=11, age_years=70, sex="F", density_mg_cm3=90.0)
            folder = Path(name)
            write_series(render_study(patient, Scanner(slice_thickness_mm=3.0), slices=SLICES), folder)
        else:
            folder = arguments.folder
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        runs = [_run(screener, settings, paths) for _ in range(1 if arguments.quick else 3)]
    figures = {
        "study": "virtual patient" if arguments.folder is None else "real CT",
        "slices": len(paths),
        "device": str(screener.device),
        "load_models_s": round(load_s, 2),
        "locate_and_measure_s": [round(run["localize"] + run["measure"], 2) for run in runs if "measure" in run],
        "locate_and_measure_goal_s": GOAL_S,
        "peak_memory_goal_gb": GOAL_GB,
        "localizer_weights_mb": round((bundle.path / WEIGHTS_NAME).stat().st_size / 1e6, 1),
        "localizer_weights_goal_mb": GOAL_MB,
        "stages_s": [{"run": "cold" if index == 0 else f"warm {index}", **run} for index, run in enumerate(runs)],
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    kind = "screening" if arguments.folder is None else "screening-real-ct"
    print(write_result(kind, figures, quick=arguments.quick))


def _run(screener: StudyScreener, settings: Settings, paths: list[Path]) -> dict[str, Any]:
    start = time.perf_counter()
    screening = screener.screen(paths)
    screened = time.perf_counter()
    if screening.result.exclusion is None:
        build_report(screening, settings, datetime.now(UTC))
    end = time.perf_counter()
    return {
        "outcome": screening.result.outcome.value,
        **dict(screening.result.durations_s),
        "build_report": round(end - screened, 3),
        "total": round(end - start, 3),
    }


if __name__ == "__main__":
    main()
