"""Judge a trained network on the virtual cohort, beside the plain HU model, with intervals that resample patients.

    python -m train.evaluate --run runs/multitask

Truth is the simulator's sBMD, not the noisy reading that training saw; so a perfect reader of the CT still errs by what
no CT shows (`floor`). Calibration is fitted on validation patients only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize
from torch import nn
from tqdm import tqdm

from osteo_daemon.network.config import CLASSES, Calibration
from osteo_daemon.network.encoder import HU_STATISTICS, HuStatistics
from osteo_daemon.network.heads import class_probabilities
from osteo_daemon.network.multitask import MultitaskMoE
from train import truth
from train.data import NO_LABEL, VoiSet, batches, open_set
from train.loop import load_run, to_device
from train.metrics import (
    auc,
    balanced_accuracy,
    cluster_bootstrap,
    expected_calibration_error,
    macro_f1,
    pearson,
    regression,
    sensitivity_specificity,
)
from train.splits import Part

Vec = npt.NDArray[np.float64]

FLOOR_RMSE_G_CM2 = math.hypot(truth.PATIENT_RESIDUAL_G_CM2, truth.LEVEL_RESIDUAL_G_CM2)
"""RMSE of a reader who knows everything about the patient but what no CT shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Uncalibrated output for N rows of a data set, as arrays in the order of ``index``."""

    index: npt.NDArray[np.int64]
    class_logits: Vec
    bmd: Vec
    bmd_sd: Vec
    level_logits: Vec
    gate_weights: Vec
    core_hu: Vec

    def take(self, chosen: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Raw:
        """The chosen samples."""
        return Raw(*(getattr(self, name)[chosen] for name in Raw.__dataclass_fields__))


def run_network(
    network: nn.Module,
    data: VoiSet,
    indices: npt.NDArray[np.int64],
    devices: list[str],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    quiet: bool = False,
) -> Raw:
    """Predict rows of a data set with their true level given."""
    if not isinstance(network, MultitaskMoE):
        raise TypeError("need a MultitaskMoE")
    device = torch.device("cpu") if device is None else device
    statistics = network.hu_statistics or HuStatistics(network.config).to(device)
    core = HU_STATISTICS.index("core_mean")
    collected: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in Raw.__dataclass_fields__}
    network.eval()
    steps = batches(data, indices, network.config, devices, batch_size)
    with torch.inference_mode():
        for batch in tqdm(steps, total=math.ceil(len(indices) / batch_size), desc="predict", disable=quiet):
            moved = to_device(batch, device)
            out = network(moved.hu, moved.level)
            values = {
                "index": batch.index,
                "class_logits": out.class_logits,
                "bmd": out.bmd,
                "bmd_sd": (0.5 * out.bmd_log_variance).exp(),
                "level_logits": out.level_logits,
                "gate_weights": out.gate_weights.mean(1),
                "core_hu": statistics.raw(moved.hu)[:, core],
            }
            for name, value in values.items():
                array = value.cpu().numpy()
                collected[name].append(array if name == "index" else array.astype(np.float64))
    return Raw(**{name: np.concatenate(parts) for name, parts in collected.items()})


def fit_calibration(raw: Raw, data: VoiSet) -> Calibration:
    """Temperatures, uncertainty factor and conformal half width from validation patients' own targets."""
    rows = [data.rows[i] for i in raw.index]
    level_names = list(data.config["levels"])
    labelled = np.array([row.diagnosis != NO_LABEL for row in rows])
    diagnoses = torch.tensor([row.diagnosis for row in rows])[torch.from_numpy(labelled)]
    levels = torch.tensor([level_names.index(row.level) for row in rows])
    logits = torch.from_numpy(raw.class_logits[labelled])
    level_logits = torch.from_numpy(raw.level_logits)

    def class_nll(temperature: float) -> float:
        probability = class_probabilities(logits, len(CLASSES), temperature).clamp_min(1e-6)
        return float(-probability.gather(1, diagnoses[:, None]).log().mean())

    def level_nll(temperature: float) -> float:
        return float(nn.functional.cross_entropy(level_logits / temperature, levels))

    target = np.array([np.nan if row.target_sbmd_g_cm2 is None else row.target_sbmd_g_cm2 for row in rows])
    known = np.isfinite(target)
    standard = np.abs(raw.bmd[known] - target[known]) / raw.bmd_sd[known]
    factor = float(np.sqrt(np.square(standard).mean()))
    n = len(standard)
    quantile = min(1.0, math.ceil((n + 1) * 0.9) / n)
    return Calibration(
        class_temperature=_best_temperature(class_nll),
        level_temperature=_best_temperature(level_nll),
        bmd_sd_factor=factor,
        bmd_interval_90=float(np.quantile(standard / factor, quantile, method="higher")),
    )


