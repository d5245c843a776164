"""The shipped osteo-moe from nothing: ``python -m train.recipe --version X.Y.Z``.

Renders the cohort of ``train/cohort.json``, puts it on the network's grid, pretrains the encoder on its training scans,
trains on all of its training patients with a reading each, judges and exports. Every stage resumes; a finished one is
skipped. Rendering takes some 15 minutes on two free cores, the rest less; the model card states what training took.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Final

import torch

from osteo_daemon.network.config import MoEConfig
from train.cohort import CohortConfig, make_cohort
from train.data import Augmentation, open_set
from train.export import NAME, export_run
from train.loop import LoopConfig
from train.losses import LossWeights
from train.multitask import run_training
from train.pool import build_pool
from train.pretrain import PretrainConfig, pretrain
from train.readings import Densitometry
from train.shrink import NETWORK_SHAPE, SPACING_MM, shrink_cohort

NETWORK: Final = MoEConfig(
    voi_shape=NETWORK_SHAPE, voi_spacing_mm=SPACING_MM, grain_channel="gates", bmd_correction_g_cm2=0.06
)
"""Half a T-score is what a network of virtual patients may add to or take from what the HU say."""
PRETRAIN: Final = PretrainConfig(mechanism="a", epochs=3)
LOOP: Final = LoopConfig(epochs=24, batch_size=32, learning_rate=2e-3, patience=1000, keep="last", ema_decay=0.998)
WEIGHTS: Final = LossWeights(logit_adjustment=0.65, twin=8.0)
AUGMENTATION: Final = Augmentation(shift_voxels=2, coarse=0.5, density=0.6, surround=0.5, size=0.6, rename=0.3)
DENSITOMETRY: Final = Densitometry(labelled_share=1.0)


def make_bundle(rendered: Path, runs: Path, out: Path, version: str, licence: str, workers: int, device: str) -> None:
    """Every stage in order, each where it was left.

    Args:
        rendered: folder of the cohort as rendered.
        runs: folder for the cohort on the network's grid, the encoder and the training.
        out: folder of the bundle.
    """
    started = time.monotonic()
    make_cohort(CohortConfig.read(), rendered, workers)
    cohort = runs / "cohort"
    shrink_cohort(rendered, cohort, workers)
    target = torch.device(device)
    encoder = runs / "encoder"
    if not (encoder / "summary.json").exists():
        pool = build_pool([cohort], runs / "pool", NETWORK)
        pretrain(open_set(cohort), encoder, PRETRAIN, NETWORK, target, pool, probe=False)
    run_training(
        cohort,
        runs / "multitask",
        LOOP,
        NETWORK,
        WEIGHTS,
        AUGMENTATION,
        target,
        encoder / "encoder.pt",
        DENSITOMETRY,
    )
    bundle = export_run(runs / "multitask", out, version, licence)
    minutes = (time.monotonic() - started) / 60
    print(f"{bundle.path}: {bundle.name} {bundle.version} sha256 {bundle.sha256}; this call took {minutes:.0f} min")


def main() -> None:
    """Command line of ``python -m train.recipe``."""
    parser = argparse.ArgumentParser(description="the shipped bundle from nothing")
    parser.add_argument("--version", required=True)
    parser.add_argument("--cohort", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bundle"))
    parser.add_argument("--out", type=Path, default=Path("model_zoo") / NAME)
    parser.add_argument("--licence", type=Path, default=Path("model_zoo") / NAME / "LICENSE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    text = given.licence.read_text()
    make_bundle(given.cohort, given.runs, given.out, given.version, text, given.workers, given.device)


if __name__ == "__main__":
    main()
