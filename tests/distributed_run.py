"""What torchrun starts in tests: a training of the easy data set, given its folder and the run's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.easy_vois import LOOP, NETWORK
from train.data import Augmentation
from train.distributed import joined
from train.losses import LossWeights
from train.multitask import run_training

# everything that a share of a batch would see otherwise than the whole of it is off: balance and dropout
WEIGHTS = LossWeights(balance=0.0)
STILL = replace(NETWORK, dropout=0.0)


def main(data: Path, folder: Path) -> None:
    """Train in every process that torchrun started, or in this one."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as (ranks, device):
        loop = replace(LOOP, epochs=2, learning_rate=1e-3)
        run_training(data, folder, loop, STILL, WEIGHTS, Augmentation(), device, ranks=ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
