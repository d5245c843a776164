"""What the measured region does to the number: ``python -m benchmarks.region [--quick]``.

Virtual patients know the mean of their whole trabecular core. The same vertebrae are measured on their true body masks
with one rule of the region changed at a time, so each rule's share of the difference can be read.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.results import write_result
from osteo_daemon.domain.findings import AVERAGED_LEVELS
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference import density
from osteo_daemon.phantom.labels import body_mask, core_mask
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_voi

FIRST_SEED = 7_400_000
PATIENTS, QUICK_PATIENTS = 20, 1
SIZE, SPACING_MM = 48, 1.25

RULES = {
    "as the product measures": density.RegionRules(),
    "erosion 3 mm": density.RegionRules(erosion_mm=3.0),
    "erosion 4 mm": density.RegionRules(erosion_mm=4.0),
    "erosion 6 mm": density.RegionRules(erosion_mm=6.0),
    "posterior part kept": density.RegionRules(posterior_share=0.0),
    "dense voxels kept": density.RegionRules(outlier_spreads=99.0),
    "erosion 3 mm, posterior part and dense voxels kept": density.RegionRules(3.0, 0.0, 99.0),
}


def differences(patients: int) -> dict[str, list[tuple[float, float]]]:
    """Mean and median minus the true core mean in HU, by rule, of every vertebra L1-L4."""
    found: dict[str, list[tuple[float, float]]] = {"the whole core itself": [], **{name: [] for name in RULES}}
    for number in range(patients):
        rng = np.random.default_rng([FIRST_SEED, number])
        patient = VirtualPatient(
            seed=FIRST_SEED + number,
            density_mg_cm3=float(rng.uniform(40, 180)),
            age_years=int(rng.integers(40, 88)),
        )
        for level in AVERAGED_LEVELS:
            voi = render_voi(patient, level, Scanner(seed=number), SIZE, SPACING_MM)
            volume, vertebra = CtVolume(voi.voxels, voi.affine), voi.vertebra
            truth = vertebra.trabecular_hu_true
            core = volume.voxels[core_mask(voi.labels, level)]
            found["the whole core itself"].append((float(core.mean()) - truth, float(np.median(core)) - truth))
            axes = np.array([-vertebra.axes[:, 2], vertebra.axes[:, 1], vertebra.axes[:, 0]])
            body = Region(body_mask(voi.labels, level), voi.affine)
            for name, rules in RULES.items():
                measured = density.measure(volume, body, axes, rules).attenuation
                if measured is not None:
                    found[name].append((measured.mean - truth, measured.median - truth))
    return found


def main() -> None:
    """Measure and write ``docs/results/region.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one patient: shows that the benchmark runs")
    quick = parser.parse_args().quick
    patients = QUICK_PATIENTS if quick else PATIENTS
    rows = []
    for name, values in differences(patients).items():
        pairs = np.array(values)
        rows.append(
            {
                "region": name,
                "vertebrae": len(pairs),
                "mean_minus_truth_hu": round(float(pairs[:, 0].mean()), 1),
                "median_minus_truth_hu": round(float(pairs[:, 1].mean()), 1),
                "sd_of_median_hu": round(float(pairs[:, 1].std()), 1),
            }
        )
    print(write_result("region", {"patients": patients, "rules": rows}, quick=quick))


if __name__ == "__main__":
    main()
