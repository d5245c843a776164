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
    ("auc_osteoporosis", "AUC osteoporosis"),
    ("auc_low_bone_mass", "AUC T <= -1"),
    ("sensitivity_osteoporosis", "sensitivity osteoporosis (most probable class)"),
    ("specificity_osteoporosis", "specificity osteoporosis (most probable class)"),
    ("balanced_accuracy", "balanced accuracy, 3 classes"),
    ("macro_f1", "macro F1, 3 classes"),
)


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
{patients} virtual patients, {ages[0]}-{ages[1]} years, {women:.0f} % women. Sites:
{sites}

Cohort digest `{digest}`.
Split by patient: 70 % training, 12 % validation, 18 % test of the three sites; nothing is trained on the external
hospital. Targets are simulated readings (the maker's scale by Hui's formula inverted, {error:.0f} % error per patient
and maker) converted back to sBMD; tests are against the true sBMD.

## Training

    python -m train.cohort --patients {patients}
    python -m train.multitask --epochs {epochs} --batch-size {batch} --learning-rate {rate:g} --seed {seed}
    python -m train.export

Best epoch {best} of {run_epochs} by validation loss; {minutes:.1f} minutes on {device} with {threads} thread(s), the
machine shared with other work.
"""

_PART: Final = """
## {title}
{patients} patients, {vertebrae} vertebrae; {osteoporosis} patients have osteoporosis. Values with 95 % intervals,
bootstrapped over patients. What no CT shows alone costs an RMSE of {floor:.3f} g/cm2.

"""

_LIMITS: Final = """
## Limits
- A phantom is not a patient: no fractures, metal, cement, tumours or prone scans were trained on.
- Trained for minutes on a small cohort: read the intervals.
- One maker a site: device and population are confounded, here as in reality.
- Contrast, tube voltage and kernel vary within the ranges of the sites above only.
- The level from one box is a weak quality check, not a substitute for counting.
"""


def _cell(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _table(figures: dict[str, Any]) -> list[str]:
    network, plain = figures["network"], figures["core_hu_linear"]
    difference, patient = figures["network_minus_core_hu_linear"], figures["patient"]
    lines = ["| per vertebra L1-L4, against true sBMD | this network | linear in core HU |", "|---|---|---|"]
    lines += [f"| {title} | {_cell(network[key])} | {_cell(plain[key])} |" for key, title in METRICS]
    single = (
        ("difference in MAE (network - HU)", difference["mae"]),
        ("difference in AUC osteoporosis (network - HU)", difference["auc_osteoporosis"]),
        ("coverage of the 90 % interval", network["interval_90_coverage"]),
        ("calibration error of the class", network["class_ece"]),
        ("level accuracy", figures["level"]["accuracy"]),
        ("level within one", figures["level"]["within_one"]),
    )
    lines += [f"| {title} | {_cell(value)} | |" for title, value in single]
    lines += ["", "| per patient | network, mean of L1-L4 | HU of L1 alone |", "|---|---|---|"]
    for title, key in (("AUC osteoporosis", "auc_osteoporosis"), ("Pearson's r with true BMD", "pearson")):
        lines.append(f"| {title} | {_cell(patient[f'network_{key}'])} | {_cell(patient[f'l1_hu_{key}'])} |")
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
        error=100 * truth.CONVERSION_ERROR,
        epochs=settings["loop"]["epochs"],
        batch=settings["loop"]["batch_size"],
        rate=settings["loop"]["learning_rate"],
        seed=settings["loop"]["seed"],
        best=best_epoch,
        run_epochs=summary["epochs"],
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
            osteoporosis=figures["patient"]["osteoporosis"],
            floor=figures["floor_rmse_g_cm2"],
        )
        text += "\n".join(_table(figures)) + "\n"
    return text + _LIMITS
