"""The model card of a refitted bundle and its plot, made from the verdict alone: no number is typed by hand."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.judging import Index, Judged, Vec

MODELS: Final = {
    "parent": "deployed bundle",
    "refit": "refit",
    "affine": "deployed bundle, BMD recalibrated",
    "hu_line": "recalibrated HU line",
}
METRICS: Final = (
    ("mae", "MAE, g/cm2"),
    ("bias", "bias, g/cm2"),
    ("rmse", "RMSE, g/cm2"),
    ("pearson", "Pearson's r"),
    ("interval_90_coverage", "coverage of the 90 % interval"),
    ("screening_auc", "screening (T <= -1): AUC"),
    ("diagnosis_auc", "diagnosis (T <= -2.5): AUC"),
    ("class_ece", "calibration error of the class"),
)

_HEAD: Final = """\
# {name} {version}

**Status: investigational.** {what} of {parent} {parent_version} for the site "{site}".
Verdict: **{verdict}**; recommended: **{recommended}**.

{reasons}

## Where it comes from
- parent: {parent} {parent_version}, sha256 `{parent_sha256}`
- data: {vertebrae} labelled vertebrae of {patients} patients, sha256 `{data_sha256}`
- densitometers: {devices}
- made by osteo-daemon {code_version}, seed {seed}, pull to the parent {strength}

The figures below are against the site's own readings of patients that no fit behind the judged value has seen: {folds}
folds of patients, the strength of the pull and the calibration chosen inside each. The bundle itself was then made in
the same way from all of them. Intervals (95 %) resample patients.
"""


def _cell(value: Mapping[str, float | None] | None) -> str:
    if value is None or value.get("value") is None:
        return ""
    low, high = value.get("low"), value.get("high")
    span = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value['value']:.3f}{span}"


def _table(title: str, figures: Mapping[str, Any], names: list[str]) -> list[str]:
    lines = [
        "",
        f"## {title}",
        f"{figures['patients']} patients, {figures['vertebrae']} vertebrae; normal, osteopenia, osteoporosis: "
        + ", ".join(map(str, figures["vertebrae_by_class"])),
        "",
        "| | " + " | ".join(MODELS[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for key, label in METRICS:
        cells = [_cell(figures["models"][name].get(key)) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _where(figures: Mapping[str, Any]) -> str:
    if figures["scanners"] is None:
        return "It speaks for every scanner: the labelled CTs do not name theirs."
    names = ", ".join(" ".join(part for part in name if part) for name in figures["scanners"])
    unbound = figures["others_without_scope"]["differences"]["refit minus parent"]["mae"]
    return (
        f"It speaks for the scanners {names}; for any other it says what the deployed bundle says. Let loose on these "
        f"virtual patients it would change their MAE by {_cell(unbound)} g/cm2."
    )


def refit_card(name: str, version: str, verdict: Mapping[str, Any]) -> str:
    """Markdown of docs/README.md from docs/verdict.json."""
    lineage, figures = verdict["lineage"], verdict["figures"]
    head = _HEAD.format(
        name=name,
        version=version,
        what="Refit" if verdict["candidate"] == "refit" else "Recalibration",
        parent=lineage["parent"]["name"],
        parent_version=lineage["parent"]["version"],
        parent_sha256=lineage["parent"]["sha256"],
        site=lineage["site"],
        verdict=verdict["verdict"].replace("_", " "),
        recommended=verdict["recommended"],
        reasons="\n".join(f"- {reason}" for reason in verdict["reasons"]),
        vertebrae=figures["site"]["vertebrae"],
        patients=figures["site"]["patients"],
        data_sha256=lineage["data_sha256"],
        devices=", ".join(figures["devices"]),
        code_version=lineage["code_version"],
        seed=lineage["seed"],
        strength="endless: the parent's weights" if figures["strength"] is None else f"{figures['strength']:g}",
        folds=figures["outer_folds"],
    )
    lines = _table("At the site", figures["site"], list(MODELS))
    lines += ["", "![the site's held-out patients](refit.png)"]
    lines += [
        "",
        "| subgroup | patients | MAE deployed | MAE refit | bias deployed | bias refit |",
        "|---|" + "---|" * 5,
    ]
    for group, row in figures["subgroups"].items():
        cells = [_cell(row[model][key]) for key in ("mae", "bias") for model in ("parent", "refit")]
        lines.append(f"| {group} | {row['patients']} | {' | '.join(cells)} |")
    lines += _table("Other devices: virtual patients", figures["others"], ["parent", "refit", "affine"])
    lines += ["", _where(figures)]
    lines += [
        "",
        "## Limits",
        "- Judged by readings, which err themselves; a bias against the site's machine is no bias against the truth.",
        "- Other devices are judged by virtual patients of the parent's own sites, not by people.",
        "- The encoder is the parent's: a scanner that it cannot read is not mended by a refit.",
    ]
    return head + "\n".join(lines) + "\n"


def plot(models: Mapping[str, Judged], target: Vec, classes: Index) -> bytes:
    """PNG: BMD against readings of the deployed bundle and the refit, and how often a stated probability comes true."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes[:2], ("parent", "refit"), strict=True):
        axis.scatter(target, models[name].bmd, s=6, alpha=0.5)
        ends = [float(target.min()), float(target.max())]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(title=MODELS[name], xlabel="reading, g/cm2", ylabel="BMD, g/cm2")
    for name in ("parent", "refit", "affine"):
        score, positive = models[name].score("screening"), classes >= 1
        edges = np.quantile(score, np.linspace(0, 1, 6))
        place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, 4)
        used = [k for k in range(5) if (place == k).any()]
        axes[2].plot(
            [score[place == k].mean() for k in used],
            [positive[place == k].mean() for k in used],
            marker="o",
            markersize=3,
            label=MODELS[name],
        )
    axes[2].plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes[2].set(title="T <= -1", xlabel="stated probability", ylabel="share that came true")
    axes[2].legend(fontsize=7)
    buffer = io.BytesIO()
    # without the library's version the same refit gives the same bytes
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
