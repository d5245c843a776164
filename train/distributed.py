"""Training by several processes at once: each takes its share of every batch, gradients are averaged.

    torchrun --nproc_per_node 2 -m train.multitask --data runs/cohort --out runs/multitask

Started by torchrun every process finds its place in the environment; started alone there is one process and nothing
changes. With batches whose samples all carry labels the result is that of one process with the whole batch; losses
averaged over labelled samples alone weigh each process's share equally.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from train.data import Batch


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def primary(self) -> bool:
        """True for the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This process's samples of a batch: every ``count``-th."""
        if self.count == 1:
            return batch
        return Batch(*(getattr(batch, name)[self.rank :: self.count] for name in Batch.__dataclass_fields__))

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with averaged gradients; itself when there is one process."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of a module that is not wrapped."""
        if self.count == 1:
            return
        for parameter in module.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()

    def check_batch(self, batch_size: int) -> None:
        """Raises:
        ValueError: a batch can't be shared evenly.
        """
        if batch_size % self.count:
            raise ValueError(f"a batch of {batch_size} can't be shared by {self.count} processes evenly")


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place and device; leaves the group at the end."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), count), device
    finally:
        distributed.destroy_process_group()
