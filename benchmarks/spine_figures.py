"""What the judgements of `benchmarks.spine` amount to: figures by stratum and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt

from benchmarks.heldout import WITHOUT_SACRUM, Draw, outside, quantities
from benchmarks.results import RESULTS
from osteo_daemon.domain.findings import AVERAGED_LEVELS, MEASURED_LEVELS
from osteo_daemon.phantom.calibration import SLOPE_120_HU_PER_MG_CM3

Record = dict[str, Any]
Figures = dict[str, Any]
Pair = tuple[Draw, Record]

DOUBT: Final = ("level_uncertain", "transitional")
"""Parts of the flag codes that say a name may be wrong."""

# Okabe and Ito's palette: told apart by people with any colour vision
BLUE, ORANGE, GREEN, BLACK, GREY = "#0072b2", "#d55e00", "#009e73", "#000000", "#999999"


def doubted(record: Record, row: Record) -> bool:
    """Whether the name of a found vertebra is marked as doubtful, at the vertebra or for the whole study."""
    flags = [*record["flags"], *row["flags"]]
    return not row["certain"] or any(part in flag for flag in flags for part in DOUBT)


def measured_rows(pairs: list[Pair], *, fractured: bool = False) -> list[Record]:
    """Measured vertebrae L1-L4 that lie on a true one; those with a true fracture apart."""
    return [
        row
        for _, record in pairs
        for row in record["vertebrae"]
        if "median" in row and row["true"] in AVERAGED_LEVELS and row["fractured"] is fractured
    ]


def agreement(values: npt.NDArray[np.float64]) -> tuple[float | None, list[float] | None]:
    """Mean and 95 % limits of agreement (mean +- 1.96 SD) of differences."""
    if values.size < 2:
        return None, None
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1))
    return round(mean, 2), [round(mean - half, 1), round(mean + half, 1)]


def differences(rows: list[Record], measured: str, true: str) -> npt.NDArray[np.float64]:
    """Measured minus true by the names of their entries."""
    return np.array([row[measured] - row[true] for row in rows], dtype=np.float64)


def patient_differences(pairs: list[Pair]) -> npt.NDArray[np.float64]:
    """Mean over L1-L4 of the medians, which is what the category is decided by, minus the patient's density in HU."""
    found = []
    for _, record in pairs:
        rows = [row["median"] for row in measured_rows([(_, record)])]
        if len(rows) >= 2:
            found.append(float(np.mean(rows)) - record["patient_hu_true"])
    return np.array(found, dtype=np.float64)


def summary(pairs: list[Pair]) -> Figures:
    """Figures of a group of patients; see `MEANINGS`."""
    records = [record for _, record in pairs]
    sacrum = [pair for pair in pairs if pair[0].coverage not in WITHOUT_SACRUM]
    known = (*MEASURED_LEVELS, "L6")
    found = [(r, row) for r in records for row in r["vertebrae"] if row["true"] in known]
    right = [row for _, row in found if row["named"] == row["true"]]
    silent = [(r, row) for r, row in found if row["named"] != row["true"] and not doubted(r, row)]
    in_view = sum(level in known for case, r in sacrum for level in r["in_view"])
    here = sum(row["true"] in known for case, r in sacrum for row in r["vertebrae"] if row["true"] in r["in_view"])
    errors = np.array([row["distance_mm"] for _, row in found])
    rows = measured_rows(pairs)
    bias, limits = agreement(differences(rows, "median", "set_mean"))
    region_bias, region_limits = agreement(differences(rows, "median", "region_median"))
    return {
        "patients": len(pairs),
        "refused_rightly": sum(r["refused"] is not None and case.coverage in WITHOUT_SACRUM for case, r in pairs),
        "refused_wrongly": sum(r["refused"] is not None for _, r in sacrum),
        "in_view": in_view,
        "found_percent": round(100 * here / in_view, 1) if in_view else None,
        "named_right_percent": round(100 * len(right) / len(found), 1) if found else None,
        "doubted_percent": round(100 * sum(doubted(r, row) for r, row in found) / len(found), 1) if found else None,
        "wrong_without_doubt": len(silent),
        "patients_with_such": len({(r["anatomy"], r["seed"]) for r, _ in silent}),
        "centre_median_mm": round(float(np.median(errors)), 2) if errors.size else None,
        "centre_p95_mm": round(float(np.percentile(errors, 95)), 2) if errors.size else None,
        "measured_l1_l4": len(rows),
        "hu_bias": bias,
        "hu_limits": limits,
        "hu_bias_same_voxels": region_bias,
        "hu_limits_same_voxels": region_limits,
    }


