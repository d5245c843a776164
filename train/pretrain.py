"""Self-supervised pretraining: the encoder learns to read a vertebra's radiomic texture from an augmented view.

    python -m train.pretrain --data runs/cohort --out runs/pretrain
    python -m train.multitask --data runs/cohort --encoder runs/pretrain/encoder.pt

Mechanism (a) of our reading of the paper: predict the standardised radiomic vector, smooth L1. No label is used and the
external hospital never enters. Augmentations are those of `train.data.Augmentation`, which change no texture. The
result is judged by a linear probe: ridge regression from frozen features to sBMD, beside the same encoder untrained.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import VertebraEncoder
from train.data import Augmentation, VoiSet, batches, digest_of, open_set
from train.loop import to_device
from train.metrics import pearson
from train.optim import adamw, learning_rate_at

CORE_RADII_MM: Final = (8.0, 9.0, 12.0)
"""Half axes (caudal, posterior, left) of the region whose texture is learnt: trabecular in every lumbar body."""
LOW_HU: Final = -200.0
BIN_WIDTH_HU: Final = 25.0
GREY_LEVELS: Final = 32
CLIP_SD: Final = 5.0
MINIMUM_STRATUM: Final = 20


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """How to pretrain; ours, none of it is published."""

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    seed: int = 0


class TexturePredictor(nn.Module):
    """The encoder with a linear head for the radiomic vector; only the encoder is kept."""

    def __init__(self, config: MoEConfig, features: int) -> None:
        super().__init__()
        self.encoder = VertebraEncoder(config)
        self.head = nn.Sequential(nn.LayerNorm(self.encoder.width), nn.Linear(self.encoder.width, features))

    def forward(self, hu: Tensor) -> Tensor:
        """(B, D, H, W) HU to (B, F) standardised radiomic features."""
        return torch.as_tensor(self.head(self.encoder(hu)))


def core_mask(config: MoEConfig) -> Tensor:
    """(D, H, W) True inside the ellipsoid of `CORE_RADII_MM`."""
    axes = [(torch.arange(n) - (n - 1) / 2) * config.voi_spacing_mm for n in config.voi_shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    squares = [(axis / radius) ** 2 for axis, radius in zip(grid, CORE_RADII_MM, strict=True)]
    return torch.stack(squares).sum(0) <= 1.0


def radiomic_vectors(data: VoiSet, config: MoEConfig, folder: Path) -> tuple[npt.NDArray[np.float64], list[str]]:
    """(N, F) features of every VOI's core and their names; computed once and kept in ``folder``."""
    values_file, names_file = folder / "radiomics.npy", folder / "radiomics.json"
    key = digest_of(
        {"cohort": data.config["sha256"], "core": CORE_RADII_MM, "bins": [LOW_HU, BIN_WIDTH_HU, GREY_LEVELS]}
    )
    if names_file.exists() and json.loads(names_file.read_text())["key"] == key:
        return np.load(values_file, allow_pickle=False), json.loads(names_file.read_text())["names"]
    mask = core_mask(config)
    inside = mask.nonzero()
    low, high = inside.min(0).values, inside.max(0).values + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    names: list[str] = []
    rows = []
    everything = np.arange(len(data.rows))
    total = -(-len(everything) // 32)
    for batch in tqdm(batches(data, everything, config, [], 32), total=total, desc="radiomics", mininterval=2):
        hu = batch.hu[(slice(None), *box)]
        grey = discretise(hu, mask[box].expand_as(hu), LOW_HU, BIN_WIDTH_HU, GREY_LEVELS)
        found = texture_features(grey, GREY_LEVELS)
        names = sorted(found)
        rows.append(torch.stack([found[name] for name in names], dim=1).numpy())
    values = np.concatenate(rows)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(values_file, values)
    names_file.write_text(json.dumps({"key": key, "names": names}))
    return values, names


def standardise(
    values: npt.NDArray[np.float64], strata: list[str], fit: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Mean 0 and SD 1 within each acquisition stratum, fitted on the rows ``fit`` only.

    Run length and other features shift with slice thickness and kernel, which the encoder shall not learn.
    A stratum with too few rows uses the whole of ``fit``. Clipped to `CLIP_SD`.
    """
    result = np.zeros_like(values, dtype=np.float32)
    labels = np.array(strata)
    for stratum in np.unique(labels):
        members = labels == stratum
        source = fit[members[fit]]
        if len(source) < MINIMUM_STRATUM:
            source = fit
        mean, sd = values[source].mean(0), values[source].std(0)
        scaled = (values[members] - mean) / np.where(sd > 1e-9, sd, 1.0)
        result[members] = np.clip(scaled, -CLIP_SD, CLIP_SD)
    return result


def stratum_of(kernel: str, thickness_mm: float) -> str:
    """Acquisition stratum of a scan."""
    return f"{kernel}/{'thin' if thickness_mm < 1.5 else 'middle' if thickness_mm < 3.5 else 'thick'}"


def pretrain(
    data: VoiSet, folder: Path, config: PretrainConfig, network: MoEConfig, device: torch.device
) -> dict[str, Any]:
    """Train, or go on from ``folder/last.pt``; writes encoder.pt and summary.json.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(
        json.dumps({"cohort": data.config["sha256"], "config": asdict(config), "network": network.to_json()})
    )
    stamp = folder / "settings.json"
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"{folder} holds a run with other settings; remove it or choose another folder")
    stamp.write_text(json.dumps(settings, indent=1))
    indices = data.indices("train")
    values, _ = radiomic_vectors(data, network, folder)
    target = torch.from_numpy(
        standardise(values, [stratum_of(row.kernel, row.thickness_mm) for row in data.rows], indices)
    ).to(device)
    torch.manual_seed(config.seed)
    model = TexturePredictor(network, target.shape[1]).to(device)
    untrained = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimiser = adamw(model, config.learning_rate, config.weight_decay)
    steps_per_epoch = max(1, len(indices) // config.batch_size)
    start, losses = 0, []
    last = folder / "last.pt"
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        start, losses = int(saved["epoch"]), list(saved["losses"])
    for epoch in range(start, config.epochs):
        model.train()
        seen = []
        steps = batches(
            data,
            indices,
            network,
            [],
            config.batch_size,
            augmentation=Augmentation(),
            seed=config.seed,
            epoch=epoch,
            keep_last=len(indices) < config.batch_size,
        )
        for number, batch in enumerate(tqdm(steps, total=steps_per_epoch, desc=f"pretrain {epoch + 1}", mininterval=2)):
            rate = learning_rate_at(
                epoch * steps_per_epoch + number, config.epochs * steps_per_epoch, config.learning_rate, steps_per_epoch
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            moved = to_device(batch, device)
            loss = functional.smooth_l1_loss(model(moved.hu), target[moved.index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            seen.append(float(loss.detach()))
        losses.append(float(np.mean(seen)))
        torch.save(
            {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1, "losses": losses},
            last,
        )
    torch.save({"encoder": model.encoder.state_dict()}, folder / "encoder.pt")
    probe = linear_probe(model.encoder, data, network, device)
    blank = VertebraEncoder(network).to(device)
    blank.load_state_dict(untrained)
    summary = {
        "losses": losses,
        "features": int(target.shape[1]),
        "probe_pearson": probe,
        "probe_pearson_untrained": linear_probe(blank, data, network, device),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def linear_probe(
    encoder: VertebraEncoder, data: VoiSet, network: MoEConfig, device: torch.device, ridge: float = 1.0
) -> float:
    """Correlation with the true sBMD of validation vertebrae of a ridge regression fitted on labelled training ones."""

    def features(part: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        indices = data.indices(part, labelled=True)
        with torch.inference_mode():
            found = [encoder(batch.hu.to(device)).cpu() for batch in batches(data, indices, network, [], 32)]
        return torch.cat(found).double().numpy(), np.array([data.rows[i].sbmd_g_cm2 for i in indices], dtype=np.float64)

    encoder.eval()
    x, y = features("train")
    mean, sd = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / sd
    weights = np.linalg.solve(x.T @ x + ridge * len(x) / 100 * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    test, true = features("val")
    return pearson((test - mean) / sd @ weights, true)


def main() -> None:
    """Command line of ``python -m train.pretrain``."""
    parser = argparse.ArgumentParser(description="self-supervised pretraining on radiomic texture")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--epochs", type=int, default=PretrainConfig().epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    config = PretrainConfig(epochs=given.epochs, seed=given.seed)
    summary = pretrain(open_set(given.data), given.out, config, MoEConfig(), torch.device(given.device))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
