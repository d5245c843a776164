"""Fit the numbers by which a bundle flags vertebrae unlike its training set, and measure whether they do.

    python -m train.outliers --run runs/multitask

prints how altered test vertebrae are told from unaltered ones. `fit_outliers` and `bundle_parts` are for the export:

    numbers, files = bundle_parts(fit_outliers(run.network, data))
    write_bundle(..., inference={..., **numbers}, extra_files={..., **files})
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from scipy import ndimage
from sklearn.covariance import LedoitWolf
from torch import Tensor

from osteo_daemon.network.moe import gate_entropy
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.network.outlier import OUTLIERS_KEY, OUTLIERS_NAME, OutlierModel
from train.data import VoiSet, batches, open_set
from train.loop import load_run
from train.metrics import auc

Vec = npt.NDArray[np.float64]
Alteration = Callable[[npt.NDArray[np.float32], np.random.Generator], npt.NDArray[np.float32]]

QUANTILE: Final = 0.99
"""Of validation vertebrae below each limit: about one in fifty good ones is flagged by either."""
MINIMUM_ROWS: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the network sees of N vertebrae: (N, F) encoded features and (N,) gate entropies."""

    encoded: Tensor
    entropy: Tensor


def look(
    network: MultitaskMoE, data: VoiSet, indices: npt.NDArray[np.int64], change: Alteration | None = None, seed: int = 0
) -> Seen:
    """Features and entropies of these rows, each altered by ``change`` with a generator of its own."""
    encoded, entropy = [], []
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        for batch in batches(data, indices, network.config, [], 32):
            hu = batch.hu
            if change is not None:
                rngs = [np.random.default_rng([seed, int(i)]) for i in batch.index]
                hu = torch.from_numpy(
                    np.stack([change(voi, rng) for voi, rng in zip(hu.numpy(), rngs, strict=True)]).astype(np.float32)
                )
            out = network(hu.to(device), batch.level.to(device))
            encoded.append(out.encoded.double().cpu())
            entropy.append(gate_entropy(out.gate_weights.mean(1)).double().cpu())
    return Seen(torch.cat(encoded), torch.cat(entropy))


def fit_outliers(network: MultitaskMoE, data: VoiSet, quantile: float = QUANTILE) -> OutlierModel:
    """Mean and shrunk covariance (Ledoit and Wolf 2004) of training rows, limits from validation rows.

    No label and no external row is used.

    Raises:
        ValueError: there are too few rows.
    """
    training, validation = data.indices("train"), data.indices("val")
    if min(len(training), len(validation)) < MINIMUM_ROWS:
        raise ValueError(f"need {MINIMUM_ROWS} training and validation rows, got {len(training)} and {len(validation)}")
    seen = look(network, data, training).encoded.numpy()
    # a feature that never moves would get an endless weight; one hundredth of a typical spread is its floor
    spread = seen.std(0)
    spread = np.maximum(spread, 0.01 * max(float(np.median(spread)), 1e-6))
    mean = seen.mean(0)
    precision = LedoitWolf(assume_centered=True).fit((seen - mean) / spread).get_precision()
    whitening = np.linalg.cholesky(precision) / spread[:, None]
    model = OutlierModel(
        torch.from_numpy(mean).float(), torch.from_numpy(whitening).float(), 1.0, 1.0, quantile, len(training), 0
    )
    checked = look(network, data, validation)
    return OutlierModel(
        model.mean,
        model.whitening,
        float(torch.quantile(model.distance(checked.encoded), quantile)),
        float(torch.quantile(checked.entropy, quantile)),
        quantile,
        len(training),
        len(validation),
    )


def bundle_parts(model: OutlierModel) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What to add to a bundle's configs/inference.json, and its extra file by name."""
    return {OUTLIERS_KEY: model.to_json()}, {OUTLIERS_NAME: save(model.tensors())}


# --- does it flag what it should --------------------------------------------------------------------------------


