"""Virtual patients beside real CT, measured in the same way: ``python -m benchmarks.reality [--quick]``.

Every real scan is compared with virtual patients scanned like it (voltage, kernel, voxels, phase): half of them drawn
as training's, half outside training's ranges (`benchmarks.heldout`). This judges the phantom, nothing else: no
detection, threshold or region is chosen by it. Without the real scans (`OSTEO_TEST_DATA`) only the quick form runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.heldout import MOTION_MM, draw
from benchmarks.inference import acrin, torso
from benchmarks.results import ROOT, write_result
from benchmarks.tissue import measure_tissue, upright
from benchmarks.unpack import unpack
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import ct_slices, read_headers
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner, coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from train.virtual import draw_patient

PATIENTS, QUICK_PATIENTS = 16, 2
FIRST_SEED = 6_000_000
NOISE_HU = (5.0, 32.0)
NOISE_GRAIN = (0.8, 2.2)

Vec = npt.NDArray[np.float64]
Centres = dict[str, Vec]


@dataclass(frozen=True, slots=True)
class Measure:
    """How one measure is compared.

    Attributes:
        meaning: what it is, with its unit.
        tolerance: by how much a real value may lie outside the range of the virtual ones.
    """

    meaning: str
    tolerance: float


MEASURES: Final[dict[str, Measure]] = {
    "air_hu": Measure("air around the patient, median HU", 15.0),
    "fat_hu": Measure("subcutaneous fat, median HU", 5.0),
    "fat_sd_hu": Measure("subcutaneous fat, robust SD of voxels in HU: noise and strands", 2.0),
    "muscle_hu": Measure("erectors, most even disc of 12 mm, median HU over sides and levels", 5.0),
    "blood_hu": Measure("great vessels in front of the spine, most even disc of 10 mm, HU", 5.0),
    "liver_hu": Measure("liver, most even disc of 18 mm, HU", 5.0),
    "trabecular_hu": Measure("middle of the bodies L1-L4, ellipsoid of 14 x 14 x 10 mm, mean HU", 0.0),
    "trabecular_sd_hu": Measure("its SD of voxels, HU", 5.0),
    "trabecular_sd_over_mean": Measure("its SD over its mean", 0.05),
    "trabecular_correlation_2mm": Measure("correlation of its voxels 2 mm (or one voxel) apart along a row", 0.1),
    "cortical_peak_hu": Measure("highest HU along rays through the walls of the bodies L1-L4, median", 20.0),
    "noise_sd_hu": Measure("SD of even discs of liver and muscle about their plane, HU", 1.0),
    "noise_correlation_x": Measure("correlation of neighbours along a row in these discs", 0.1),
    "noise_correlation_y": Measure("the same along a column", 0.1),
    "noise_correlation_z": Measure("the same of neighbouring slices", 0.1),
    "skin_edge_mm": Measure("20-80 % width of the edge from air to skin on the flanks, mm", 0.3),
}


@dataclass(frozen=True, slots=True)
class Scan:
    """A real scan, the technique to imitate and the part of the body to imitate it on."""

    name: str
    volume: CtVolume
    centres: Centres
    scanner: Scanner
    top: str
    bottom: str
    slices: int | None = None


def real_scans(data: Path, unpacked: Path) -> Iterator[Scan]:
    """The real scans along the patient axes; the tilted head has none of what is measured here."""
    for archive in ("acrin_flt_breast_001_abdomen", "cptac_pda_C3L-00189_lungbases"):
        unpack(data / f"{archive}.tar.xz", unpacked)
    volume, places = acrin(unpacked / "acrin_flt_breast_001_abdomen")
    # a virtual patient needs no air beyond 390 mm
    scanner = Scanner(kvp=140.0, slice_thickness_mm=5.0, slice_spacing_mm=4.25, pixel_spacing_mm=0.977, matrix=400)
    yield Scan("acrin_flt_breast_001", volume, {level: c for level, c, _ in places}, scanner, "T12", "L4")
    volume, places = torso(data / "totalsegmentator_example")
    yield Scan(
        "totalsegmentator_example", volume, {level: c for level, c, _ in places}, coarse_scanner(3.0), "T11", "L5"
    )
    volume = _series(unpacked / "cptac_pda_C3L-00189_lungbases")
    thick = Scanner(slice_thickness_mm=5.0, pixel_spacing_mm=volume.spacing_mm[1], kernel="lung", phase="portal")
    yield Scan("cptac_pda", volume, {}, thick, "T10", "T12", slices=12)
    volume = _series(data / "totalsegmentator_dicom_j2k")
    fine = Scanner(slice_thickness_mm=3.0, slice_spacing_mm=2.0, pixel_spacing_mm=volume.spacing_mm[1], phase="portal")
    yield Scan("totalsegmentator_dicom_j2k", volume, {}, fine, "L1", "L1", slices=12)


def _series(folder: Path) -> CtVolume:
    """The largest even stack of a folder that holds one series."""
    headers, _ = read_headers(sorted(path for path in folder.rglob("*") if path.is_file()))
    (slices,) = ct_slices(headers).values()
    return read_volume(max(split_stacks(slices), key=lambda stack: len(stack.slices)))


def imitate(scan: Scan, patients: int) -> Iterator[PhantomStudy]:
    """Virtual patients scanned like a real one, drawn by turns as training's and outside training's ranges."""
    for number in range(patients):
        rng = np.random.default_rng([FIRST_SEED, number])
        patient: VirtualPatient
        if number % 2:
            patient = replace(draw(number).patient, fractures=(), scoliosis_deg=0.0)
        else:
            patient = replace(draw_patient(FIRST_SEED + number), fractures=(), metal_levels=(), cement_levels=())
            patient = replace(patient, lumbar_count=5)
        scanner = replace(
            scan.scanner,
            noise_hu=float(rng.uniform(*NOISE_HU)),
            noise_grain=float(rng.uniform(*NOISE_GRAIN)) if number % 2 else 1.0,
            motion_mm=float(rng.uniform(*MOTION_MM)) if number % 2 else 0.0,
            seed=number,
        )
        yield render_study(patient, scanner, top=scan.top, bottom=scan.bottom, slices=scan.slices, workers=1)


def measure_phantom(study: PhantomStudy, *, with_centres: bool = True) -> dict[str, float]:
    """`measure_tissue` of a virtual patient."""
    volume = CtVolume(study.voxels.astype(np.float32), np.asarray(study.affine, dtype=np.float64))
    centres = {v.level: np.asarray(v.centre_lps_mm, dtype=np.float64) for v in study.vertebrae}
    return measure_tissue(upright(volume), centres if with_centres else {})


def compare(scan: Scan, patients: int) -> Iterator[dict[str, Any]]:
    """One row for each measure that the real scan allows."""
    real = measure_tissue(upright(scan.volume), scan.centres)
    virtual = [measure_phantom(study, with_centres=bool(scan.centres)) for study in imitate(scan, patients)]
    for name, measure in MEASURES.items():
        values = [found[name] for found in virtual if name in found]
        if name not in real or not values:
            continue
        low, high = min(values), max(values)
        yield {
            "measure": name,
            "scan": scan.name,
            "real": round(real[name], 3),
            "phantom_low": round(low, 3),
            "phantom_median": round(float(np.median(values)), 3),
            "phantom_high": round(high, 3),
            "tolerance": measure.tolerance,
            "enclosed": bool(low - measure.tolerance <= real[name] <= high + measure.tolerance),
        }


def main() -> None:
    """Compare and write ``docs/results/phantom-reality.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two virtual patients beside the coarse real scan only")
    quick = parser.parse_args().quick
    data = Path(os.environ.get("OSTEO_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not data.is_dir():
        sys.exit("skipped: no real CT (set OSTEO_TEST_DATA)" if not quick else 0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as unpacked:
        for scan in real_scans(data, Path(unpacked)):
            if quick and scan.name != "totalsegmentator_example":
                continue
            rows += compare(scan, QUICK_PATIENTS if quick else PATIENTS)
            print(scan.name, sum(row["scan"] == scan.name for row in rows), "measures", flush=True)
    rows.sort(key=lambda row: list(MEASURES).index(row["measure"]))
    figures = {
        "virtual_patients_per_scan": QUICK_PATIENTS if quick else PATIENTS,
        "compared": len(rows),
        "enclosed": sum(row["enclosed"] for row in rows),
        "measures": [{"measure": name, "meaning": entry.meaning} for name, entry in MEASURES.items()],
        "rows": rows,
    }
    print(write_result("phantom-reality", figures, quick=quick))


if __name__ == "__main__":
    main()
