"""Curves of a training for TensorBoard: ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Board:
    """Writes what an epoch measured under ``folder/tensorboard``.

    Args:
        folder: of the run.
        history: of the epochs that are finished. They are written anew, because a run may have been stopped between its
            checkpoint and its curves; what an earlier call wrote is dropped.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, float]]) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=1)
        for epoch, measured in enumerate(history, start=1):
            self.add(epoch, measured)

    def add(self, epoch: int, measured: Mapping[str, float]) -> None:
        """Add the numbers of one epoch (counted from 1) and hand them to the disk."""
        for name, value in measured.items():
            if name == "epoch":
                continue
            part, _, of = name.partition("_")
            # train and val of one loss lie in one panel
            tag = f"{of}/{part}" if part in ("train", "val") and of else name
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Nothing more comes."""
        self._writer.close()