def upside_down(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Cranial and caudal swapped."""
    return np.ascontiguousarray(hu[::-1])


def between_levels(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Centred on the disc: half a level too low, the missing half mirrored."""
    half = len(hu) // 2
    return np.concatenate([hu[half:], hu[: half - 1 : -1]])[: len(hu)]


def metal(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Two pedicle screws with streaks that fall off with distance."""
    d, h, w = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in hu.shape), indexing="ij")
    out = hu.copy()
    for side in (-0.22, 0.22):
        across = w - side * hu.shape[2]
        radius = np.hypot(d, across)
        out += (900.0 * np.sin(4 * np.arctan2(d, across) + rng.uniform(0, 6)) / (radius + 4.0)).astype(np.float32)
        out[(radius < 0.06 * hu.shape[2]) & (h > -0.2 * hu.shape[1])] = 3000.0
    return np.minimum(out, np.float32(3071))


def soft_tissue(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A box of muscle beside the spine, with a CT's correlated noise."""
    noise: npt.NDArray[np.float64] = ndimage.gaussian_filter(rng.standard_normal(hu.shape), 0.7)
    tissue: npt.NDArray[np.float32] = (55.0 + 15.0 * noise / noise.std()).astype(np.float32)
    return tissue


def noisy(sd_hu: float) -> Alteration:
    """White noise of this SD added."""

    def add(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        return hu + np.float32(sd_hu) * rng.standard_normal(hu.shape, dtype=np.float32)

    return add


ALTERATIONS: Final[dict[str, Alteration]] = {
    "upside_down": upside_down,
    "between_levels": between_levels,
    "metal": metal,
    "soft_tissue": soft_tissue,
    "noise_40_hu": noisy(40.0),
    "noise_80_hu": noisy(80.0),
}


def measure_outliers(
    network: MultitaskMoE, data: VoiSet, model: OutlierModel, most: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Share flagged and AUROC of distance and entropy, altered test vertebrae against unaltered ones.

    Also the share of the external hospital's vertebrae that is flagged: an unseen scanner, not a wrong input.
    """
    rng = np.random.default_rng(seed)

    def some(part: Any) -> npt.NDArray[np.int64]:
        indices = data.indices(part)
        return np.sort(rng.permutation(indices)[:most])

    def scores(seen: Seen) -> tuple[Vec, Vec]:
        return model.distance(seen.encoded).numpy(), seen.entropy.numpy()

    def flagged(distance: Vec, entropy: Vec) -> float:
        return float(np.mean([model.exceeds(d, e) for d, e in zip(distance, entropy, strict=True)]))

    test = some("test")
    distance, entropy = scores(look(network, data, test))
    result: dict[str, Any] = {
        **model.to_json(),
        "test_vertebrae": len(test),
        "flagged_test": flagged(distance, entropy),
        "flagged_external": flagged(*scores(look(network, data, some("external")))) if len(some("external")) else None,
    }
    positive = np.concatenate([np.zeros(len(test), dtype=bool), np.ones(len(test), dtype=bool)])
    for name, change in ALTERATIONS.items():
        far, doubt = scores(look(network, data, test, change, seed))
        result[name] = {
            "flagged": flagged(far, doubt),
            "auroc_distance": auc(np.concatenate([distance, far]), positive),
            "auroc_entropy": auc(np.concatenate([entropy, doubt]), positive),
        }
    return result


def main() -> None:
    """Command line of ``python -m train.outliers``."""
    parser = argparse.ArgumentParser(description="fit and measure the flag for vertebrae unlike the training set")
    parser.add_argument("--run", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--out", type=Path, help="write the measured figures here; default: outliers.json of the run")
    given = parser.parse_args()
    run = load_run(given.run)
    data = open_set(Path(run.settings["data"]))
    figures = measure_outliers(run.network, data, fit_outliers(run.network, data))
    (given.out or given.run / "outliers.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
