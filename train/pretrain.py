"""Self-supervised pretraining: the encoder learns bone texture from vertebrae without labels.

    python -m train.pretrain --data runs/cohort --out runs/pretrain --mechanism abc
    python -m train.multitask --data runs/cohort --encoder runs/pretrain/encoder.pt

The mechanisms are those of our reading of the paper (`train.mechanisms`), in any combination: a, regression of the
radiomic vector; b, contrast between neighbours in the texture feature pool; c, masked reconstruction with texture
consistency. The default was chosen by linear probes (train/LOG.md, docs/results/pretraining.json). No label is used
and the external hospital never enters. Augmentations are those of `train.data.Augmentation`, which change no texture;
a test holds them to that and shows that blur, gamma and others fail it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import VertebraEncoder
from train.board import Board
from train.data import Augmentation, VoiSet, open_set
from train.mechanisms import SelfSupervised, contrast_loss, mask_blocks, reconstruction_loss, to_window
from train.optim import adamw, learning_rate_at
from train.pool import Pool, build_pool, open_pool
from train.probe import linear_probe

MECHANISMS: Final = "abc"


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """How to pretrain; ours, none of it is published.

    Attributes:
        mechanism: letters out of `MECHANISMS`; their losses are added.
        epochs: each is as many steps as full batches of training vertebrae.
        batch_size: views in a step; with mechanism b half of them are anchors, half their positives.
        learning_rate, weight_decay: AdamW's.
        neighbours: mechanism b draws the positive among this many.
        temperature: mechanism b's.
        masked_share: mechanism c blanks this share of the blocks.
        texture_weight: mechanism c's, of local texture against voxels.
        weight_a, weight_b, weight_c: of the losses.
        seed: of everything random.
    """

    mechanism: str = "b"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    neighbours: int = 5
    temperature: float = 0.1
    masked_share: float = 0.5
    texture_weight: float = 0.5
    weight_a: float = 1.0
    weight_b: float = 0.2
    weight_c: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            not self.mechanism
            or set(self.mechanism) - set(MECHANISMS)
            or len(set(self.mechanism)) < len(self.mechanism)
        ):
            raise ValueError(f"mechanism must be made of the letters {MECHANISMS}, each once, got {self.mechanism!r}")
        if "b" in self.mechanism and (self.batch_size < 4 or self.batch_size % 2):
            raise ValueError("mechanism b needs an even batch of at least 4")


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What training draws from: N vertebrae of the training part.

    Attributes:
        rows: (N,) rows of the data set.
        vectors: (N, F) standardised radiomic vectors.
        neighbours: (N, k) positions of nearest neighbours of other patients.
        reach: (N,) distance of the farthest of them.
        patient: (N,) number of the patient.
    """

    rows: npt.NDArray[np.int64]
    vectors: Tensor
    neighbours: npt.NDArray[np.int64]
    reach: Tensor
    patient: Tensor

    @classmethod
    def of(cls, data: VoiSet, pool: Pool, count: int) -> Material:
        """The pool's vertebrae that come from this data set.

        Raises:
            ValueError: there is none, or one is not of the training part.
        """
        part, rows = pool.of_source(data.config["sha256"])
        if any(data.rows[i].part != "train" for i in rows):
            raise ValueError("the pool holds vertebrae that are not of the training part")
        vectors = torch.from_numpy(part.values)
        neighbours = part.neighbours(count) if count else np.zeros((len(rows), 0), dtype=np.int64)
        reach = torch.zeros(len(rows))
        if count:
            # a little more, for rounding: the farthest neighbour itself lies within
            reach = (vectors[neighbours[:, -1]] - vectors).norm(dim=1) * 1.0001 + 1e-4
        patient = torch.from_numpy(np.unique(part.patients, return_inverse=True)[1])
        return cls(rows, vectors, neighbours, reach, patient)

    def alike(self, anchors: npt.NDArray[np.int64], positives: npt.NDArray[np.int64]) -> Tensor:
        """(B, B) pairs that are no negatives: of one patient, or as near as the anchor's own neighbours."""
        first, second = self.vectors[anchors], self.vectors[positives]
        distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance <= self.reach[anchors][:, None]
        return near | (self.patient[anchors][:, None] == self.patient[positives][None])