MEANINGS: Final = {
    "refused_rightly": "the sacrum is not in view: a refusal is right, and so are right names counted from the ribs",
    "refused_wrongly": "refused although the sacrum is in view",
    "in_view": "vertebrae T12-L5 (L6) wholly in view in scans with the sacrum; found_percent is of these",
    "named_right_percent": "of all found, in scans without the sacrum too",
    "doubted_percent": "names marked as doubtful, at the vertebra or for the study",
    "wrong_without_doubt": "vertebrae with a wrong name and no mark of doubt, and in how many patients",
    "hu_bias": "median measured in L1-L4 minus the true mean of the vertebra's trabecular core; fractured ones apart",
    "hu_limits": "95 % limits of agreement, bias -+ 1.96 SD over vertebrae",
    "hu_bias_same_voxels": "the same median minus the true median of the very voxels that were measured",
}


def groups(case: Draw) -> dict[str, str]:
    """The strata that a patient belongs to."""
    patient, scanner = case.patient, case.scanner
    value = quantities(patient, scanner)
    hu = patient.density_mg_cm3 * SLOPE_120_HU_PER_MG_CM3
    bounds = ((60.0, "0 to 60"), (100.0, "60 to 100"), (150.0, "100 to 150"))
    cobb = abs(patient.scoliosis_deg)
    return {
        "sex": patient.sex,
        "age": "30 to 49" if patient.age_years < 50 else "50 to 69" if patient.age_years < 70 else "70 to 95",
        "true HU at 120 kVp": next((name for bound, name in bounds if hu < bound), "from 150"),
        "scoliosis deg": "0" if cobb == 0 else "8 to 22" if cobb < 22 else "24 to 40",
        "lordosis": "outside training" if outside("lordosis_deg", value["lordosis_deg"]) else "within training",
        "BMI": "outside training" if outside("bmi_kg_m2", value["bmi_kg_m2"]) else "within training",
        "muscle HU": "outside training" if outside("muscle_hu", value["muscle_hu"]) else "within training",
        "texture": "long and faint" if value["texture_length_mm"] > 0.9 else "short and strong",
        "cortex": "thin" if value["cortex_mm"] < 0.25 else "thick",
        "fracture": "yes" if patient.fractures else "no",
        "kVp": f"{scanner.kvp:.0f}",
        "phase": scanner.phase,
        "kernel": scanner.kernel,
        "noise HU": "6 to 20" if scanner.noise_hu < 20 else "20 to 40",
        "thickness and spacing mm": f"{scanner.slice_thickness_mm:g} every {scanner.spacing_mm[0]:g}",
        "coverage": case.coverage,
    }


def strata(pairs: list[Pair]) -> Iterator[tuple[str, str, list[Pair]]]:
    """Name, value and members of every stratum."""
    for name in groups(pairs[0][0]):
        for value in sorted({groups(case)[name] for case, _ in pairs}, key=_leading_number):
            yield name, value, [pair for pair in pairs if groups(pair[0])[name] == value]


def _leading_number(value: str) -> tuple[float, str]:
    """Order of strata: by the number they begin with, then by name."""
    first = value.split()[0]
    return (float(first), "") if first.isdigit() else (np.inf, value)


def figures_of(cases: list[Draw], records: list[Record]) -> Figures:
    """Everything for the results file."""
    pairs = list(zip(cases, records, strict=True))
    usual = [pair for pair in pairs if pair[0].anatomy == "usual"]
    variants = [pair for pair in pairs if pair[0].anatomy != "usual"]
    refusals: dict[str, int] = {}
    for record in records:
        if record["refused"]:
            refusals[record["refused"]] = refusals.get(record["refused"], 0) + 1
    figures: Figures = {
        "seconds_per_study_median": round(float(np.median([record["seconds"] for record in records])), 2),
        "refusals": ", ".join(f"{code} {count}" for code, count in sorted(refusals.items())) or "none",
        "meanings": [{"column": name, "meaning": text} for name, text in MEANINGS.items()],
        "strata": [
            {"stratum": "all with 12 pairs of ribs and 5 lumbar vertebrae", **summary(usual)},
            *({"stratum": f"{name} {value}", **summary(members)} for name, value, members in strata(usual)),
        ],
        "attenuation": list(_attenuation(usual)),
        "compression": _compression(usual),
    }
    if variants:
        names = list(dict.fromkeys(case.anatomy for case, _ in variants))
        figures["numbering_variants"] = [
            {"anatomy": name, **summary([pair for pair in variants if pair[0].anatomy == name])} for name in names
        ]
    return figures


