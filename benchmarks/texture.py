"""Texture features of 64 vertebra VOIs: this product's batch beside PyRadiomics, on the same CPU in the same run.

    python -m benchmarks.texture --pyradiomics PATH/bin/python

PyRadiomics needs an environment of its own (tests/golden/texture/make_goldens.py says how); without ``--pyradiomics``
only our own time is measured. Both compute the same six families on the same voxels at the same bin width, each in one
thread, and are timed in CPU seconds, so that other work on the machine counts for neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import ROOT, write_result
from osteo_daemon.imaging.first_order import first_order_features
from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_voi

BIN_WIDTH_HU = 25.0
LOW_HU, LEVELS = -200.0, 40
ROUNDS = 7


def vois(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 24, 24, 28) HU of vertebral bodies at 1 mm, eight noises of each body, and masks."""
    generator = np.random.default_rng(5)
    bodies = [
        render_voi(VirtualPatient(seed=k), "L2", Scanner(seed=k), size=(24, 24, 28)).voxels
        for k in range(-(-count // 8))
    ]
    hu = np.stack([bodies[k // 8] + generator.normal(0, 10, bodies[0].shape) for k in range(count)])
    hu = np.clip(hu, LOW_HU, LOW_HU + LEVELS * BIN_WIDTH_HU - 1).astype(np.float32)
    return hu, np.ones(hu.shape, dtype=bool)


def ours(hu: torch.Tensor, mask: torch.Tensor) -> float:
    """CPU seconds for each VOI of one batch."""
    start = time.process_time()
    texture_features(discretise(hu, mask, LOW_HU, BIN_WIDTH_HU, LEVELS), LEVELS)
    first_order_features(hu, mask)
    return (time.process_time() - start) / len(hu)


def theirs(python: Path, hu: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """What PyRadiomics in its own interpreter says of itself after one round: version and CPU seconds for each VOI."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "vois.npz", hu=hu, mask=mask)
        script = ROOT / "tests" / "golden" / "texture" / "make_goldens.py"
        command = [python, script, "--seconds", "1", Path(folder) / "vois.npz"]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    """Write ``docs/results/texture.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 VOIs, one round")
    parser.add_argument("--pyradiomics", type=Path, help="interpreter of an environment with PyRadiomics")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hu, mask = vois(8 if arguments.quick else 64)
    batch = torch.from_numpy(hu), torch.from_numpy(mask)
    ours(*batch)  # the first call loads libraries
    batched, singly, pyradiomics = [], [], []
    version = None
    for _ in range(1 if arguments.quick else ROUNDS):
        # taking turns, so that caches and clock are alike
        batched.append(ours(*batch))
        singly.append(statistics.mean(ours(h[None], m[None]) for h, m in zip(*batch, strict=True)))
        if arguments.pyradiomics:
            said = theirs(arguments.pyradiomics, hu, mask)
            pyradiomics.append(said["seconds_each"])
            version = said["version"]
    figures = {
        "vois": len(hu),
        "voxels_each": int(hu[0].size),
        "threads": torch.get_num_threads(),
        "rounds": len(batched),
        "ours_batched_cpu_s_each": statistics.median(batched),
        "ours_one_by_one_cpu_s_each": statistics.median(singly),
    }
    if arguments.pyradiomics:
        figures |= {
            "pyradiomics_version": version,
            "pyradiomics_cpu_s_each": statistics.median(pyradiomics),
            "times_faster_batched": statistics.median(p / o for p, o in zip(pyradiomics, batched, strict=True)),
            "times_faster_one_by_one": statistics.median(p / o for p, o in zip(pyradiomics, singly, strict=True)),
        }
    write_result("texture", figures, command="python -m benchmarks.texture --pyradiomics PYTHON", quick=arguments.quick)


if __name__ == "__main__":
    main()
