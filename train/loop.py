"""The epoch loop: progress bars, checkpoints that resume exactly, the best epoch by the validation loss."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from train.board import Board
from train.data import Augmentation, Batch, VoiSet, batches, epoch_rows
from train.distributed import ALONE, Ranks
from train.losses import LossWeights, TaskVariances, total_loss
from train.optim import MovingAverage, adamw, learning_rate_at


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How to train.

    Attributes:
        epochs: at most this many.
        batch_size: vertebrae in a step; with twins, half as many of the data set's, each twice.
        learning_rate: peak of AdamW's.
        weight_decay: AdamW's.
        warmup_share: of all steps.
        ema_decay: of the moving average that is evaluated and exported.
        clip_norm: largest norm of the gradient.
        hide_level: share of samples whose level is withheld from the network.
        patience: stop after this many epochs without a better validation loss.
        seed: of everything random.
        bfloat16: autocast of the convolutions.
        labelled_share: of an epoch's vertebrae have a reading (`train.data.epoch_rows`); 0 takes every training row
            once.
        keep: "best" epoch by the validation loss, or the "last" one, for runs of one length that shall be compared.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup_share: float = 0.05
    ema_decay: float = 0.99
    clip_norm: float = 1.0
    hide_level: float = 0.15
    patience: int = 10
    seed: int = 0
    bfloat16: bool = False
    labelled_share: float = 0.0
    keep: Literal["best", "last"] = "best"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A finished or unfinished training: the averaged network of the best epoch and what it was made with."""

    network: MultitaskMoE
    devices: list[str]
    settings: dict[str, Any]
    epoch: int


def load_run(folder: Path) -> Run:
    """Open a run's best weights.

    Raises:
        FileNotFoundError: it has not finished an epoch.
    """
    settings = json.loads((folder / "settings.json").read_text())
    network = MultitaskMoE(MoEConfig.from_json(settings["network"]))
    saved = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(saved["network"])
    return Run(network.eval(), list(settings["devices"]), settings, int(saved["epoch"]))


def seed_everything(seed: int) -> None:
    """Seed torch; numpy generators are made from seeds where they are used."""
    torch.manual_seed(seed)


