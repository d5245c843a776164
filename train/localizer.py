"""Train the spine localizer: ``python -m train.localizer --data DIR --out runs/localizer``.

Resumes by itself from ``OUT/checkpoint.pt``; ``--phantoms DIR`` (a folder written by `train.virtual`) mixes virtual
patients in and may be added at a resume. The learning rate warms up, holds, then falls along a cosine; the weights
that are kept are an exponential moving average.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from osteo_daemon.network.localizer import N_CLASSES, LocalizerConfig, SpineClass, SpineLocalizerNet, window_input
from train.synthesis import Sample, synthesise
from train.torso import Torso, load_torso
from train.virtual import PhantomCache

CLASS_WEIGHTS = (1.0, 2.0, 4.0, 4.0, 2.0, 2.0, 3.0, 2.0, 2.0)
PHASE_WEIGHT = 0.5
VALIDATION_SEED = 900_000_000
N_VALIDATION = 16


class PatchStream(IterableDataset):  # type: ignore[misc,unused-ignore]
    """An endless stream of training patches; patch number i has seed ``first + i`` whatever the number of workers."""

    def __init__(
        self, torso: Torso, shape: tuple[int, int, int], first: int, phantoms: PhantomCache | None, share: float
    ) -> None:
        self._torso, self._shape, self._first = torso, shape, first
        self._phantoms, self._share = phantoms, share

    def patch(self, seed: int) -> Sample:
        if self._phantoms is not None and np.random.default_rng([seed, 7]).random() < self._share:
            return self._phantoms.patch(self._shape, seed)
        return synthesise(self._torso, self._shape, seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        info = get_worker_info()
        start, stride = (info.id, info.num_workers) if info is not None else (0, 1)
        torch.set_num_threads(1)
        seed = self._first + start
        while True:
            sample = self.patch(seed)
            yield sample.hu, sample.labels, sample.level_coordinate
            seed += stride


def localizer_loss(logits: Tensor, phase: Tensor, labels: Tensor, level_coordinate: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy + Dice over the classes present, and the phase's squared error in bodies and discs.

    Args:
        logits: (N, 9, D, H, W).
        phase: (N, 2, D, H, W).
        labels: (N, D, H, W) int64.
        level_coordinate: (N, D, H, W).
    """
    logits, phase = logits.float(), phase.float()
    log_p = logits.log_softmax(dim=1)
    true_log_p = log_p.gather(1, labels[:, None])[:, 0]
    weights = torch.tensor(CLASS_WEIGHTS, device=logits.device)[labels]
    entropy = -(weights * true_log_p).sum() / weights.sum()
    flat = labels.flatten()
    sizes = torch.bincount(flat, minlength=N_CLASSES).to(logits.dtype)
    overlap = torch.zeros(N_CLASSES, device=logits.device).index_add(0, flat, true_log_p.exp().flatten())
    dice = (2 * overlap + 1.0) / (log_p.exp().sum((0, 2, 3, 4)) + sizes + 1.0)
    present = sizes > 20
    present[0] = False
    region = entropy + (1 - dice[present]).sum() / max(1, int(present.sum()))
    mask = ((labels == SpineClass.BODY) | (labels == SpineClass.DISC)).float()
    angle = 2 * math.pi * level_coordinate
    error = (phase[:, 0] - angle.cos()) ** 2 + (phase[:, 1] - angle.sin()) ** 2
    return region, (error * mask).sum() / mask.sum().clamp(min=50.0)


def learning_rate(step: int, steps: int, peak: float, hold: float) -> float:
    """Warm-up over 150 steps, constant until ``hold`` of the steps, then a cosine to 1 % of the peak."""
    if step < 150:
        return peak * (step + 1) / 150
    progress = max(0.0, (step / steps - hold) / (1 - hold))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def validate(net: nn.Module, config: LocalizerConfig, patches: list[Sample]) -> dict[str, float]:
    """Dice per class and mean phase error over fixed patches (the same torso: a check on learning, not on transfer)."""
    net.eval()
    overlap, sizes, phase_error = torch.zeros(N_CLASSES), torch.zeros(N_CLASSES), []
    for sample in patches:
        x = window_input(sample.hu[None], config.windows_hu).to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            logits, phase = net(x)
        guess = logits.float().argmax(dim=1)[0]
        for c in range(N_CLASSES):
            a, b = guess == c, sample.labels == c
            overlap[c] += 2 * (a & b).sum()
            sizes[c] += a.sum() + b.sum()
        _, error = localizer_loss(logits, phase, sample.labels[None], sample.level_coordinate[None])
        phase_error.append(float(error))
    net.train()
    dice = overlap / sizes.clamp(min=1)
    result = {f"dice_{c.name.lower()}": round(float(dice[c]), 3) for c in SpineClass if c}
    return {**result, "phase_error": round(float(np.mean(phase_error)), 4)}


