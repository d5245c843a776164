"""The model card of osteo-moe, made from a run's own files: no number is typed by hand."""

from __future__ import annotations

from typing import Any, Final

from osteo_daemon.network.config import MoEConfig
from train import truth

METRICS: Final = (
    ("mae", "MAE, g/cm2"),
    ("rmse", "RMSE, g/cm2"),
    ("bias", "bias, g/cm2"),
    ("loa_low", "lower limit of agreement, g/cm2"),
    ("loa_high", "upper limit of agreement, g/cm2"),
    ("pearson", "Pearson's r"),
    ("cross_device_mae", "MAE against the site's own machine, mean over devices, g/cm2"),
    ("device_bias", "RMS bias of the devices, g/cm2"),
    ("interval_90_coverage", "coverage of the 90 % interval"),
    ("screening_auc", "screening (T <= -1): AUC"),
    ("screening_sensitivity", "sensitivity"),
    ("screening_specificity", "specificity"),
    ("screening_balanced_accuracy", "balanced accuracy"),
    ("screening_macro_f1", "macro F1"),
    ("diagnosis_auc", "diagnosis (T <= -2.5): AUC"),
    ("diagnosis_sensitivity", "sensitivity"),
    ("diagnosis_specificity", "specificity"),
    ("diagnosis_balanced_accuracy", "balanced accuracy"),
    ("diagnosis_macro_f1", "macro F1"),
    ("balanced_accuracy", "balanced accuracy, 3 classes, most probable one"),
    ("macro_f1", "macro F1, 3 classes, most probable one"),
    ("class_ece", "calibration error of the class"),
)
BASELINES: Final = {
    "l1_hu_threshold": "HU of L1",
    "core_hu_linear": "linear, trabecular HU",
    "vertebra_hu_linear": "linear, whole-vertebra HU",
    "radiomics_boosting": "radiomics + boosting",
}
LEVELS: Final = {
    "level_accuracy": "level of a single vertebra right",
    "level_within_one": "level of a single vertebra right within one",
    "sequence_accuracy": "all vertebrae of a scan read together: patients with every level right",
}


_HEAD: Final = """\
# {title}

**Status: investigational.** Trained and tested on simulated vertebrae only. No patient's CT and no DXA result was used.
**No clinical validation was done**: the numbers below say how well the network reads the simulator and nothing about
people. Its values never touch the category or the conclusion of a report.

## What it is
One vertebra (a box in vertebral axes) in; diagnosis class, areal BMD and vertebral level out. The idea (shared 3D
encoder, gated experts, three tasks) follows Huang et al., MICCAI 2025, arXiv 2506.20282, which released no code and no
weights. Sizes, losses and training are ours; its results are not reproduced here.

- input: {shape} voxels of {spacing:g} mm in HU; the image path sees {low:g} to {high:g} HU, beside it stand statistics
  of raw HU
- {experts} residual experts, {gate}; class head: {class_head}
- BMD as sBMD (Hui 1997), simulated; T-score reference: {reference}, shifted for each level
- BMD and class are given for {bmd_levels} only; the level head knows {levels}

## Intended use
Research and interface tests. A site that wants clinical values must refit with its own DXA pairs.

## Training data
{patients} virtual patients, {ages[0]}-{ages[1]} years, {women:.0f} % women. Body shape, thickness of the shell, texture
and soft tissue vary beyond what density and age explain. Sites:
{sites}

Cohort digest `{digest}` (`train/cohort.json`).
Split by patient: 70 % training, 12 % validation, 18 % test of the three sites; nothing is trained on the external
hospital. Targets are simulated readings: the maker's scale by Hui's formula inverted, {error:.1f} % error from patient
to patient and the site's machine off by {machines}; tests are against the true sBMD.
{readings}

{density:.0f} % of the vertebrae in training get another trabecular density and a target moved along with the
simulator's own slope; {coarse:.0f} % come as a coarser series shows them. So the network is told what density does; the
baselines are not.

## Training

    {command}

{epochs} epochs, batches of {batch}, learning rate {rate:g}, seed {seed}; epoch {best} is shipped. {minutes:.1f} minutes
on {device} with {threads} thread(s), the machine shared with other work{pretraining}.
"""

