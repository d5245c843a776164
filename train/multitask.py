"""Train the multitask mixture-of-experts network on a cohort.

    python -m train.multitask --data runs/cohort --out runs/multitask

Resumes when called again. ``best.pt`` holds the averaged weights of the best epoch, ``settings.json`` all that was set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from train.data import Augmentation, VoiSet, batches, open_set
from train.distributed import ALONE, Ranks, joined
from train.evaluate import run_network
from train.loop import LoopConfig, load_run, seed_everything, to_device, train
from train.losses import LossWeights, total_loss
from train.readings import Densitometry, remeasure
from train.truth import MAKERS


def fit_statistics(network: MultitaskMoE, data: VoiSet) -> None:
    """Standardise the side channels on the training rows."""
    channels = [found for found in (network.hu_statistics, network.grain_statistics) if found is not None]
    raw: list[list[torch.Tensor]] = [[] for _ in channels]
    for batch in batches(data, data.indices("train"), network.config, list(MAKERS), 64) if channels else ():
        for values, channel in zip(raw, channels, strict=True):
            values.append(channel.raw(batch.hu))
    for values, channel in zip(raw, channels, strict=True):
        channel.fit(torch.cat(values))


def validator(data: VoiSet, devices: list[str], weights: LossWeights, device: torch.device) -> Any:
    """A function that gives the validation loss of a network, with BMD and level errors for the log."""
    indices = data.indices("val")

    def validate(network: nn.Module) -> dict[str, float]:
        if not isinstance(network, MultitaskMoE):
            raise TypeError("need a MultitaskMoE")
        total, count, sums = 0.0, 0, {"diagnosis": 0.0, "bmd": 0.0, "level": 0.0}
        config = network.config
        with torch.inference_mode():
            for batch in batches(data, indices, config, devices, 32):
                moved = to_device(batch, device)
                loss, parts = total_loss(
                    network(moved.hu, moved.level),
                    moved,
                    weights,
                    prior=torch.full((3,), 1 / 3, device=device),
                    bmd_scale=config.bmd_scale_g_cm2,
                    device_count=config.device_count,
                    progress=1.0,
                )
                size = len(batch.index)
                total, count = total + float(loss) * size, count + size
                for name in sums:
                    sums[name] += parts[name] * size
        return {"loss": total / count, **{f"val_{name}": value / count for name, value in sums.items()}}

    return validate


def run_training(
    data_folder: Path,
    folder: Path,
    loop: LoopConfig,
    network_config: MoEConfig,
    weights: LossWeights,
    augmentation: Augmentation,
    device: torch.device,
    encoder: Path | None = None,
    densitometry: Densitometry | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train from scratch, from a pretrained ``encoder`` (`train.pretrain`), or go on.

    With ``densitometry`` the readings are drawn anew (`train.readings`), else those of the data set are used.

    Writes settings.json, history.json, best.pt and last.pt into ``folder``.

    Raises:
        ValueError: the folder holds a run with other settings, or a batch can't be shared evenly.
    """
    data = open_set(data_folder)
    if densitometry is not None:
        data = remeasure(data, densitometry)
    devices = [str(maker) for maker in MAKERS[: network_config.device_count]]
    settings = {
        "data": str(data_folder),
        "cohort_sha256": data.config["sha256"],
        "devices": devices,
        "network": network_config.to_json(),
        "loop": asdict(loop),
        "weights": asdict(weights),
        "augmentation": asdict(augmentation),
        "densitometry": None if densitometry is None else asdict(densitometry),
        "encoder_sha256": None if encoder is None else hashlib.sha256(encoder.read_bytes()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"{folder} holds a run with other settings; remove it or choose another folder")
    ranks.wait()  # all have compared before one writes
    if ranks.primary:
        stamp.write_text(json.dumps(settings, indent=1))
    seed_everything(loop.seed)
    network = MultitaskMoE(network_config)
    if encoder is not None:
        network.encoder.load_state_dict(torch.load(encoder, map_location="cpu", weights_only=True)["encoder"])
    fit_statistics(network, data)
    started = time.monotonic()
    result = train(
        network.to(device),
        data,
        folder,
        loop,
        weights,
        augmentation,
        devices,
        validator(data, devices, weights, device),
        device,
        ranks,
    )
    raw = run_network(load_run(folder).network, data, data.indices("val", labelled=True), devices, quiet=True)
    target = np.array([data.rows[i].target_sbmd_g_cm2 for i in raw.index], dtype=np.float64)
    summary = {
        "epochs": result["epoch"],
        "training_seconds": result["seconds"],
        "wall_seconds_of_this_call": time.monotonic() - started,
        "best_validation_loss": result["best"],
        "validation_mae_g_cm2": float(np.abs(raw.bmd - target).mean()),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "processes": ranks.count,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    if ranks.primary:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main() -> None:
    """Command line of ``python -m train.multitask``; every field of `LoopConfig` is an option."""
    parser = argparse.ArgumentParser(description="train the multitask mixture-of-experts network")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--out", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=MoEConfig().expert_count)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--encoder", type=Path, help="encoder.pt of train.pretrain")
    defaults = LoopConfig()
    for field in fields(LoopConfig):
        value = getattr(defaults, field.name)
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    given = vars(parser.parse_args())
    loop = LoopConfig(**{field.name: given[field.name] for field in fields(LoopConfig)})
    experts = given["experts"]
    network = MoEConfig(expert_count=experts, top_k=given["top_k"], device_count=min(len(MAKERS), experts))
    with joined(torch.device(given["device"])) as (ranks, device):
        summary = run_training(
            given["data"],
            given["out"],
            loop,
            network,
            LossWeights(),
            Augmentation(),
            device,
            given["encoder"],
            ranks=ranks,
        )
        if ranks.primary:
            print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
