"""Localisation and measurement on virtual patients that no training saw: ``python -m benchmarks.spine [--quick]``.

Every patient draws age, sex, density, curvature, scoliosis, tube voltage, contrast, noise, thickness and coverage.
Figures: how many vertebrae got the right name, how far off the centres are, bias and limits of agreement of the
measured attenuation, by subgroup; a plot stands beside the figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.results import RESULTS, write_result
from osteo_daemon.domain.findings import AVERAGED_LEVELS
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner, coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study

PATIENTS = 200
QUICK_PATIENTS = 3
FIRST_SEED = 5_000_000
"""Training draws its virtual patients from other seeds (train/virtual.py)."""

NAMED_MM = 15.0
"""A found vertebra belongs to the true one whose centre lies nearer than this: half the distance of two bodies."""


@dataclass(frozen=True)
class Case:
    """One virtual patient, how it was scanned, and what came out."""

    groups: dict[str, str]
    refused: str | None
    right: int
    wrong: int
    missed: int
    warned: bool
    centre_errors_mm: list[float]
    hu_true: list[float]
    hu_measured: list[float]
    seconds: float


def draw(seed: int) -> tuple[VirtualPatient, Scanner, str]:
    """A patient, a scanner and the uppermost level in view."""
    rng = np.random.default_rng([FIRST_SEED, seed])
    patient = VirtualPatient(
        seed=FIRST_SEED + seed,
        age_years=int(rng.integers(30, 92)),
        sex=str(rng.choice(["F", "M"])),  # type: ignore[arg-type]
        density_mg_cm3=float(rng.uniform(25, 200)),
        bmi_kg_m2=float(rng.uniform(18, 36)),
        lordosis_deg=float(rng.uniform(30, 60)),
        scoliosis_deg=float(rng.choice([0, 0, 0, rng.uniform(8, 20)])),
    )
    scanner = coarse_scanner(
        3.0,
        kvp=float(rng.choice([100, 120, 120, 140])),
        phase=str(rng.choice(["native", "native", "portal", "arterial"])),
        noise_hu=float(rng.uniform(6, 30)),
        slice_thickness_mm=float(rng.choice([3.0, 3.0, 5.0])),
        slice_spacing_mm=3.0,
        seed=seed,
    )
    return patient, scanner, str(rng.choice(["T10", "T12", "L1"]))


def judge(study: PhantomStudy, localizer: SpineLocalizer, groups: dict[str, str]) -> Case:
    """Localise and measure one study and compare with its truth."""
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    start = time.perf_counter()
    truth = {v.level: v for v in study.vertebrae if v.level.startswith("L")}
    try:
        found = localizer(volume)
    except NotEligible as refusal:
        return Case(groups, refusal.code, 0, 0, len(truth), True, [], [], [], time.perf_counter() - start)
    right = wrong = 0
    errors, hu_true, hu_measured = [], [], []
    named = set()
    for vertebra in found.vertebrae:
        distances = {
            level: float(np.linalg.norm(vertebra.centre_lps_mm - v.centre_lps_mm)) for level, v in truth.items()
        }
        nearest = min(distances, key=lambda level: distances[level])
        if distances[nearest] > NAMED_MM:
            continue
        named.add(nearest)
        if nearest != vertebra.level:
            wrong += 1
            continue
        right += 1
        errors.append(distances[nearest])
        if nearest in AVERAGED_LEVELS:
            measured = measure(volume, vertebra.body_region, vertebra.axes_lps)
            if measured.attenuation is not None:
                hu_true.append(float(truth[nearest].trabecular_hu_true))
                hu_measured.append(measured.attenuation.median)
    warned = any(flag.code == "level_uncertain" for flag in found.flags)
    missed = len(truth.keys() - named)
    seconds = time.perf_counter() - start
    return Case(groups, None, right, wrong, missed, warned, errors, hu_true, hu_measured, seconds)


def summary(cases: list[Case]) -> dict[str, float | int | None]:
    """Figures of a group of cases."""
    errors = np.concatenate([[], *[case.centre_errors_mm for case in cases]])
    bias = np.concatenate([[], *[case.hu_measured for case in cases]]) - np.concatenate(
        [[], *[case.hu_true for case in cases]]
    )
    named = sum(case.right + case.wrong for case in cases)
    silent = sum(case.wrong > 0 and not case.warned for case in cases)
    return {
        "patients": len(cases),
        "refused": sum(case.refused is not None for case in cases),
        "lumbar_vertebrae_named": named,
        "named_right_percent": round(100 * sum(case.right for case in cases) / named, 1) if named else None,
        "patients_named_wrong_without_warning": silent,
        "missed": sum(case.missed for case in cases if case.refused is None),
        "centre_error_median_mm": round(float(np.median(errors)), 2) if errors.size else None,
        "centre_error_p95_mm": round(float(np.percentile(errors, 95)), 2) if errors.size else None,
        "hu_bias": round(float(bias.mean()), 2) if bias.size else None,
        "hu_limits_of_agreement": round(float(1.96 * bias.std(ddof=1)), 2) if bias.size > 1 else None,
    }


def by_group(cases: list[Case]) -> Iterator[dict[str, float | int | str | None]]:
    """Figures of every subgroup."""
    yield {"group": "all", **summary(cases)}
    for key in cases[0].groups:
        for value in sorted({case.groups[key] for case in cases}):
            yield {"group": f"{key} {value}", **summary([case for case in cases if case.groups[key] == value])}


def _groups(patient: VirtualPatient, scanner: Scanner, top: str) -> dict[str, str]:
    bounds = (60.0, 100.0, 140.0)
    density = next((f"below {bound:.0f}" for bound in bounds if patient.density_mg_cm3 < bound), "from 140")
    return {
        "sex": patient.sex,
        "age": "below 50" if patient.age_years < 50 else "50 to 69" if patient.age_years < 70 else "from 70",
        "density mg/cm3": density,
        "scoliosis": "yes" if patient.scoliosis_deg else "no",
        "kVp": f"{scanner.kvp:.0f}",
        "phase": scanner.phase,
        "noise HU": "below 18" if scanner.noise_hu < 18 else "from 18",
        "thickness mm": f"{scanner.slice_thickness_mm:.0f}",
        "scan from": top,
    }


def plot(cases: list[Case], name: str) -> None:
    """Bland-Altman plot of the measured attenuation and the distribution of centre errors."""
    true = np.concatenate([[], *[case.hu_true for case in cases]])
    measured = np.concatenate([[], *[case.hu_measured for case in cases]])
    errors = np.concatenate([[], *[case.centre_errors_mm for case in cases]])
    if true.size < 2:
        return
    difference = measured - true
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot((measured + true) / 2, difference, ".", color="#0072b2", alpha=0.5, markersize=4)
    for level, style in (
        (difference.mean(), "-"),
        *((difference.mean() + k * difference.std(), "--") for k in (-1.96, 1.96)),
    ):
        left.axhline(level, color="#d55e00", linestyle=style, linewidth=1)
    left.set_xlabel("mean of true and measured attenuation (HU)")
    left.set_ylabel("measured - true (HU)")
    right.hist(errors, bins=30, color="#0072b2")
    right.set_xlabel("centre error (mm)")
    right.set_ylabel("lumbar vertebrae")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PATIENTS} patients instead of {PATIENTS}")
    parser.add_argument("--patients", type=int, help="another number of patients")
    arguments = parser.parse_args()
    mpl.use("Agg")
    count = arguments.patients or (QUICK_PATIENTS if arguments.quick else PATIENTS)
    bundle = find_bundle("spine-localizer", None)
    localizer = SpineLocalizer.from_bundle(bundle)
    cases = []
    for seed in range(count):
        patient, scanner, top = draw(seed)
        cases.append(judge(render_study(patient, scanner, top=top), localizer, _groups(patient, scanner, top)))
        print(
            f"{seed + 1}/{count}", cases[-1].refused or f"right {cases[-1].right} wrong {cases[-1].wrong}", flush=True
        )
    refusals: dict[str, int] = {}
    for case in cases:
        if case.refused:
            refusals[case.refused] = refusals.get(case.refused, 0) + 1
    figures = {
        "bundle": f"{bundle.name} {bundle.version} {bundle.sha256[:12]}",
        "seconds_per_study_median": round(float(np.median([case.seconds for case in cases])), 2),
        "refusals": refusals,
        "subgroups": list(by_group(cases)),
    }
    if not arguments.quick:
        plot(cases, "spine-phantoms")
    print(write_result("spine-phantoms", figures, quick=arguments.quick))


if __name__ == "__main__":
    main()