_SEVERAL_COMMANDS: Final = """\
python -m train.cohort
    python -m train.ablation --only full --seeds 0
    python -m train.export --run runs/ablation/full/seed0"""
"""The full model of the ablation is a bundle as good as another."""

_PART: Final = """
## {title}
{patients} patients, {vertebrae} vertebrae of L1-L4, {osteoporosis} of them with osteoporosis. Values with 95 %
intervals, bootstrapped over patients. The ideal reader knows everything but what no CT shows. Points of operation by
Youden's index on validation patients, for all alike.

"""

_LIMITS: Final = """
## Limits
- A phantom is not a patient: no fractures, metal, cement, tumours or prone scans were trained on.
- Trained for minutes on a small cohort: read the intervals.
- One machine a site: device and population are confounded, here as in reality. The experts learn what the machine of a
  site adds; which of it is error no image tells, so at the external hospital that part can only cost.
- Whether each ingredient helps is judged by `docs/results/ablation.json` on a smaller form of this network.
- Contrast, tube voltage and kernel vary within the ranges of the sites above only.
- The level from one box is a weak quality check, not a substitute for counting.
"""


def _cell(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _table(figures: dict[str, Any]) -> list[str]:
    network, ideal, others = figures["network"], figures["ceiling"], figures["baselines"]
    lines = [
        "| per vertebra, against true sBMD | this network | " + " | ".join(BASELINES.values()) + " | ideal reader |",
        "|---|---|" + "---|" * (len(BASELINES) + 1),
    ]
    for key, title in METRICS:
        if key in network:
            cells = [_cell(others[name].get(key)) for name in BASELINES]
            lines.append(f"| {title} | {_cell(network[key])} | {' | '.join(cells)} | {_cell(ideal.get(key))} |")
    lines += ["", "| network minus | " + " | ".join(BASELINES.values()) + " |", "|---|" + "---|" * len(BASELINES)]
    difference = figures["network_minus_baseline"]
    for key in ("mae", "screening_auc", "diagnosis_auc"):
        cells = [_cell(difference[name].get(key)) for name in BASELINES]
        lines.append(f"| {dict(METRICS)[key]} | {' | '.join(cells)} |")
    lines += ["", "| level | |", "|---|---|"]
    lines += [f"| {title} | {_cell(figures['level'][key])} |" for key, title in LEVELS.items()]
    if figures["causal_slope_share"] is not None:
        share = 100 * figures["causal_slope_share"]
        lines += [
            "",
            f"When the trabecular core alone changes, the BMD follows with {share:.0f} % of the simulator's slope.",
        ]
    if "coarse" in figures:
        coarse = figures["coarse"]
        lines += [
            f"As a coarser series (slices or cubes of 2 to 5.5 mm) shows the same vertebra, BMD moves by "
            f"{coarse['mean_absolute_shift_g_cm2']:.3f} g/cm2 on average; {100 * coarse['share_within_0.03']:.0f} % of "
            f"vertebrae stay within 0.03 g/cm2. MAE there {coarse['mae']:.3f} g/cm2.",
        ]
    return lines


def _subgroups(figures: dict[str, Any]) -> list[str]:
    columns = {"mae": "MAE", "bias": "bias", "screening_auc": "AUC screening", "diagnosis_auc": "AUC diagnosis"}
    lines = ["", "| subgroup | patients | " + " | ".join(columns.values()) + " |", "|---|---|" + "---|" * len(columns)]
    for name, row in figures["subgroups"].items():
        cells = ["" if row[key] != row[key] else f"{row[key]:.3f}" for key in columns]
        lines.append(f"| {name} | {row['patients']} | {' | '.join(cells)} |")
    return lines


def _decisions(figures: dict[str, Any]) -> list[str]:
    curves = figures["decision_curve"]
    lines = []
    for setting in ("screening", "diagnosis"):
        thresholds = list(curves["network"][setting])
        lines += ["", f"| net benefit, {setting}, from a probability of | " + " | ".join(thresholds) + " |"]
        lines.append("|---|" + "---|" * len(thresholds))
        rows = {"this network": curves["network"][setting], "everybody": curves["network"][f"{setting}_everybody"]}
        rows |= {title: curves[name][setting] for name, title in BASELINES.items()}
        lines += [
            f"| {title} | " + " | ".join(f"{row[t]:.3f}" for t in thresholds) + " |" for title, row in rows.items()
        ]
    return lines


def model_card(
    title: str,
    config: MoEConfig,
    settings: dict[str, Any],
    summary: dict[str, Any],
    cohort: dict[str, Any],
    evaluation: dict[str, Any],
    best_epoch: int,
) -> str:
    """Markdown of docs/README.md.

    Args:
        title: name and version.
        config: of the network.
        settings: settings.json of the run.
        summary: summary.json of the run.
        cohort: configuration in the cohort's table.json.
        evaluation: evaluation.json of the run.
        best_epoch: whose weights are exported.
    """
    sites = "\n".join(
        f"- {site['name']}: {site['maker'] or 'a maker that training never saw'}; "
        f"{'/'.join(f'{value:g}' for value in site['kvp'])} kVp, {'/'.join(site['kernels'])}, "
        f"{site['thickness_mm'][0]:g}-{site['thickness_mm'][1]:g} mm, phases {', '.join(sorted(set(site['phases'])))}"
        for site in cohort["sites"]
    )
    all_labelled = (settings["densitometry"] or {}).get("labelled_share") == 1.0
    text = _HEAD.format(
        title=title,
        shape=" x ".join(map(str, config.voi_shape)),
        spacing=config.voi_spacing_mm,
        low=config.window_hu[0],
        high=config.window_hu[1],
        experts=config.expert_count,
        gate="dense soft gate" if config.top_k is None else f"top-{config.top_k} gate",
        class_head=config.class_head,
        reference=truth.REFERENCE_NAME,
        bmd_levels=", ".join(config.bmd_levels),
        levels=", ".join(config.levels),
        patients=cohort["patients"],
        ages=cohort["age_years"],
        women=100 * cohort["female_share"],
        sites=sites,
        digest=cohort["sha256"],
        error=100 * truth.PATIENT_ERROR,
        machines=", ".join(f"{100 * value:+.1f} % ({maker})" for maker, value in truth.MACHINE_ERROR.items()),
        readings="Every training patient has a reading." if all_labelled else "Most training patients have no reading.",
        density=100 * settings["augmentation"]["density"],
        coarse=100 * settings["augmentation"]["coarse"],
        command=f"python -m train.recipe --version {title.rpartition(' ')[2]}" if all_labelled else _SEVERAL_COMMANDS,
        pretraining="; the encoder was pretrained on the same scans (`train.pretrain`)"
        if settings["encoder_sha256"]
        else "",
        epochs=settings["loop"]["epochs"],
        batch=settings["loop"]["batch_size"],
        rate=settings["loop"]["learning_rate"],
        seed=settings["loop"]["seed"],
        best=best_epoch,
        minutes=summary["training_seconds"] / 60,
        device=summary["device"],
        threads=summary["threads"],
    )
    for part, heading in (("test", "Test patients of the three sites"), ("external", "External hospital")):
        figures = evaluation[part]
        text += _PART.format(
            title=heading,
            patients=figures["patients"],
            vertebrae=figures["vertebrae"],
            osteoporosis=figures["vertebrae_with_osteoporosis"],
        )
        text += "\n".join([*_table(figures), *_subgroups(figures), *_decisions(figures)]) + "\n"
    return text + _LIMITS
