"""Tables from finished ablation runs: means over seeds, intervals over patients, differences on the same patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from train.ablation import PARTS, SEEDS, VARIANTS, run_folder
from train.baselines import NAMES
from train.data import VoiRow, VoiSet
from train.evaluate import COMPARED, IN_SUBGROUPS
from train.judging import (
    Judged,
    Metric,
    by_subgroup,
    ceiling,
    decision_curve,
    difference,
    mean_of,
    metrics_of,
    with_intervals,
)
from train.readings import Densitometry, Scheme, remeasure

TABLE: Final = (
    "mae",
    "rmse",
    "pearson",
    "bias",
    "loa_low",
    "loa_high",
    "cross_device_mae",
    "device_bias",
    "screening_auc",
    "screening_sensitivity",
    "screening_specificity",
    "screening_balanced_accuracy",
    "screening_macro_f1",
    "diagnosis_auc",
    "diagnosis_sensitivity",
    "diagnosis_specificity",
    "diagnosis_balanced_accuracy",
    "diagnosis_macro_f1",
    "balanced_accuracy",
    "macro_f1",
    "class_ece",
    "interval_90_coverage",
)
BASELINE_TITLES: Final = {
    "l1_hu_threshold": "HU of L1 alone",
    "core_hu_linear": "linear in trabecular HU",
    "vertebra_hu_linear": "linear in whole-vertebra HU",
    "radiomics_boosting": "radiomics + gradient boosting",
}
CONTROLS: Final = {"one-device": "one-device-no-experts", "shuffled": "shuffled-no-experts"}

Interval = list[float | None]


def finished(root: Path, seeds: Sequence[int] = SEEDS) -> dict[str, list[int]]:
    """Seeds done of every variant that has any."""
    done = {name: [s for s in seeds if (run_folder(root, name, s) / "result.json").exists()] for name in VARIANTS}
    return {name: found for name, found in done.items() if found}


def figures_of(root: Path, data: VoiSet, repeats: int = 300, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """All tables. Intervals are [value, low, high], None where a class was missing.

    Args:
        root: of the runs of `train.ablation`.
        data: the cohort they ran on.
        repeats: of the bootstrap.

    Raises:
        ValueError: the full model has no finished run.
    """
    done = finished(root, seeds)
    if "full" not in done:
        raise ValueError(f"{root} has no finished run of the full model; call python -m train.ablation")
    schemes: dict[Scheme, VoiSet] = {
        scheme: remeasure(data, Densitometry(scheme=scheme)) for scheme in ("sites", "one-device", "shuffled")
    }
    figures: dict[str, Any] = {
        "cohort_sha256": data.config["sha256"],
        "patients": {part: len({r.patient for r in data.rows if r.part == part}) for part in ("train", "val", *PARTS)},
        "labelled_training_patients": len(
            {row.patient for row in schemes["sites"].rows if row.part == "train" and row.target_sbmd_g_cm2 is not None}
        ),
        "runs": {name: {"seeds": len(found), **_run_facts(root, name, found)} for name, found in done.items()},
    }
    for part in PARTS:
        figures[part] = _part(root, part, done, schemes, repeats)
    return figures


def _run_facts(root: Path, name: str, seeds: list[int]) -> dict[str, Any]:
    results = [json.loads((run_folder(root, name, seed) / "result.json").read_text()) for seed in seeds]
    facts: dict[str, Any] = {
        "parameters": results[0]["parameters"],
        "minutes_mean": round(float(np.mean([r["training_seconds"] for r in results])) / 60, 2),
    }
    for part in PARTS:
        for key in ("level_accuracy", "sequence_accuracy", "causal_slope_share", "coarse_shift_g_cm2"):
            if key in results[0][part]:
                facts[f"{part}_{key}"] = round(float(np.mean([r[part][key] for r in results])), 4)
    return facts


def _part(
    root: Path, part: str, done: dict[str, list[int]], schemes: dict[Scheme, VoiSet], repeats: int
) -> dict[str, Any]:
    judged = {
        name: [Judged.load(run_folder(root, name, seed) / f"{part}.npz") for seed in seeds]
        for name, seeds in done.items()
    }
    baselines = {name: Judged.load(root / "baselines" / f"{name}-{part}.npz") for name in NAMES}
    index = judged["full"][0].index
    rows = {scheme: [held.rows[i] for i in index] for scheme, held in schemes.items()}
    metrics = {
        name: mean_of([metrics_of(one, rows[VARIANTS[name].scheme]) for one in runs]) for name, runs in judged.items()
    }
    others = {name: metrics_of(one, rows["sites"]) for name, one in baselines.items()}
    plain = rows["sites"]
    return {
        "vertebrae": len(index),
        "patients": len({row.patient for row in plain}),
        "vertebrae_with_osteoporosis": sum(row.true_diagnosis == 2 for row in plain),
        "vertebrae_with_low_bone_mass": sum(row.true_diagnosis >= 1 for row in plain),
        "ceiling": _intervals(ceiling(plain), plain, repeats),
        "variants": {
            name: _intervals({k: found[k] for k in TABLE if k in found}, plain, repeats)
            for name, found in metrics.items()
        },
        "baselines": {
            name: _intervals({k: found[k] for k in TABLE if k in found}, plain, repeats)
            for name, found in others.items()
        },
        "full_minus": {
            name: _intervals(_difference_of_seeds("full", name, judged, rows), plain, repeats)
            for name in judged
            if name != "full" and VARIANTS[name].scheme == "sites"
        },
        "full_minus_baseline": {
            name: _intervals(difference(metrics["full"], found, COMPARED), plain, repeats)
            for name, found in others.items()
        },
        "controls_experts_minus_none": {
            name: _intervals(_difference_of_seeds(name, without, judged, rows), plain, repeats)
            for name, without in CONTROLS.items()
            if name in judged and without in judged
        },
        "full_by_subgroup": by_subgroup(metrics["full"], plain, IN_SUBGROUPS),
        "net_benefit": {
            name: decision_curve(one, plain) for name, one in {"full": judged["full"][0], **baselines}.items()
        },
    }


def _difference_of_seeds(
    first: str, second: str, judged: Mapping[str, list[Judged]], rows: Mapping[Scheme, list[VoiRow]]
) -> dict[str, Metric]:
    """Mean difference over the seeds that both have."""
    count = min(len(judged[first]), len(judged[second]))
    one, other = (
        mean_of([metrics_of(run, rows[VARIANTS[name].scheme]) for run in judged[name][:count]])
        for name in (first, second)
    )
    return difference(one, other, COMPARED)


def _intervals(metrics: Mapping[str, Metric], rows: Sequence[VoiRow], repeats: int) -> dict[str, Interval]:
    found = with_intervals(metrics, rows, repeats)
    return {
        name: [round(v[key], 5) if np.isfinite(v[key]) else None for key in ("value", "low", "high")]
        for name, v in found.items()
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """The main table of each part and the differences, for a document."""
    shown = (
        ("mae", "MAE, g/cm2"),
        ("cross_device_mae", "cross-device MAE, g/cm2"),
        ("device_bias", "RMS bias of devices, g/cm2"),
        ("screening_auc", "AUC, screening"),
        ("diagnosis_auc", "AUC, diagnosis"),
        ("class_ece", "calibration error"),
    )
    lines = []
    for part, heading in (("test", "Test patients of the three sites"), ("external", "External hospital")):
        here = figures[part]
        columns = [(key, title) for key, title in shown if any(key in row for row in here["variants"].values())]
        lines += ["", f"### {heading}", "", f"{here['patients']} patients, {here['vertebrae']} vertebrae L1-L4.", ""]
        lines += [
            "| | seeds | " + " | ".join(title for _, title in columns) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        for name, row in here["variants"].items():
            cells = [_cell(row.get(key)) for key, _ in columns]
            lines.append(f"| {VARIANTS[name].title} | {figures['runs'][name]['seeds']} | " + " | ".join(cells) + " |")
        others = [(f"*{BASELINE_TITLES[name]}*", row) for name, row in here["baselines"].items()]
        for title, row in [*others, ("**ideal reader**", here["ceiling"])]:
            lines.append(f"| {title} | | " + " | ".join(_cell(row.get(key)) for key, _ in columns) + " |")
        compared = [(key, title) for key, title in shown if key in COMPARED and key in dict(columns)]
        lines += ["", "Full model minus the row, on the same patients:", ""]
        lines += ["| | " + " | ".join(title for _, title in compared) + " |", "|---|" + "---|" * len(compared)]
        rows = [(VARIANTS[name].title, row) for name, row in here["full_minus"].items()]
        rows += [(f"*{BASELINE_TITLES[name]}*", row) for name, row in here["full_minus_baseline"].items()]
        rows += [
            (f"{VARIANTS[name].title} minus without experts", row)
            for name, row in here["controls_experts_minus_none"].items()
        ]
        lines += [
            f"| {title} | " + " | ".join(_cell(row.get(key)) for key, _ in compared) + " |" for title, row in rows
        ]
    return "\n".join(lines) + "\n"


_PAGE: Final = """\
# Ablation on the virtual cohort