def _best_temperature(loss: Callable[[float], float]) -> float:
    best = optimize.minimize_scalar(
        lambda log_t: loss(math.exp(log_t)), bounds=(math.log(0.2), math.log(8.0)), method="bounded"
    )
    return float(math.exp(best.x))


@dataclass(frozen=True, slots=True)
class HuModel:
    """The plain model: sBMD is linear in the mean HU of the trabecular core, with an offset for each level."""

    slope: float
    intercept: dict[str, float]

    @classmethod
    def fit(cls, raw: Raw, data: VoiSet) -> HuModel:
        """Least squares on the same training rows and targets as the network's."""
        rows = [data.rows[i] for i in raw.index]
        names = list(truth.LEVEL_OFFSET_G_CM2)
        design = np.zeros((len(rows), 1 + len(names)))
        design[:, 0] = raw.core_hu
        for k, row in enumerate(rows):
            design[k, 1 + names.index(row.level)] = 1.0
        target = np.array([row.target_sbmd_g_cm2 for row in rows], dtype=np.float64)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        return cls(float(solution[0]), {name: float(value) for name, value in zip(names, solution[1:], strict=True)})

    def predict(self, raw: Raw, data: VoiSet) -> Vec:
        """(N,) sBMD."""
        return np.array(
            [self.slope * hu + self.intercept[data.rows[i].level] for hu, i in zip(raw.core_hu, raw.index, strict=True)]
        )


def judge(raw: Raw, data: VoiSet, calibration: Calibration, baseline: HuModel, repeats: int = 500) -> dict[str, Any]:
    """All figures of one part of the data set: network and baseline, each with a 95 % interval over patients."""
    rows = [data.rows[i] for i in raw.index]
    level_names = list(data.config["levels"])
    all_patients = np.array([row.patient for row in rows])
    level_true = np.array([level_names.index(row.level) for row in rows])
    level_guess = raw.level_logits.argmax(1)
    figures: dict[str, Any] = {
        "vertebrae": len(rows),
        "patients": len(np.unique(all_patients)),
        "floor_rmse_g_cm2": FLOOR_RMSE_G_CM2,
        "level": cluster_bootstrap(
            all_patients,
            {
                "accuracy": lambda k: float((level_guess[k] == level_true[k]).mean()),
                "within_one": lambda k: float((np.abs(level_guess[k] - level_true[k]) <= 1).mean()),
            },
            repeats=repeats,
        ),
        "gate": {
            "mean_weights": raw.gate_weights.mean(0).round(4).tolist(),
            "by_site": {
                site: raw.gate_weights[[row.site == site for row in rows]].mean(0).round(4).tolist()
                for site in sorted({row.site for row in rows})
            },
        },
    }
    measured = np.array([row.sbmd_g_cm2 is not None for row in rows])
    part = raw.take(measured)
    rows = [row for row, known in zip(rows, measured, strict=True) if known]
    patients = all_patients[measured]
    sbmd = np.array([row.sbmd_g_cm2 for row in rows], dtype=np.float64)
    true_class = np.array([row.true_diagnosis for row in rows])
    bmd = calibration.bmd_slope * part.bmd + calibration.bmd_intercept_g_cm2
    sd = part.bmd_sd * calibration.bmd_sd_factor
    probability = class_probabilities(
        torch.from_numpy(part.class_logits), len(CLASSES), calibration.class_temperature
    ).numpy()
    guess = probability.argmax(1)
    plain = baseline.predict(part, data)
    plain_t = np.array([truth.t_score(b, row.level) for b, row in zip(plain, rows, strict=True)])
    plain_class = np.array([truth.diagnosis(t) for t in plain_t])
    half = calibration.bmd_interval_90 * sd
    own = {
        **_tasks(bmd, sbmd, probability[:, 2], 1.0 - probability[:, 0], guess, true_class),
        "interval_90_coverage": lambda k: float((np.abs(bmd[k] - sbmd[k]) <= half[k]).mean()),
        "class_ece": lambda k: expected_calibration_error(probability[k], true_class[k]),
    }
    figures["network"] = cluster_bootstrap(patients, own, repeats=repeats)
    figures["core_hu_linear"] = cluster_bootstrap(
        patients, _tasks(plain, sbmd, -plain_t, -plain_t, plain_class, true_class), repeats=repeats
    )
    figures["network_minus_core_hu_linear"] = cluster_bootstrap(
        patients,
        {
            "mae": lambda k: float(np.abs(bmd[k] - sbmd[k]).mean() - np.abs(plain[k] - sbmd[k]).mean()),
            "auc_osteoporosis": lambda k: (
                auc(probability[k, 2], true_class[k] == 2) - auc(-plain_t[k], true_class[k] == 2)
            ),
        },
        repeats=repeats,
    )
    figures["patient"] = _by_patient(part, rows, probability, bmd, repeats)
    figures["sites"] = {
        site: regression(bmd[[row.site == site for row in rows]], sbmd[[row.site == site for row in rows]])
        for site in sorted({row.site for row in rows})
    }
    return figures


