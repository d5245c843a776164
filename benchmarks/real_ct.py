"""What the product says of the real scans at hand: ``python -m benchmarks.real_ct [--quick]``.

The whole lumbar spine is in view in two of them. ``acrin_flt_breast_001`` was never trained on; one reader gave centres
and attenuation. ``totalsegmentator_example`` is the labelled torso of training, here as a volume, so its figures say
only that reading it back works. The others must be refused or flagged. Nothing is chosen by these figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.inference import Place, acrin, torso
from benchmarks.results import ROOT, write_result
from benchmarks.unpack import unpack
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.screening import StudyScreener
from osteo_daemon.settings import Settings

ACRIN: Final = "acrin_flt_breast_001_abdomen"
TORSO: Final = "totalsegmentator_example"
OTHERS: Final = ("cptac_pda_C3L-00189_lungbases", "dcm_qa_ct_ge_tilt_head", "totalsegmentator_dicom_j2k")

REFERENCE_HU: Final[dict[str, dict[str, float]]] = {
    ACRIN: {"T12": 177, "L1": 178, "L2": 177, "L3": 159, "L4": 150, "L5": 167},
    TORSO: {"T12": 103, "L1": 96, "L2": 111, "L3": 107, "L4": 107, "L5": 112},
}
"""From the data's README: mean of one reader's ellipsoid (ACRIN); median of the body's mask eroded by 6 mm (torso)."""


def levels(name: str, volume: CtVolume, places: list[Place], localizer: SpineLocalizer) -> Iterator[dict[str, Any]]:
    """One row for each reference level: what lies nearest to it, how it is named and what it measures."""
    found = localizer(volume).vertebrae
    for level, centre, _ in places:
        nearest = min(found, key=lambda v, c=centre: float(np.linalg.norm(v.centre_lps_mm - c)))  # type: ignore[misc]
        measured = measure(volume, nearest.body_region, nearest.axes_lps).attenuation
        yield {
            "scan": name,
            "level": level,
            "named": str(nearest.level),
            "name_certain": nearest.level_certain,
            "centre_error_mm": round(float(np.linalg.norm(nearest.centre_lps_mm - centre)), 1),
            "median_hu": None if measured is None else measured.median,
            "reference_hu": REFERENCE_HU[name][level],
        }


def study(screener: StudyScreener, name: str, folder: Path) -> dict[str, Any]:
    """How the screening of one study ends."""
    result = screener.screen(path for path in sorted(folder.rglob("*")) if path.is_file()).result
    flags = {flag.code for flag in result.quality_flags}
    return {
        "study": name,
        "outcome": result.outcome.value,
        "exclusion": None if result.exclusion is None else str(result.exclusion.code),
        "category": None if result.category is None else result.category.value,
        "flags": ", ".join(sorted(flags | {f.code for v in result.vertebrae for f in v.quality_flags})),
    }


def main() -> None:
    """Screen and write ``docs/results/localizer-real-ct.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the scans without a whole lumbar spine")
    quick = parser.parse_args().quick
    data = Path(os.environ.get("OSTEO_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not data.is_dir():
        sys.exit("skipped: no real CT (set OSTEO_TEST_DATA)" if not quick else 0)
    bundle = find_bundle("spine-localizer")
    screener = StudyScreener.load(Settings())
    rows: list[dict[str, Any]] = []
    studies = []
    with tempfile.TemporaryDirectory() as name:
        unpacked = Path(name)
        for archive in data.glob("*.tar.xz"):
            unpack(archive, unpacked)
        for scan in OTHERS if quick else (ACRIN, *OTHERS):
            folder = unpacked / scan if (unpacked / scan).is_dir() else data / scan
            studies.append(study(screener, scan, folder))
        if not quick:
            localizer = SpineLocalizer.from_bundle(bundle)
            rows += levels(ACRIN, *acrin(unpacked / ACRIN), localizer)
            rows += levels(TORSO, *torso(data / TORSO), localizer)
    figures = {
        "bundle": f"{bundle.name} {bundle.version}",
        "weights_sha256": bundle.files["models/model.safetensors"],
        "levels": rows,
        "studies": studies,
    }
    print(write_result("localizer-real-ct", figures, quick=quick))


if __name__ == "__main__":
    main()
