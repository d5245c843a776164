"""Our structured reports as text for people."""

from __future__ import annotations

import io
from collections.abc import Mapping

from pydicom.dataset import Dataset
from rich.console import Console
from rich.table import Table

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.report_reader import ContentItems, one, parse_report
from osteo_daemon.domain.findings import ScreeningResult
from osteo_daemon.domain.wording import ENGLISH, LANGUAGES, Wording, load_wording

_TEXT_WIDTH = 120


def format_report(dataset: Dataset) -> str:
    """The report in its own language: conclusion, next step, vertebra table, flags, network estimates, models.

    Sentences are those of the report itself; table heads come from the texts of this version. No identity.

    Raises:
        NotOurReport: see `osteo_daemon.dicom.report_reader.parse_report`.
    """
    result = parse_report(dataset)
    root = ContentItems(dataset)
    evaluations = ContentItems(one(root, codes.QUALITATIVE_EVALUATIONS))
    wording = load_wording(report_language(dataset))
    lines = [
        f"{wording.tables['label']['title']}, r{dataset.get('InstanceNumber', '?')}, "
        f"{dataset.CompletionFlag}, {dataset.get('PreliminaryFlag', '')}, {dataset.VerificationFlag}",
        f"Study {result.study_instance_uid}",
    ]
    if result.series_instance_uid:
        lines.append(f"Series {result.series_instance_uid}")
    lines += ["", str(one(evaluations, codes.IMPRESSION).TextValue)]
    lines += [
        f"{wording.tables['label']['next_step']}: {item.TextValue}" for item in evaluations.named(codes.RECOMMENDATION)
    ]
    buffer = io.StringIO()
    console = Console(file=buffer, width=_TEXT_WIDTH, color_system=None, highlight=False, markup=False)
    console.print()
    if result.vertebrae:
        console.print(_attenuation_table(result, wording))
    if any(finding.network is not None for finding in result.vertebrae):
        console.print(_network_table(result, wording))
    for flag in result.quality_flags:
        console.print(f"{wording.tables['label']['study_flag']}: {wording.flag_text(flag)}")
    for model in result.models:
        console.print(f"{wording.tables['label']['model']}: {model.bundle} {model.version}, sha256 {model.sha256[:12]}")
    console.print()
    for item in evaluations.named(codes.COMMENT):
        console.print(str(item.TextValue))
    return "\n".join(lines) + "\n" + buffer.getvalue().rstrip()


def report_language(dataset: Dataset) -> str:
    """Language of a report, English when it is one that this version has no texts for."""
    for item in ContentItems(dataset).named(codes.LANGUAGE):
        code = str(item.ConceptCodeSequence[0].CodeValue)
        for language in LANGUAGES:
            if load_wording(language).language_in_dicom == code:
                return language
    return ENGLISH


def _attenuation_table(result: ScreeningResult, wording: Wording) -> Table:
    label = wording.tables["label"]
    with_corrected = any(finding.attenuation_hu_corrected is not None for finding in result.vertebrae)
    table = Table(title=label["attenuation"], title_justify="left")
    table.add_column(label["level"])
    for name in (label["mean"], label["median"], label["sd"], "mm³"):
        table.add_column(name, justify="right")
    if with_corrected:
        table.add_column(label["corrected"], justify="right")
    table.add_column(label["confidence"], justify="right")
    table.add_column(label["flags"])
    for finding in result.vertebrae:
        measured = finding.attenuation_hu
        row = [str(finding.level)]
        if measured is None:
            row += ["–"] * 4
        else:
            error = "" if measured.standard_error is None else f" ± {measured.standard_error:.1f}"
            row += [
                f"{measured.mean:.1f}{error}",
                f"{measured.median:.1f}",
                f"{measured.sd:.1f}",
                f"{measured.volume_mm3:.0f}",
            ]
        if with_corrected:
            corrected = finding.attenuation_hu_corrected
            row.append("–" if corrected is None else f"{corrected.mean:.1f} ({_pairs(corrected.factors)})")
        row.append(f"{finding.confidence:.2f}")
        row.append(", ".join(wording.flag_text(flag) for flag in finding.quality_flags))
        table.add_row(*row)
    return table


def _network_table(result: ScreeningResult, wording: Wording) -> Table:
    label = wording.tables["label"]
    statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
    status = ", ".join(wording.tables["status"][name] for name in sorted(statuses))
    table = Table(title=label["network"].format(status=status), title_justify="left")
    table.add_column(label["level"])
    value = wording.tables["value"]
    for name in (value["bmd"], label["interval"], value["t_score"], f"{value['class']}: P", label["level"]):
        table.add_column(name, justify="right")
    for finding in result.vertebrae:
        network = finding.network
        if network is None:
            continue
        interval, classes, levels = (
            network.bmd_interval_90_g_cm2,
            network.class_probabilities,
            network.level_probabilities,
        )
        likeliest = max(levels, key=lambda name: levels[name], default=None)
        table.add_row(
            str(finding.level),
            label["withheld"] if network.bmd_g_cm2 is None else f"{network.bmd_g_cm2:.3f}",
            "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
            label["withheld"] if network.t_score is None else f"{network.t_score:+.1f}",
            label["withheld"]
            if classes is None
            else ", ".join(f"{name} {classes.get(name, 0.0):.2f}" for name in ("osteoporosis", "osteopenia")),
            "–" if likeliest is None else f"{likeliest} {levels[likeliest]:.2f}",
        )
    return table


def _pairs(factors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {factor:g}" for name, factor in factors.items())