def _tasks(
    bmd: Vec, sbmd: Vec, osteoporosis: Vec, low: Vec, guess: npt.NDArray[np.int64], true: npt.NDArray[np.int64]
) -> dict[str, Callable[[npt.NDArray[np.int64]], float]]:
    def regress(name: str) -> Callable[[npt.NDArray[np.int64]], float]:
        return lambda k: regression(bmd[k], sbmd[k])[name]

    return {
        **{name: regress(name) for name in ("mae", "rmse", "bias", "loa_low", "loa_high", "pearson")},
        "auc_osteoporosis": lambda k: auc(osteoporosis[k], true[k] == 2),
        "auc_low_bone_mass": lambda k: auc(low[k], true[k] >= 1),
        "sensitivity_osteoporosis": lambda k: sensitivity_specificity(guess[k] == 2, true[k] == 2)[0],
        "specificity_osteoporosis": lambda k: sensitivity_specificity(guess[k] == 2, true[k] == 2)[1],
        "balanced_accuracy": lambda k: balanced_accuracy(guess[k], true[k]),
        "macro_f1": lambda k: macro_f1(guess[k], true[k]),
    }


def _by_patient(raw: Raw, rows: list[Any], probability: Vec, bmd: Vec, repeats: int) -> dict[str, Any]:
    """One number a patient: mean over L1-L4 for the network, HU of L1 for the baseline; truth is the mean of L1-L4."""
    names = sorted({row.patient for row in rows})
    members = {name: [k for k, row in enumerate(rows) if row.patient == name] for name in names}
    names = [name for name in names if any(rows[k].level == "L1" for k in members[name])]
    true = np.array([truth.diagnosis(truth.t_score(np.mean([rows[k].sbmd_g_cm2 for k in members[n]]))) for n in names])
    score = np.array([probability[members[n], 2].mean() for n in names])
    mean_bmd = np.array([bmd[members[n]].mean() for n in names])
    true_bmd = np.array([np.mean([rows[k].sbmd_g_cm2 for k in members[n]]) for n in names])
    l1_hu = np.array([next(raw.core_hu[k] for k in members[n] if rows[k].level == "L1") for n in names])
    values = cluster_bootstrap(
        np.array(names),
        {
            "network_auc_osteoporosis": lambda k: auc(score[k], true[k] == 2),
            "l1_hu_auc_osteoporosis": lambda k: auc(-l1_hu[k], true[k] == 2),
            "network_pearson": lambda k: pearson(mean_bmd[k], true_bmd[k]),
            "l1_hu_pearson": lambda k: pearson(l1_hu[k], true_bmd[k]),
            "network_mae": lambda k: float(np.abs(mean_bmd[k] - true_bmd[k]).mean()),
        },
        repeats=repeats,
    )
    return {"patients": len(names), "osteoporosis": int((true == 2).sum()), **values}


def evaluate_run(folder: Path, repeats: int = 500) -> dict[str, Any]:
    """Calibrate on validation patients, judge on test and external patients; writes evaluation.json beside the run."""
    run = load_run(folder)
    data = open_set(Path(run.settings["data"]))
    parts: tuple[Part, ...] = ("train", "val", "test", "external")
    raws = {
        part: run_network(run.network, data, data.indices(part, labelled=part == "train"), run.devices)
        for part in parts
    }
    calibration = fit_calibration(raws["val"], data)
    baseline = HuModel.fit(raws["train"], data)
    result = {
        "calibration": calibration.to_json(),
        "baseline": {"slope_g_cm2_per_hu": baseline.slope, "intercept_g_cm2": baseline.intercept},
        "test": judge(raws["test"], data, calibration, baseline, repeats),
        "external": judge(raws["external"], data, calibration, baseline, repeats),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    return result


def main() -> None:
    """Command line of ``python -m train.evaluate``."""
    parser = argparse.ArgumentParser(description="judge a trained network on its cohort")
    parser.add_argument("--run", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--repeats", type=int, default=500)
    given = parser.parse_args()
    result = evaluate_run(given.run, given.repeats)
    for part in ("test", "external"):
        for model in ("network", "core_hu_linear"):
            line = "  ".join(
                f"{name} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
                for name, value in result[part][model].items()
                if name in ("mae", "pearson", "auc_osteoporosis", "auc_low_bone_mass")
            )
            print(f"{part:9} {model:15} {line}")


if __name__ == "__main__":
    main()