def draw(material: Material, config: PretrainConfig, epoch: int, step: int) -> npt.NDArray[np.int64]:
    """(B,) positions in the material of one step's views; with mechanism b positives follow their anchors."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(material.rows))
    size = config.batch_size
    chosen = order[step * size : (step + 1) * size]
    if "b" not in config.mechanism:
        return chosen
    anchors = chosen[: len(chosen) // 2]
    rng = np.random.default_rng([config.seed, epoch, step, 1])
    positives = material.neighbours[anchors, rng.integers(material.neighbours.shape[1], size=len(anchors))]
    return np.concatenate([anchors, positives])


def views(
    data: VoiSet, rows: npt.NDArray[np.int64], network: MoEConfig, augmentation: Augmentation, seed: tuple[int, ...]
) -> Tensor:
    """(B, D, H, W) augmented HU, each with a generator of its own, so that nothing depends on what was drawn before."""
    made = []
    for number, row in enumerate(rows):
        rng = np.random.default_rng([*seed, number, int(row)])
        made.append(augmentation.apply(data.hu[row].astype(np.float32), rng, network.voi_shape))
    return torch.from_numpy(np.stack(made))


def losses_of(
    model: SelfSupervised,
    hu: Tensor,
    chosen: npt.NDArray[np.int64],
    material: Material,
    config: PretrainConfig,
    network: MoEConfig,
    mask_seed: int,
) -> dict[str, Tensor]:
    """Weighted loss of each mechanism for one batch of views; one pass through the encoder serves all."""
    seen, masked = hu, None
    if "c" in config.mechanism:
        seen, masked = mask_blocks(hu, config.masked_share, torch.Generator().manual_seed(mask_seed))
    maps = model.encoder.maps(seen)
    pooled = model.encoder.pool(maps)
    found: dict[str, Tensor] = {}
    if model.vector is not None:
        target = material.vectors[chosen].to(hu.device)
        found["a"] = config.weight_a * functional.smooth_l1_loss(model.vector(pooled), target)
    if model.projection is not None:
        first, second = model.projection(pooled).chunk(2)
        anchors, positives = np.split(chosen, 2)
        alike = material.alike(anchors, positives).to(hu.device)
        found["b"] = config.weight_b * contrast_loss(first, second, alike, config.temperature)
    if model.decoder is not None and masked is not None:
        loss = reconstruction_loss(model.decoder(maps), to_window(hu, network), masked, config.texture_weight)
        found["c"] = config.weight_c * loss
    return found


def pretrain(
    data: VoiSet,
    folder: Path,
    config: PretrainConfig,
    network: MoEConfig,
    device: torch.device,
    pool: Pool,
    *,
    probe: bool = True,
) -> dict[str, Any]:
    """Train, or go on from ``folder/last.pt``; writes encoder.pt and summary.json.

    Args:
        pool: holds the training vertebrae of ``data``.
        probe: judge the encoder by `train.probe`, beside the same one untrained.

    Raises:
        ValueError: the folder holds a run with other settings, or pool and data do not belong together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(
        json.dumps(
            {
                "cohort": data.config["sha256"],
                "pool": pool.version,
                "config": asdict(config),
                "network": network.to_json(),
                "augmentation": asdict(Augmentation()),
            }
        )
    )
    stamp = folder / "settings.json"
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"{folder} holds a run with other settings; remove it or choose another folder")
    stamp.write_text(json.dumps(settings, indent=1))
    material = Material.of(data, pool, config.neighbours if "b" in config.mechanism else 0)
    torch.manual_seed(config.seed)
    untrained = VertebraEncoder(network)
    model = SelfSupervised(network, config.mechanism, material.vectors.shape[1])
    model.encoder.load_state_dict(untrained.state_dict())
    model.to(device)
    optimiser = adamw(model, config.learning_rate, config.weight_decay)
    steps_per_epoch = max(1, len(material.rows) // config.batch_size)
    start, history = 0, list[dict[str, float]]()
    last = folder / "last.pt"
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        start, history = int(saved["epoch"]), list(saved["history"])
    board = Board(folder, history)
    for epoch in range(start, config.epochs):
        model.train()
        seen: list[dict[str, float]] = []
        for step in tqdm(range(steps_per_epoch), desc=f"pretrain {epoch + 1}/{config.epochs}", mininterval=2):
            rate = learning_rate_at(
                epoch * steps_per_epoch + step, config.epochs * steps_per_epoch, config.learning_rate, steps_per_epoch
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            chosen = draw(material, config, epoch, step)
            hu = views(data, material.rows[chosen], network, Augmentation(), (config.seed, epoch, step)).to(device)
            parts = losses_of(
                model, hu, chosen, material, config, network, (config.seed * 1_000_003 + epoch) * 1_000_003 + step
            )
            loss = torch.stack(list(parts.values())).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            seen.append({"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}})
        history.append({name: float(np.mean([entry[name] for entry in seen])) for name in seen[0]})
        temporary = last.with_suffix(".part")
        torch.save(
            {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1, "history": history},
            temporary,
        )
        temporary.replace(last)
        board.add(epoch + 1, history[-1])
    board.close()
    torch.save({"encoder": model.encoder.state_dict()}, folder / "encoder.pt")
    summary: dict[str, Any] = {
        "mechanism": config.mechanism,
        "history": history,
        "vertebrae": len(material.rows),
        "features": int(material.vectors.shape[1]),
    }
    if probe:
        summary["probe"] = linear_probe(model.encoder, data, network, device)
        summary["probe_untrained"] = linear_probe(untrained.to(device), data, network, device)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main() -> None:
    """Command line of ``python -m train.pretrain``; every field of `PretrainConfig` is an option."""
    parser = argparse.ArgumentParser(description="self-supervised pretraining on radiomic texture")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--pool", type=Path, help="folder of train.pool; built beside the run when not given")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = PretrainConfig()
    for field in fields(PretrainConfig):
        value = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    config = PretrainConfig(**{field.name: given[field.name] for field in fields(PretrainConfig)})
    network = MoEConfig()
    pool = (
        build_pool([given["data"]], given["out"] / "pool", network)
        if given["pool"] is None
        else open_pool(given["pool"])
    )
    summary = pretrain(open_set(given["data"]), given["out"], config, network, torch.device(given["device"]), pool)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
