"""The network channel: time for six vertebrae, and what it says of real ones: ``python -m benchmarks.inference``.

The real scans have no DXA: only order, monotony and stability can be judged there. Centres are the reference values
that come with the data, not the localiser's. ``--bundle DIR`` judges another bundle than the shipped one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from benchmarks.results import ROOT, write_result
from benchmarks.unpack import unpack
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.preprocess import extract_voi
from osteo_daemon.imaging.selection import select_series
from osteo_daemon.imaging.slices import ct_slices, read_headers
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import find_bundle, read_bundle
from osteo_daemon.inference.level_sequence import read_sequence
from osteo_daemon.inference.vertebra_network import Prediction, VertebraNetwork
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import HU_STATISTICS, HuStatistics
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study

Vec = npt.NDArray[np.float64]
Place = tuple[str, Vec, Vec]

LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")
ACRIN_INDEX = {
    "T12": (75, 316, 241),
    "L1": (67, 313, 241),
    "L2": (59, 309, 241),
    "L3": (51, 307, 241),
    "L4": (42, 306, 241),
    "L5": (34, 310, 241),
}
"""Reference centres of the series: slice from caudal, row, column."""
TORSO_LABELS = {"T12": 32, "L1": 31, "L2": 30, "L3": 29, "L4": 28, "L5": 27}
TRABECULAR_RADII_MM = (9.0, 11.0, 16.0)
"""Half axes (caudal, posterior, left) of the region that gets HU added."""


def places_of(centres: dict[str, Vec]) -> list[Place]:
    """Axes from the line through the neighbouring centres, upright in the frontal plane."""
    found = []
    for i, level in enumerate(LEVELS):
        above, below = centres[LEVELS[max(0, i - 1)]], centres[LEVELS[min(len(LEVELS) - 1, i + 1)]]
        caudal = (below - above) / np.linalg.norm(below - above)
        posterior = np.array([0.0, 1.0, 0.0]) - caudal[1] * caudal
        posterior /= np.linalg.norm(posterior)
        found.append((level, centres[level], np.stack([caudal, posterior, np.cross(caudal, posterior)])))
    return found


def acrin(folder: Path) -> tuple[CtVolume, list[Place]]:
    """The reference series at its reference centres."""
    headers, _ = read_headers(sorted(path for path in folder.rglob("*") if path.is_file()))
    candidates, _ = select_series(ct_slices(headers))
    volume = read_volume(candidates[0].stack)
    last = volume.voxels.shape[0] - 1
    upwards = volume.affine[2, 0] > 0
    index = {k: np.array([d if upwards else last - d, h, w], dtype=float) for k, (d, h, w) in ACRIN_INDEX.items()}
    return volume, places_of({level: volume.to_lps(point) for level, point in index.items()})


def torso(folder: Path) -> tuple[CtVolume, list[Place]]:
    """The labelled torso at the centroids of its vertebral bodies."""
    import nibabel as nib

    def read(name: str) -> tuple[npt.NDArray[np.float32], Vec]:
        image = nib.load(folder / f"{name}.nii.gz")  # type: ignore[attr-defined]
        return np.asarray(image.dataobj, dtype=np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine

    hu, affine = read("example_ct")
    labels, bodies = read("totalseg")[0], read("totalseg_vertebrae_body")[0]
    volume = CtVolume(hu, affine)
    centres = {k: np.argwhere((labels == v) & (bodies == 1)).mean(axis=0) for k, v in TORSO_LABELS.items()}
    return volume, places_of({level: volume.to_lps(point) for level, point in centres.items()})


def with_added_hu(volume: CtVolume, places: list[Place], added: float) -> CtVolume:
    """HU added inside an ellipsoid of every vertebral body."""
    voxels = volume.voxels.copy()
    for _, centre, axes in places:
        middle = volume.to_index(centre)
        reach = 18.0 / np.array(volume.spacing_mm) + 1
        low = np.maximum(np.floor(middle - reach), 0).astype(int)
        high = np.minimum(np.ceil(middle + reach) + 1, volume.voxels.shape).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        index = np.stack(
            np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), axis=-1
        )
        local = (volume.to_lps(index) - centre) @ axes.T
        voxels[box][(np.square(local / TRABECULAR_RADII_MM).sum(axis=-1)) <= 1.0] += np.float32(added)
    return CtVolume(voxels, volume.affine)


def coarser(volume: CtVolume, target_mm: float) -> CtVolume:
    """Resampled to at least ``target_mm`` along every axis that is finer, after the matching smoothing."""
    factor = np.maximum(1.0, target_mm / np.array(volume.spacing_mm))
    smooth = ndimage.gaussian_filter(volume.voxels, 0.5 * np.sqrt(factor**2 - 1.0), mode="nearest")
    shape = tuple(int((n - 1) / f) + 1 for n, f in zip(volume.voxels.shape, factor, strict=True))
    voxels = ndimage.affine_transform(smooth, factor, output_shape=shape, order=1, mode="nearest")
    return CtVolume(voxels.astype(np.float32), volume.affine @ np.diag([*factor, 1.0]))


def values(predictions: list[Prediction]) -> dict[str, float]:
    """BMD by level, where it is given."""
    return {p.level: p.bmd_g_cm2 for p in predictions if p.bmd_g_cm2 is not None}


def likeliest(prediction: Prediction) -> str:
    """The level that the image alone suggests most."""
    return max(prediction.level_probabilities, key=lambda name: prediction.level_probabilities[name])


def judge_scan(network: VertebraNetwork, volume: CtVolume, places: list[Place]) -> dict[str, Any]:
    """What the network says of one real scan, and how it moves when the scan is changed."""
    statistics_of = HuStatistics(MoEConfig.from_json(network.bundle.network))
    hu = torch.from_numpy(np.stack([extract_voi(volume, c, a, network.voi).hu for _, c, a in places]))
    core = statistics_of.raw(hu)[:, HU_STATISTICS.index("core_mean")].tolist()
    found = network.predict(volume, places)
    base = values(found)
    sequence = read_sequence([p.level for p in found], [p.level_probabilities for p in found], LEVELS)
    added = {
        hu_added: values(network.predict(with_added_hu(volume, places, hu_added), places)) for hu_added in (20, 40, 60)
    }
    steps = [base, *added.values()]
    shifts = {
        f"{mm:g} mm": {
            k: round(v - base[k], 4) for k, v in values(network.predict(coarser(volume, mm), places)).items()
        }
        for mm in (2.5, 5.0)
    }
    return {
        "vertebrae": [
            {
                "level": p.level,
                "core_hu": round(hu_mean, 1),
                "bmd_g_cm2": None if p.bmd_g_cm2 is None else round(p.bmd_g_cm2, 3),
                "t_score": None if p.t_score is None else round(p.t_score, 2),
                "osteoporosis": None
                if p.class_probabilities is None
                else round(p.class_probabilities["osteoporosis"], 3),
                "level_predicted": likeliest(p),
                "gate_entropy": round(p.gate_entropy, 3),
            }
            for p, hu_mean in zip(found, core, strict=True)
        ],
        "level_right": sum(likeliest(p) == p.level for p in found),
        "sequence_shift": None if sequence is None else sequence.shift,
        "sequence_margin": None if sequence is None else round(sequence.margin, 2),
        "mean_bmd_l1_l4_g_cm2": round(statistics.mean(base.values()), 4),
        "mean_bmd_with_added_hu_g_cm2": {str(k): round(statistics.mean(v.values()), 4) for k, v in added.items()},
        "monotonic": all(b[level] > a[level] for a, b in itertools.pairwise(steps) for level in base),
        "slope_g_cm2_per_hu": round((statistics.mean(added[60].values()) - statistics.mean(base.values())) / 60, 5),
        "shift_g_cm2_when_coarser": shifts,
    }


def timing(network: VertebraNetwork, repeats: int) -> dict[str, Any]:
    """Seconds for six vertebrae of a virtual patient, resampling included."""
    study = render_study(VirtualPatient(seed=1), coarse_scanner(1.5), top="T12", bottom="L5")
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    turn = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])
    places = [(v.level, v.centre_lps_mm, turn @ v.axes.T) for v in study.vertebrae if v.level in LEVELS]
    seconds = []
    for _ in range(repeats + 1):
        start, cpu = time.perf_counter(), time.process_time()
        network.predict(volume, places)
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    warm = seconds[1:]
    return {
        "vertebrae": len(places),
        "threads": torch.get_num_threads(),
        "first_s": round(seconds[0][0], 3),
        "median_s": round(statistics.median(s for s, _ in warm), 3),
        "median_cpu_s": round(statistics.median(c for _, c in warm), 3),
        "runs": repeats,
    }


def main() -> None:
    """Command line; without real CT files only the time is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three runs, no real scans")
    parser.add_argument("--bundle", type=Path, help="folder of the bundle to judge")
    given = parser.parse_args()
    bundle = read_bundle(given.bundle) if given.bundle else find_bundle("osteo-moe")
    start = time.perf_counter()
    network = VertebraNetwork.from_bundle(bundle)
    figures: dict[str, Any] = {
        "bundle": f"{bundle.name} {bundle.version}",
        "sha256": bundle.sha256,
        "load_s": round(time.perf_counter() - start, 2),
        "time": timing(network, 3 if given.quick else 20),
    }
    data = Path(os.environ.get("OSTEO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if data.is_dir() and not given.quick:
        with tempfile.TemporaryDirectory() as unpacked:
            unpack(data / "acrin_flt_breast_001_abdomen.tar.xz", Path(unpacked))
            scans = {
                "acrin_flt_breast_001": judge_scan(network, *acrin(Path(unpacked))),
                "totalsegmentator_example": judge_scan(network, *torso(data / "totalsegmentator_example")),
            }
        figures["real_scans"] = scans
        denser = (
            scans["acrin_flt_breast_001"]["mean_bmd_l1_l4_g_cm2"]
            > scans["totalsegmentator_example"]["mean_bmd_l1_l4_g_cm2"]
        )
        figures["denser_scan_has_more_bmd"] = denser
    print(write_result("network-channel", figures, quick=given.quick))


if __name__ == "__main__":
    main()
