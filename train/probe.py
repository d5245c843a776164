"""What a frozen encoder knows: ridge regression from its features, judged on patients that the fit did not see.

    python -m train.probe --data runs/cohort --encoder runs/pretrain/encoder.pt

Three questions: true sBMD (Pearson and MAE), diagnosis (AUC of osteoporosis) and vertebral level (accuracy). The
strength of the ridge is chosen on validation patients, the numbers are of test patients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.encoder import VertebraEncoder
from train.data import VoiSet, batches, open_set
from train.metrics import Metric, auc, cluster_bootstrap, pearson

Floats = npt.NDArray[np.float64]

RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties per row, on standardised features."""
_OSTEOPOROSIS: Final = 2


def encode(
    encoder: VertebraEncoder, data: VoiSet, network: MoEConfig, indices: npt.NDArray[np.int64], device: torch.device
) -> Floats:
    """(N, F) pooled features of these rows, not augmented."""
    encoder.eval()
    with torch.inference_mode():
        found = [encoder(batch.hu.to(device)).double().cpu() for batch in batches(data, indices, network, [], 32)]
    return torch.cat(found).numpy()


def linear_probe(
    encoder: VertebraEncoder,
    data: VoiSet,
    network: MoEConfig,
    device: torch.device,
    *,
    most: int = 1_000_000,
    repeats: int = 0,
) -> dict[str, float]:
    """Fit and judge; rows with a known sBMD only.

    Args:
        most: rows of each part, the first ones.
        repeats: of a bootstrap over patients, which adds ``NAME_low`` and ``NAME_high``.

    Raises:
        ValueError: training, validation or test patients are missing.
    """
    parts: dict[str, npt.NDArray[np.int64]] = {}
    for part in ("train", "val", "test"):
        indices = np.array([i for i in data.indices(part) if data.rows[i].sbmd_g_cm2 is not None], dtype=np.int64)
        if len(indices) < 2:
            raise ValueError(f"the probe needs vertebrae of the part {part} with a known sBMD")
        parts[part] = indices[:most]
    found = {part: encode(encoder, data, network, indices, device) for part, indices in parts.items()}
    mean, sd = found["train"].mean(0), found["train"].std(0) + 1e-6
    x = {part: np.clip((values - mean) / sd, -10, 10) for part, values in found.items()}
    rows = {part: [data.rows[i] for i in indices] for part, indices in parts.items()}
    levels = sorted({row.level for row in rows["train"]})

    def targets(part: str) -> tuple[Floats, Floats, Floats]:
        sbmd = np.array([[row.sbmd_g_cm2] for row in rows[part]], dtype=np.float64)
        worst = np.array([[row.true_diagnosis == _OSTEOPOROSIS] for row in rows[part]], dtype=np.float64)
        level = np.array([[row.level == name for name in levels] for row in rows[part]], dtype=np.float64)
        return sbmd, worst, level

    y = {part: targets(part) for part in parts}
    scores = [_best_ridge(x, [y[part][k] for part in ("train", "val")]) for k in range(3)]
    sbmd, worst, level = (predict(x["test"]) for predict in scores)
    true_sbmd, true_worst, true_level = y["test"]
    right = level.argmax(1) == true_level.argmax(1)
    metrics: dict[str, Metric] = {
        "bmd_pearson": lambda k: pearson(sbmd[k, 0], true_sbmd[k, 0]),
        "bmd_mae_g_cm2": lambda k: float(np.abs(sbmd[k] - true_sbmd[k]).mean()),
        "osteoporosis_auc": lambda k: auc(worst[k, 0], true_worst[k, 0] > 0),
        "level_accuracy": lambda k: float(right[k].mean()),
    }
    everything = np.arange(len(right))
    result = {name: metric(everything) for name, metric in metrics.items()}
    if repeats:
        patients = np.array([row.patient for row in rows["test"]])
        for name, found_interval in cluster_bootstrap(patients, metrics, repeats=repeats).items():
            result |= {f"{name}_low": found_interval["low"], f"{name}_high": found_interval["high"]}
    return result


def _best_ridge(x: dict[str, Floats], targets: list[Floats]) -> Any:
    """A function from features to predictions, its penalty the best of `RIDGES` by validation squared error."""
    train, val = targets
    centre = train.mean(0)
    gram, moment = x["train"].T @ x["train"], x["train"].T @ (train - centre)
    eye = np.eye(len(gram)) * len(train)
    fits = [np.linalg.solve(gram + ridge * eye, moment) for ridge in RIDGES]
    weights = min(fits, key=lambda w: float(np.square(x["val"] @ w + centre - val).mean()))
    return lambda values: values @ weights + centre


def load_encoder(path: Path, network: MoEConfig) -> VertebraEncoder:
    """The encoder that ``train.pretrain`` wrote."""
    encoder = VertebraEncoder(network)
    encoder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["encoder"])
    return encoder


def main() -> None:
    """Command line of ``python -m train.probe``; without ``--encoder`` an untrained one is judged."""
    parser = argparse.ArgumentParser(description="linear probe of a frozen encoder")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the untrained encoder")
    given = parser.parse_args()
    network = MoEConfig()
    torch.manual_seed(given.seed)
    encoder = VertebraEncoder(network) if given.encoder is None else load_encoder(given.encoder, network)
    print(json.dumps(linear_probe(encoder, open_set(given.data), network, torch.device("cpu")), indent=1))


if __name__ == "__main__":
    main()
