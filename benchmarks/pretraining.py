"""Which self-supervision teaches an encoder most: linear probes after each mechanism, and after none.

    python -m benchmarks.pretraining --data runs/cohort-small

All start from the same weights, see the same number of vertebrae and are judged on the same test patients; intervals
are bootstrapped over those patients. Resumes: what was trained is not trained again.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import write_result
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import VertebraEncoder
from train.cohort import CohortConfig, make_cohort
from train.data import VoiSet, open_set
from train.pool import Pool, build_pool
from train.pretrain import PretrainConfig, pretrain
from train.probe import linear_probe, load_encoder

MECHANISMS = ("a", "c", "b", "ac", "abc")
EPOCHS = 6
REPEATS = 500


def probes(
    data: VoiSet, pool: Pool, network: MoEConfig, runs: Path, config: PretrainConfig, mechanisms: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Scores by mechanism, ``none`` first: the same encoder before any step."""
    torch.manual_seed(config.seed)
    device = torch.device("cpu")
    found = {"none": linear_probe(VertebraEncoder(network), data, network, device, repeats=REPEATS)}
    for mechanism in mechanisms:
        folder = runs / f"{mechanism}-seed{config.seed}"
        chosen = replace(config, mechanism=mechanism)
        if not (folder / "summary.json").exists():
            pretrain(data, folder, chosen, network, device, pool, probe=False)
        encoder = load_encoder(folder / "encoder.pt", network)
        found[mechanism] = linear_probe(encoder, data, network, device, repeats=REPEATS)
    return found


def main() -> None:
    """Write ``docs/results/pretraining.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a cohort of 24 patients, one epoch of two mechanisms")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--runs", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--mechanisms", nargs="+", default=list(MECHANISMS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        config = PretrainConfig(epochs=given.epochs)
        folder, runs, mechanisms = given.data, given.runs, tuple(given.mechanisms)
        if given.quick:
            folder, runs, mechanisms = Path(temporary) / "cohort", Path(temporary) / "runs", ("a", "c")
            make_cohort(CohortConfig(patients=24, levels=("L1", "L3")), folder, 1)
            config = PretrainConfig(epochs=1, batch_size=8)
        data = open_set(folder)
        shape = tuple(int(n) for n in data.config["voi_shape"])
        network = MoEConfig(
            voi_shape=(shape[0], shape[1], shape[2]), voi_spacing_mm=float(data.config["voi_spacing_mm"])
        )
        pool = build_pool([folder], runs / "pool", network)
        scores = probes(data, pool, network, runs, config, mechanisms)
    test = [i for i in data.indices("test") if data.rows[i].sbmd_g_cm2 is not None]
    figures: dict[str, Any] = {
        "cohort_sha256": data.config["sha256"],
        "pool_version": pool.version,
        "pool_features": len(pool.features),
        "vertebrae_trained_on": len(pool.rows),
        "epochs": config.epochs,
        "test_vertebrae": len(test),
        "test_patients": len(np.unique([data.rows[i].patient for i in test])),
        "probe_after": {name: {key: round(v, 4) for key, v in score.items()} for name, score in scores.items()},
    }
    print(write_result("pretraining", figures, quick=given.quick))


if __name__ == "__main__":
    main()
