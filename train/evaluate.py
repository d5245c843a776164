"""Judge a trained network on the virtual cohort beside its baselines, with intervals that resample patients.

    python -m train.evaluate --run runs/multitask

Truth is the simulator's sBMD, not the noisy reading that training saw; so a perfect reader of the CT still errs by what
no CT shows (`train.judging.ceiling`). Calibration and points of operation come from validation patients only. Beside
the usual figures stand two that only a simulator allows: how far the prediction follows when the density of the
trabecular core alone is changed, and how far it moves when the same vertebra comes from a coarser series.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from osteo_daemon.inference.level_sequence import REACH, shift_scores
from osteo_daemon.network.config import CLASSES, Calibration
from osteo_daemon.network.heads import class_probabilities
from osteo_daemon.network.multitask import MultitaskMoE
from train.baselines import features_of, rows_with_truth, run_baselines
from train.calibrate import fit_calibration
from train.counterfactual import DensityChange
from train.data import NO_LABEL, VoiSet, batches, open_set
from train.judging import (
    Index,
    Judged,
    Metric,
    Vec,
    by_subgroup,
    ceiling,
    decision_curve,
    difference,
    metrics_of,
    operating_points,
    patients_of,
    with_intervals,
)
from train.loop import Run, load_run, to_device
from train.metrics import cluster_bootstrap
from train.readings import Densitometry, remeasure
from train.splits import Part

ADDED_MG_CM3: Final = (16.0, 32.0, 48.0)
"""Changes of the core for the causal slope; 20, 40 and 60 HU at 120 kVp."""
COMPARED: Final = ("mae", "rmse", "cross_device_mae", "device_bias", "screening_auc", "diagnosis_auc")
IN_SUBGROUPS: Final = ("mae", "bias", "cross_device_mae", "screening_auc", "diagnosis_auc", "class_ece")


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Uncalibrated output for N rows of a data set, as arrays in the order of ``index``."""

    index: Index
    class_logits: Vec
    bmd: Vec
    bmd_sd: Vec
    level_logits: Vec
    gate_weights: Vec

    def take(self, chosen: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Raw:
        """The chosen samples."""
        return Raw(*(getattr(self, name)[chosen] for name in Raw.__dataclass_fields__))


def run_network(
    network: nn.Module,
    data: VoiSet,
    indices: Index,
    devices: list[str],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    quiet: bool = False,
    coarse: bool = False,
    change: DensityChange | None = None,
) -> Raw:
    """Predict rows of a data set with their true level given.

    Args:
        coarse: as a coarser series shows them.
        change: with another density of the core.
    """
    if not isinstance(network, MultitaskMoE):
        raise TypeError("need a MultitaskMoE")
    device = torch.device("cpu") if device is None else device
    collected: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in Raw.__dataclass_fields__}
    network.eval()
    steps = batches(data, indices, network.config, devices, batch_size, coarse=coarse, change=change)
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
            }
            for name, value in values.items():
                array = value.cpu().numpy()
                collected[name].append(array if name == "index" else array.astype(np.float64))
    return Raw(**{name: np.concatenate(parts) for name, parts in collected.items()})


def judged_of(raw: Raw, calibration: Calibration, operating: Vec) -> Judged:
    """Calibrated values."""
    probability = class_probabilities(
        torch.from_numpy(raw.class_logits), len(CLASSES), calibration.class_temperature, calibration.class_shift
    )
    level = torch.from_numpy(raw.level_logits / calibration.level_temperature).softmax(1)
    return Judged(
        index=raw.index,
        probability=probability.numpy(),
        bmd=calibration.bmd_slope * raw.bmd + calibration.bmd_intercept_g_cm2,
        half=calibration.bmd_interval_90 * raw.bmd_sd * calibration.bmd_sd_factor * abs(calibration.bmd_slope),
        level=level.numpy(),
        operating=operating,
    )


def level_metrics(judged: Judged, data: VoiSet) -> dict[str, Metric]:
    """Level of single vertebrae, and of all vertebrae of a patient read together (`inference.level_sequence`)."""
    rows = [data.rows[i] for i in judged.index]
    names = list(data.config["levels"])
    true = np.array([names.index(row.level) for row in rows])
    guess = judged.level.argmax(1)
    patients = patients_of(rows)
    right = np.zeros(len(rows))
    for patient in np.unique(patients):
        own = np.flatnonzero(patients == patient)
        scores = shift_scores(np.log(np.maximum(judged.level[own], 1e-4)), true[own])
        right[own] = float(scores.argmax() == REACH)
    return {
        "level_accuracy": lambda k: float((guess[k] == true[k]).mean()),
        "level_within_one": lambda k: float((np.abs(guess[k] - true[k]) <= 1).mean()),
        "sequence_accuracy": lambda k: float(right[k].mean()),
    }


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """A run judged: by part the L1-L4 values, the same from coarser series, and all levels for the level task."""

    calibration: Calibration
    parts: dict[str, Judged]
    coarse: dict[str, Judged]
    every_level: dict[str, Judged]
    gate: dict[str, Vec]
    slope: dict[str, float]