def train(
    network: MultitaskMoE,
    data: VoiSet,
    folder: Path,
    config: LoopConfig,
    weights: LossWeights,
    augmentation: Augmentation,
    devices: list[str],
    validate: Callable[[nn.Module], dict[str, float]],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train, or go on from ``folder/last.pt``; returns the history. The best weights lie in ``folder/best.pt``.

    Args:
        validate: gives a dictionary with ``loss`` for the averaged network.
        ranks: this process's place; every process validates alike, the primary one writes.

    Raises:
        ValueError: the processes can't share a batch evenly.
    """
    twins = weights.twin > 0
    rows_of_batch = config.batch_size // 2 if twins else config.batch_size
    ranks.check_batch(rows_of_batch)
    folder.mkdir(parents=True, exist_ok=True)
    indices = epoch_rows(data, config.labelled_share, config.seed, 0)
    steps_per_epoch = max(1, len(indices) // rows_of_batch)
    steps = config.epochs * steps_per_epoch
    classes = np.array([data.rows[i].diagnosis for i in indices if data.rows[i].diagnosis >= 0])
    prior = torch.tensor(np.bincount(classes, minlength=3) / max(1, len(classes)), dtype=torch.float32, device=device)
    variances = TaskVariances().to(device) if weights.learned else None
    optimiser = adamw(network, config.learning_rate, config.weight_decay)
    if variances is not None:
        optimiser.add_param_group({"params": list(variances.parameters()), "weight_decay": 0.0})
    average = MovingAverage(network, config.ema_decay)
    state: dict[str, Any] = {"epoch": 0, "step": 0, "best": float("inf"), "since_best": 0, "seconds": 0.0}
    history: list[dict[str, float]] = []
    last = folder / "last.pt"
    saved: dict[str, Any] | None = None
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        average.load_state_dict(saved["average"])
        state, history = saved["state"], saved["history"]
        if variances is not None:
            variances.load_state_dict(saved["variances"])
    shadow = MultitaskMoE(network.config).to(device)
    if saved is not None:
        # last, because making a network draws random numbers too
        torch.set_rng_state(saved["rng"].cpu())
    if not ranks.primary:
        # other dropout than the primary's; nothing else draws from torch while it trains
        torch.manual_seed(config.seed + 1_000_003 * ranks.rank + state["step"])
    forward = ranks.wrap(network, device)

    bar = tqdm(
        total=steps, initial=state["step"], unit="step", desc="train", mininterval=2.0, disable=not ranks.primary
    )
    board = Board(folder, history) if ranks.primary else None
    while state["epoch"] < config.epochs and state["since_best"] < config.patience:
        started = time.monotonic()
        network.train()
        sums: dict[str, float] = {}
        count = 0
        for batch in batches(
            data,
            epoch_rows(data, config.labelled_share, config.seed, state["epoch"]),
            network.config,
            devices,
            config.batch_size,
            augmentation=augmentation,
            seed=config.seed,
            epoch=state["epoch"],
            hide_level=config.hide_level,
            keep_last=len(indices) < rows_of_batch,
            twins=twins,
        ):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(
                    state["step"], steps, config.learning_rate, max(1, int(config.warmup_share * steps))
                )
            moved = to_device(ranks.share(batch), device)
            parts = _step(
                network, forward, optimiser, moved, config, weights, prior, state["step"] / steps, variances, ranks
            )
            average.update(network)
            state["step"] += 1
            count += 1
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            bar.update()
            bar.set_postfix({name: f"{value / count:.3f}" for name, value in sums.items()}, refresh=False)
        shadow.load_state_dict(average.state)
        measured = validate(shadow.eval())
        state["epoch"] += 1
        state["seconds"] += time.monotonic() - started
        history.append(
            {"epoch": state["epoch"], **{f"train_{k}": v / max(1, count) for k, v in sums.items()}, **measured}
        )
        better = measured["loss"] < state["best"]
        state["best"] = min(state["best"], measured["loss"])
        state["since_best"] = 0 if better else state["since_best"] + 1
        if not ranks.primary:
            ranks.wait()
            continue
        if better or config.keep == "last":
            _save({"network": average.state, "epoch": state["epoch"]}, folder / "best.pt")
        _save(
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.state_dict(),
                "state": state,
                "history": history,
                "rng": torch.get_rng_state(),
                **({} if variances is None else {"variances": variances.state_dict()}),
            },
            last,
        )
        (folder / "history.json").write_text(json.dumps(history, indent=1))
        if board is not None:
            board.add(int(state["epoch"]), history[-1])
        tqdm.write(" ".join(f"{k}={v:.4g}" for k, v in history[-1].items()))
        ranks.wait()
    bar.close()
    if board is not None:
        board.close()
    return {"history": history, **state}


def _step(
    network: MultitaskMoE,
    forward: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    config: LoopConfig,
    weights: LossWeights,
    prior: Tensor,
    progress: float,
    variances: TaskVariances | None,
    ranks: Ranks,
) -> dict[str, float]:
    with torch.autocast(batch.hu.device.type, dtype=torch.bfloat16, enabled=config.bfloat16):
        out = forward(batch.hu, batch.given_level)
    loss, parts = total_loss(
        out,
        batch,
        weights,
        prior=prior,
        bmd_scale=network.config.bmd_scale_g_cm2,
        device_count=network.config.device_count,
        progress=progress,
        variances=variances,
        twins=weights.twin > 0,
    )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if variances is not None:
        ranks.average_gradients(variances)
    nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
    optimiser.step()
    return {"loss": float(loss.detach()), **parts}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on ``device``."""
    return Batch(*(getattr(batch, name).to(device) for name in Batch.__dataclass_fields__))


def _save(values: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".part")
    torch.save(values, temporary)
    temporary.replace(path)