def _save(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(args: argparse.Namespace) -> None:
    """Run until ``args.steps`` steps are done; the last checkpoint holds the moving average under ``ema``."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = LocalizerConfig()
    net = SpineLocalizerNet(config).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=1e-4)
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        config = LocalizerConfig.from_dict(json.loads(state["config"]))
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        ema, step = state["ema"], int(state["step"])
    torso = load_torso(args.data)
    phantoms = PhantomCache(args.phantoms) if args.phantoms else None
    stream = PatchStream(torso, config.patch_voxels, args.seed * 100_000_000 + step, phantoms, args.phantom_share)
    patches = [synthesise(torso, config.patch_voxels, VALIDATION_SEED + i) for i in range(N_VALIDATION)]
    loader = DataLoader(stream, batch_size=1, num_workers=args.workers, prefetch_factor=6)
    shadow = SpineLocalizerNet(config).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def log(record: dict[str, object]) -> None:
        line = json.dumps(record)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        with (out / "log.jsonl").open("a") as stream_:
            stream_.write(line + "\n")

    def save() -> None:
        _save(
            checkpoint,
            {
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "ema": ema,
                "step": step,
                "config": json.dumps(config.to_dict()),
            },
        )

    log({"event": "start", "step": step, "steps": args.steps, "phantoms": bool(phantoms), "lr": args.lr})
    net.train()
    started, saved, losses, begin_step = time.monotonic(), time.monotonic(), [], step
    for hu, labels, level_coordinate in loader:
        if step >= args.steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.hold)
        x = window_input(hu, config.windows_hu).to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            logits, phase = net(x)
        region, error = localizer_loss(logits, phase, labels, level_coordinate)
        loss = region + PHASE_WEIGHT * error
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimiser.step()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        losses.append((float(region.detach()), float(error.detach())))
        if step % 100 == 0:
            mean = np.mean(losses[-100:], axis=0)
            rate = (step - begin_step) / (time.monotonic() - started)
            log({"step": step, "region": round(mean[0], 4), "phase": round(mean[1], 4), "steps_per_s": round(rate, 2)})
        if step % 500 == 0:
            shadow.load_state_dict(ema)
            log({"step": step, **validate(shadow, config, patches)})
        if time.monotonic() - saved > args.save_seconds:
            save()
            saved = time.monotonic()
    save()
    log({"event": "end", "step": step, "seconds": round(time.monotonic() - started)})


def restart_with_kept_memory() -> None:
    """Start this program anew with settings that glibc and OpenMP read only at the start of a process.

    Every step allocates the same few hundred megabytes. By default glibc gives them back and half of the time goes
    into page faults; threads that wait actively then steal the cores from the workers. Together: 0.9 to 3.5 steps/s.
    """
    wanted = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "536870912",
        "OMP_WAIT_POLICY": "passive",
    }
    if any(name not in os.environ for name in wanted):
        command = [sys.executable, "-m", "train.localizer", *sys.argv[1:]]
        os.execve(sys.executable, command, {**wanted, **os.environ})  # noqa: S606


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled torso (NIfTI)")
    parser.add_argument("--out", type=Path, default=Path("runs/localizer"))
    parser.add_argument("--phantoms", type=Path, help="folder of cached virtual patients (train.virtual)")
    parser.add_argument("--phantom-share", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hold", type=float, default=0.5, help="share of the steps before the cosine begins")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save-seconds", type=float, default=120.0)
    args = parser.parse_args()
    restart_with_kept_memory()
    train(args)


if __name__ == "__main__":
    main()
