"""Every ingredient left out once, each with three seeds: ``python -m train.ablation``.

The runs use the cohort of ``train/cohort.json`` on a coarser grid (`train.shrink`), the network, losses and changes of
the shipped one (`train.recipe`), fewer readings and a fixed number of epochs, so that the last one can be compared
without choosing. Finished runs are skipped: the command can be stopped and called again, and ``--only`` and ``--seeds``
choose some. ``python -m benchmarks.ablation`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy import special

from osteo_daemon.network.config import MoEConfig
from train.baselines import NAMES, features_of, rows_with_truth, run_baselines
from train.data import NO_LABEL, VoiSet, open_set
from train.evaluate import Evaluated, evaluate_network, level_metrics
from train.judging import Index, Judged, operating_points
from train.loop import LoopConfig, load_run
from train.multitask import run_training
from train.pool import build_pool, open_pool
from train.pretrain import PretrainConfig, pretrain
from train.readings import Densitometry, Scheme, remeasure
from train.recipe import AUGMENTATION, NETWORK, WEIGHTS
from train.shrink import shrink_cohort
from train.splits import Part
from train.truth import LEVEL_OFFSET_G_CM2, REFERENCE_MEAN_G_CM2, REFERENCE_SD_G_CM2

SEEDS: Final = (0, 1, 2)
PARTS: Final[tuple[Part, ...]] = ("test", "external")
LOOP: Final = LoopConfig(
    epochs=18, batch_size=32, learning_rate=1.5e-3, patience=1000, labelled_share=0.5, keep="last", ema_decay=0.99
)
PRETRAIN_EPOCHS: Final = 3
_ONE_EXPERT: Final = {"expert_count": 1, "expert_width": 4 * NETWORK.expert_width, "device_count": 0}
"""As many parameters as four experts have, and no gate to speak of."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table.

    Attributes:
        title: of the row.
        network, weights, augmentation: what differs from the shipped network's (`train.recipe`).
        mechanism: of the encoder's pretraining on all training scans (`train.pretrain`); None is none.
        scheme: of the readings.
        bmd, diagnosis: whether the network was trained for that task.
    """

    title: str
    network: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    mechanism: str | None = "a"
    scheme: Scheme = "sites"
    bmd: bool = True
    diagnosis: bool = True


VARIANTS: Final[dict[str, Variant]] = {
    "full": Variant("full model"),
    "no-experts": Variant("without experts", network=_ONE_EXPERT),
    "no-pretraining": Variant("without pretraining", mechanism=None),
    "bmd-only": Variant(
        "single task: BMD", network=_ONE_EXPERT, weights={"diagnosis": 0.0, "level": 0.0}, diagnosis=False
    ),
    "class-only": Variant(
        "single task: class", network=_ONE_EXPERT, weights={"bmd": 0.0, "level": 0.0, "twin": 0.0}, bmd=False
    ),
    "no-twins": Variant("without twins", weights={"twin": 0.0}),
    "no-grain": Variant("gate without noise and sharpness", network={"grain_channel": "none"}),
    "no-experts-grain": Variant(
        "without experts, noise and sharpness told", network=_ONE_EXPERT | {"grain_channel": "all"}
    ),
    "no-density-change": Variant("without changed densities", augmentation={"density": 0.0}),
    "one-device": Variant("control, one device: full", network={"device_count": 0}, scheme="one-device"),
    "one-device-no-experts": Variant("control, one device: without experts", network=_ONE_EXPERT, scheme="one-device"),
    "shuffled": Variant("control, devices by lot: full", scheme="shuffled"),
    "shuffled-no-experts": Variant("control, devices by lot: without experts", network=_ONE_EXPERT, scheme="shuffled"),
    "no-coarse": Variant("without coarser series", augmentation={"coarse": 0.0}),
    "no-surround": Variant("without other surroundings", augmentation={"surround": 0.0}),
    "no-size": Variant("without larger and smaller people", augmentation={"size": 0.0}),
    "cross-entropy": Variant("cross-entropy instead of ordinal", network={"class_head": "softmax"}),
    "learned-weights": Variant("learned loss weights", weights={"learned": True}),
    "no-logit-adjustment": Variant("without logit adjustment", weights={"logit_adjustment": 0.0}),
    "no-gate-supervision": Variant("gate never told the device", weights={"device": 0.0}),
    "top-2": Variant("top-2 gate", network={"top_k": 2}),
    "gate-per-task": Variant("one gate per task", network={"gate_per_task": True}),
    "pretrained-b": Variant("pretrained by contrast (b)", mechanism="b"),
    "pretrained-c": Variant("pretrained by masked reconstruction (c)", mechanism="c"),
}
"""In order of how much they tell: a table of the first few is worth having before the rest is done."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long the runs are.

    Attributes:
        epochs: of every run; one with twins shows every vertebra twice and takes half as many.
        pretrain_epochs: of every pretraining.
    """

    epochs: int = LOOP.epochs
    pretrain_epochs: int = PRETRAIN_EPOCHS


def network_of(variant: Variant) -> MoEConfig:
    """The network of a row."""
    return replace(NETWORK, **variant.network)


def run_folder(root: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return root / name / f"seed{seed}"


def ensure_encoder(data_folder: Path, root: Path, mechanism: str, seed: int, budget: Budget) -> Path:
    """The encoder pretrained by a mechanism with a seed; made once, without any label."""
    torch.set_num_threads(1)
    folder = root / f"encoders-{mechanism}" / f"seed{seed}"
    if not (folder / "summary.json").exists():
        config = PretrainConfig(mechanism=mechanism, epochs=budget.pretrain_epochs, seed=seed)
        pool = open_pool(root / "pool")
        pretrain(open_set(data_folder), folder, config, NETWORK, torch.device("cpu"), pool, probe=False)
    return folder / "encoder.pt"


def run_one(data_folder: Path, root: Path, name: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Train and judge one run; writes test.npz, external.npz and, last, result.json."""
    torch.set_num_threads(1)
    variant, folder = VARIANTS[name], run_folder(root, name, seed)
    done = folder / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    started = time.monotonic()
    how = Densitometry(scheme=variant.scheme)
    weights = replace(WEIGHTS, **variant.weights)
    summary = run_training(
        data_folder,
        folder,
        replace(LOOP, seed=seed, epochs=max(1, budget.epochs // 2) if weights.twin > 0 else budget.epochs),
        network_of(variant),
        weights,
        replace(AUGMENTATION, **variant.augmentation),
        torch.device("cpu"),
        None if variant.mechanism is None else ensure_encoder(data_folder, root, variant.mechanism, seed, budget),
        how,
    )
    run, data = load_run(folder), remeasure(open_set(data_folder), how)
    found = evaluate_network(run, data, ("val", *PARTS))
    result: dict[str, Any] = {
        "variant": name,
        "seed": seed,
        "epochs": summary["epochs"],
        "training_seconds": round(summary["training_seconds"], 1),
        "parameters": sum(p.numel() for p in run.network.parameters()),
        "calibration": found.calibration.to_json(),
    }
    for part in PARTS:
        judged = only_trained(found.parts[part], found, variant, data)
        judged.save(folder / f"{part}.npz")
        result[part] = _points(part, found, variant, data)
    result["seconds"] = round(time.monotonic() - started, 1)
    done.write_text(json.dumps(result, indent=1))
    (folder / "last.pt").unlink(missing_ok=True)
    return result


def only_trained(judged: Judged, found: Evaluated, variant: Variant, data: VoiSet) -> Judged:
    """Without BMD where no BMD was trained; with classes from BMD and its uncertainty where no class was."""
    if not variant.bmd:
        nothing = np.full(len(judged.index), np.nan)
        return replace(judged, bmd=nothing, half=nothing)
    if variant.diagnosis:
        return judged
    val = found.parts["val"]
    own = np.array([data.rows[i].diagnosis for i in val.index])
    labelled = own != NO_LABEL
    quantile = found.calibration.bmd_interval_90
    operating = operating_points(_by_bmd(val, data, quantile)[labelled], own[labelled])
    return replace(judged, probability=_by_bmd(judged, data, quantile), operating=operating)


def _by_bmd(judged: Judged, data: VoiSet, interval_90: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, 3) class probabilities of a Gaussian around the BMD."""
    offset = np.array([LEVEL_OFFSET_G_CM2[data.rows[i].level] for i in judged.index]) + REFERENCE_MEAN_G_CM2
    sd = judged.half / interval_90
    low, osteoporosis = (special.ndtr((offset + cut * REFERENCE_SD_G_CM2 - judged.bmd) / sd) for cut in (-1.0, -2.5))
    return np.stack([1.0 - low, low - osteoporosis, osteoporosis], axis=1)


def _points(part: Part, found: Evaluated, variant: Variant, data: VoiSet) -> dict[str, Any]:
    """Figures of one run that need no interval of their own."""
    points: dict[str, Any] = {"gate_by_site": {}}
    levels = found.every_level[part]
    if variant.bmd and variant.diagnosis:
        everything = np.arange(len(levels.index))
        points |= {name: metric(everything) for name, metric in level_metrics(levels, data).items()}
    if variant.bmd:
        points["causal_slope_share"] = found.slope[part]
        moved = np.abs(found.coarse[part].bmd - found.parts[part].bmd)
        points |= {"coarse_shift_g_cm2": float(moved.mean()), "coarse_within_0.03": float((moved < 0.03).mean())}
    sites = np.array([data.rows[i].site for i in levels.index])
    for site in np.unique(sites):
        points["gate_by_site"][str(site)] = found.gate[part][sites == site].mean(0).round(3).tolist()
    return points


def ensure_baselines(data_folder: Path, root: Path) -> None:
    """Fit and judge the baselines of the same cohort; writes baselines/NAME-PART.npz."""
    folder = root / "baselines"
    if all((folder / f"{name}-{part}.npz").exists() for name in NAMES for part in PARTS):
        return
    data = remeasure(open_set(data_folder), Densitometry())
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Index] = {part: rows_with_truth(data, data.indices(part)) for part in PARTS}
    for name, parts in run_baselines(data, features_of(data, NETWORK, data_folder), index).items():
        for part, judged in parts.items():
            judged.save(folder / f"{name}-{part}.npz")


def jobs(only: list[str] | None, seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Runs in order: the three rows that tell most with every seed, then all others seed by seed."""
    names = [name for name in VARIANTS if only is None or name in only]
    first, rest = names[:3], names[3:]
    yield from ((name, seed) for seed in seeds for name in first)
    yield from ((name, seed) for seed in seeds for name in rest)


def run_all(
    data_folder: Path, root: Path, only: list[str] | None, seeds: list[int], workers: int, budget: Budget
) -> None:
    """Everything that is not done yet, ``workers`` runs at a time with one thread each.

    Raises:
        ValueError: ``root`` holds runs of another length or cohort.
    """
    root.mkdir(parents=True, exist_ok=True)
    stamp = root / "ablation.json"
    settings = {"cohort_sha256": open_set(data_folder).config["sha256"], **asdict(budget)}
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"{root} holds runs with other settings; remove it or choose another folder")
    stamp.write_text(json.dumps(settings, indent=1))
    if not (root / "pool" / "pool.json").exists():
        build_pool([data_folder], root / "pool", NETWORK)
    wanted = list(jobs(only, seeds))
    # spawned: in a fork of a process whose OpenMP threads have worked, gradient boosting waits for them for ever
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # a run whose encoder is not there yet would make it a second time, so those of the first rows come first
        first: list[Future[Any]] = [pool.submit(ensure_baselines, data_folder, root)]
        first += [pool.submit(ensure_encoder, data_folder, root, "a", seed, budget) for seed in seeds]
        for waiting in first:
            waiting.result()
        todo = [pool.submit(run_one, data_folder, root, name, seed, budget) for name, seed in wanted]
        for count, finished in enumerate(as_completed(todo), start=1):
            result = finished.result()
            run = f"{result['variant']} seed {result['seed']}"
            print(f"{count}/{len(todo)} {run}: {result['seconds']:.0f} s", flush=True)


def main() -> None:
    """Command line of ``python -m train.ablation``."""
    parser = argparse.ArgumentParser(description="the ablation runs; finished ones are skipped")
    parser.add_argument("--cohort", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--data", type=Path, default=Path("runs/cohort-small"), help="made from --cohort when missing")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=LOOP.epochs)
    parser.add_argument("--pretrain-epochs", type=int, default=PRETRAIN_EPOCHS)
    given = parser.parse_args()
    if not (given.data / "table.json").exists():
        shrink_cohort(given.cohort, given.data, given.workers)
    budget = Budget(given.epochs, given.pretrain_epochs)
    run_all(given.data, given.out, given.only, given.seeds, given.workers, budget)


if __name__ == "__main__":
    main()