def evaluate_network(run: Run, data: VoiSet, parts: tuple[Part, ...] = ("test", "external")) -> Evaluated:
    """Predict everything that figures are made of; ``data`` has the run's own readings."""
    val = run_network(run.network, data, data.indices("val"), run.devices, quiet=True)
    calibration = fit_calibration(val.class_logits, val.level_logits, val.bmd, val.bmd_sd, val.index, data)
    first = judged_of(val, calibration, np.full(2, np.nan))
    own = np.array([data.rows[i].diagnosis for i in val.index])
    operating = operating_points(first.probability[own != NO_LABEL], own[own != NO_LABEL])
    found = Evaluated(calibration, {}, {}, {}, {}, {})
    for part in parts:
        indices = data.indices(part)
        raw = run_network(run.network, data, indices, run.devices, quiet=True)
        measured = np.isin(raw.index, rows_with_truth(data, indices))
        found.every_level[part] = judged_of(raw, calibration, operating)
        found.parts[part] = judged_of(raw.take(measured), calibration, operating)
        found.gate[part] = raw.gate_weights
        known = raw.index[measured]
        if data.coarse is not None:
            thick = run_network(run.network, data, known, run.devices, quiet=True, coarse=True)
            found.coarse[part] = judged_of(thick, calibration, operating)
        if data.core is not None:
            found.slope[part] = _causal_slope(run, data, known[::3], calibration, found.parts[part].bmd[::3])
    return found


def _causal_slope(run: Run, data: VoiSet, index: Index, calibration: Calibration, base: Vec) -> float:
    """Slope of the prediction over the change of the core alone, as a share of the simulator's own slope."""
    moved = []
    for added in ADDED_MG_CM3:
        change = DensityChange(added)
        raw = run_network(run.network, data, index, run.devices, quiet=True, change=change)
        bmd = calibration.bmd_slope * raw.bmd + calibration.bmd_intercept_g_cm2
        moved.append(float((bmd - base).mean()) / change.sbmd_g_cm2)
    return float(np.mean(moved))


def evaluate_run(folder: Path, repeats: int = 500) -> dict[str, Any]:
    """Calibrate on validation patients, judge on test and external patients; writes evaluation.json beside the run."""
    run = load_run(folder)
    data = open_set(Path(run.settings["data"]))
    if run.settings["densitometry"] is not None:
        data = remeasure(data, Densitometry(**run.settings["densitometry"]))
    found = evaluate_network(run, data)
    features = features_of(data, run.network.config, Path(run.settings["data"]))
    baselines = run_baselines(data, features, {part: judged.index for part, judged in found.parts.items()})
    result: dict[str, Any] = {"calibration": found.calibration.to_json()}
    for part, judged in found.parts.items():
        result[part] = _figures(part, judged, found, {k: v[part] for k, v in baselines.items()}, data, repeats)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    return result


def _figures(
    part: str, judged: Judged, found: Evaluated, baselines: dict[str, Judged], data: VoiSet, repeats: int
) -> dict[str, Any]:
    rows = [data.rows[i] for i in judged.index]
    everything = [data.rows[i] for i in found.every_level[part].index]
    metrics = metrics_of(judged, rows)
    others = {name: metrics_of(other, rows) for name, other in baselines.items()}
    patients = np.unique(patients_of(rows))
    figures: dict[str, Any] = {
        "vertebrae": len(rows),
        "patients": len(patients),
        "vertebrae_with_osteoporosis": sum(row.true_diagnosis == 2 for row in rows),
        "network": with_intervals(metrics, rows, repeats),
        "ceiling": with_intervals(ceiling(rows), rows, repeats),
        "baselines": {name: with_intervals(other, rows, repeats) for name, other in others.items()},
        "network_minus_baseline": {
            name: with_intervals(difference(metrics, other, COMPARED), rows, repeats) for name, other in others.items()
        },
        "level": cluster_bootstrap(
            patients_of(everything), level_metrics(found.every_level[part], data), repeats=repeats
        ),
        "subgroups": by_subgroup(metrics, rows, IN_SUBGROUPS),
        "decision_curve": {
            name: decision_curve(model, rows) for name, model in {"network": judged, **baselines}.items()
        },
        "causal_slope_share": found.slope.get(part),
        "gate_by_site": {
            site: found.gate[part][[row.site == site for row in everything]].mean(0).round(4).tolist()
            for site in sorted({row.site for row in everything})
        },
    }
    if part in found.coarse:
        moved = found.coarse[part].bmd - judged.bmd
        coarse = metrics_of(replace(found.coarse[part]), rows)
        figures["coarse"] = {
            "mean_shift_g_cm2": float(moved.mean()),
            "mean_absolute_shift_g_cm2": float(np.abs(moved).mean()),
            "share_within_0.03": float((np.abs(moved) < 0.03).mean()),
            **{name: coarse[name](np.arange(len(rows))) for name in ("mae", "screening_auc", "diagnosis_auc")},
        }
    return figures


def main() -> None:
    """Command line of ``python -m train.evaluate``."""
    parser = argparse.ArgumentParser(description="judge a trained network on its cohort")
    parser.add_argument("--run", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--repeats", type=int, default=500)
    given = parser.parse_args()
    result = evaluate_run(given.run, given.repeats)
    for part in ("test", "external"):
        for name, model in {"network": result[part]["network"], **result[part]["baselines"]}.items():
            line = "  ".join(
                f"{key} {model[key]['value']:.3f} [{model[key]['low']:.3f}, {model[key]['high']:.3f}]"
                for key in ("mae", "pearson", "screening_auc", "diagnosis_auc")
                if key in model
            )
            print(f"{part:9} {name:20} {line}")


if __name__ == "__main__":
    main()