def _attenuation(pairs: list[Pair]) -> Iterator[Figures]:
    """Where the bias comes from, step by step from the vertebra's set mean to the measured median."""
    rows = measured_rows(pairs)
    steps: tuple[tuple[str, str, str], ...] = (
        ("measured median - set mean of the core", "median", "set_mean"),
        ("measured mean - set mean of the core", "mean", "set_mean"),
        ("of it: mean of the painted core - set mean (the grid)", "core_mean", "set_mean"),
        ("of it: measured region's true mean - the whole core's (where the region lies)", "region_mean", "core_mean"),
        ("of it: region's true median - its true mean (skewed texture)", "region_median", "region_mean"),
        ("of it: measured median - region's true median (scanner, partial volume)", "median", "region_median"),
        ("measured mean - region's true mean", "mean", "region_mean"),
    )
    for name, measured, true in steps:
        bias, limits = agreement(differences(rows, measured, true))
        yield {"difference": name, "vertebrae": len(rows), "bias_hu": bias, "limits_hu": limits}
    fractured = measured_rows(pairs, fractured=True)
    bias, limits = agreement(differences(fractured, "median", "set_mean"))
    yield {
        "difference": "fractured ones: measured median - set mean of the core",
        "vertebrae": len(fractured),
        "bias_hu": bias,
        "limits_hu": limits,
    }
    patients = patient_differences(pairs)
    bias, limits = agreement(patients)
    yield {
        "difference": "patients: mean over L1-L4 of medians - HU of the patient's density",
        "vertebrae": int(patients.size),
        "bias_hu": bias,
        "limits_hu": limits,
    }


def _compression(pairs: list[Pair]) -> Figures:
    """How often true fractures (20 to 50 % of a height) and whole vertebrae are flagged."""
    rows = [row for _, record in pairs for row in record["vertebrae"] if row["true"] in MEASURED_LEVELS]

    def flagged(which: list[Record]) -> int:
        return sum("compression_suspected" in row["flags"] for row in which)

    broken, whole = [r for r in rows if r["fractured"]], [r for r in rows if not r["fractured"]]
    return {
        "fractured": len(broken),
        "fractured_flagged": flagged(broken),
        "whole": len(whole),
        "whole_flagged": flagged(whole),
    }


def plot(cases: list[Draw], records: list[Record], name: str) -> None:
    """Bland-Altman plots against both truths, centre errors by level, bias and limits by stratum."""
    pairs = [pair for pair in zip(cases, records, strict=True) if pair[0].anatomy == "usual"]
    rows = measured_rows(pairs)
    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained", height_ratios=(1, 1.9))
    _bland_altman(axes[0, 0], rows, "set_mean", "true mean of the whole core")
    _bland_altman(axes[0, 1], rows, "region_median", "true median of the measured voxels")
    _centres(axes[1, 0], pairs)
    _forest(axes[1, 1], pairs)
    figure.savefig(RESULTS / f"{name}.png", dpi=100)
    plt.close(figure)


def _bland_altman(axis: Any, rows: list[Record], true: str, label: str) -> None:
    delta = differences(rows, "median", true)
    middle = np.array([(row["median"] + row[true]) / 2 for row in rows])
    axis.plot(middle, delta, ".", color=BLUE, alpha=0.45, markersize=4)
    bias, limits = agreement(delta)
    if bias is not None and limits is not None:
        axis.axhline(bias, color=ORANGE, linewidth=1.5, label=f"bias {bias:+.1f} HU")
        for limit in limits:
            axis.axhline(limit, color=ORANGE, linestyle="--", linewidth=1)
        axis.plot(
            [], [], color=ORANGE, linestyle="--", linewidth=1, label=f"95 % limits {limits[0]:+.1f}, {limits[1]:+.1f}"
        )
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(
        xlabel="mean of measured and true (HU)", ylabel="measured median - true (HU)", title=f"against the {label}"
    )
    axis.title.set_fontsize(10)
    axis.legend(fontsize=8)


def _centres(axis: Any, pairs: list[Pair]) -> None:
    levels = [str(level) for level in (*MEASURED_LEVELS, "S1")]
    errors: Callable[[str], list[float]] = lambda level: [  # noqa: E731
        row["distance_mm"] for _, record in pairs for row in record["vertebrae"] if row["true"] == level
    ]
    axis.boxplot(
        [errors(level) for level in levels],
        tick_labels=[f"{level}\n{len(errors(level))}" for level in levels],
        whis=(5, 95),
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY},
        medianprops={"color": ORANGE},
    )
    axis.set(xlabel="true level, number found", ylabel="distance of the found centre (mm)")
    axis.set_title("centres; box: quartiles, whiskers: 5 to 95 %", fontsize=10)


def _forest(axis: Any, pairs: list[Pair]) -> None:
    labels = []
    for place, (name, value, members) in enumerate(reversed(list(strata(pairs)))):
        labels.append(f"{name}: {value}")
        for true, colour, marker, shift in (("set_mean", BLUE, "o", 0.15), ("region_median", GREEN, "s", -0.15)):
            bias, limits = agreement(differences(measured_rows(members), "median", true))
            if bias is not None and limits is not None:
                axis.plot(limits, [place + shift] * 2, color=colour, linewidth=1)
                axis.plot(bias, place + shift, marker, color=colour, markersize=4)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.plot([], [], "o-", color=BLUE, label="whole core's mean", markersize=4)
    axis.plot([], [], "s-", color=GREEN, label="measured voxels' median", markersize=4)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.06), ncols=2)
    axis.set(xlabel="bias and 95 % limits of agreement (HU)")