Made by `python -m benchmarks.ablation` from `docs/results/ablation.json`; don't edit it. Runs: `python -m
train.ablation`. Virtual patients only; nothing here is a clinical result.

{patients[train]} training patients ({labelled} of them with a reading), {patients[val]} for validation,
{patients[test]} for test, {patients[external]} at the external hospital. Networks of {parameters:,} parameters on
VOIs of 1.5 mm, the last epoch of runs of one length, {runs} runs finished. Values with 95 % intervals over patients,
means over the seeds done; differences are taken on the same patients.

How to read it:

- **What the experts have to do here.** The sites differ in tube voltage, kernel, slice thickness and contrast, which
  moves HU at the same bone, and each site's densitometer is off by a constant of its own. The cross-device error
  compares with what the site's own machine would say without chance: a network does well there that tells the site
  from the image. That constant is no property of bone, so against the *true* sBMD, as at the external hospital,
  learning it can't help.
- **Controls.** With one machine for everybody, or patients sent to machines by lot, there is nothing about devices to
  learn from an image, and the experts must show no gain.
- **The ideal reader** knows everything that was drawn about body, age and sex, and lacks only what no CT of a
  vertebra shows. No model can do better but by chance; how little lies between the lines in HU and that reader bounds
  what any network can gain in this simulator.
- The network is told by augmentation what density does to BMD, the baselines are not; the row without changed
  densities is the fair comparison in that respect.

![differences](results/ablation.png)
"""


def page(figures: Mapping[str, Any]) -> str:
    """docs/ablation.md."""
    head = _PAGE.format(
        patients=figures["patients"],
        labelled=figures["labelled_training_patients"],
        parameters=figures["runs"]["full"]["parameters"],
        runs=sum(row["seeds"] for row in figures["runs"].values()),
    )
    facts = (
        ("minutes_mean", "minutes a run"),
        ("test_level_accuracy", "level right, test"),
        ("test_sequence_accuracy", "whole scan right, test"),
        ("external_causal_slope_share", "slope over density / simulator's, external"),
        ("external_coarse_shift_g_cm2", "shift by coarser series, external, g/cm2"),
    )
    lines = ["", "### Runs", "", "| | seeds | " + " | ".join(title for _, title in facts) + " |"]
    lines.append("|---|---|" + "---|" * len(facts))
    for name, row in figures["runs"].items():
        cells = [f"{row[key]:.3f}" if key in row else "" for key, _ in facts]
        lines.append(f"| {VARIANTS[name].title} | {row['seeds']} | {' | '.join(cells)} |")
    return head + markdown(figures) + "\n".join(lines) + "\n"


def _cell(value: Interval | None) -> str:
    numbers = [number for number in value or () if number is not None]
    return f"{numbers[0]:.3f} [{numbers[1]:.3f}, {numbers[2]:.3f}]" if len(numbers) == 3 else ""


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Differences of the full model against every row, with intervals: BMD error inside, AUC outside."""
    panels = (
        ("test", "cross_device_mae", "cross-device MAE, g/cm2 (test)"),
        ("external", "mae", "MAE against true sBMD, g/cm2 (external)"),
        ("external", "screening_auc", "AUC, screening (external)"),
        ("external", "diagnosis_auc", "AUC, diagnosis (external)"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(17, 6), sharey=True)
    here = figures["external"]
    names = [*here["full_minus"], *here["full_minus_baseline"]]
    titles = [VARIANTS[n].title if n in VARIANTS else BASELINE_TITLES[n] for n in names]
    for axis, (part, key, title) in zip(axes, panels, strict=True):
        rows = {**figures[part]["full_minus"], **figures[part]["full_minus_baseline"]}
        for place, name in enumerate(names):
            if key in rows.get(name, {}) and None not in rows[name][key]:
                value, low, high = rows[name][key]
                better = high < 0 if "mae" in key else low > 0
                worse = low > 0 if "mae" in key else high < 0
                colour = "tab:green" if better else "tab:red" if worse else "tab:grey"
                axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), titles)
    axes[0].invert_yaxis()
    figure.suptitle(
        "full model minus each row, 95 % intervals over patients; green: the full model is better", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
