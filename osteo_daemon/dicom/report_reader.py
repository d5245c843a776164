"""Our structured reports read back: as the result they were made from, and as text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.coding import Code
from rich.console import Console
from rich.table import Table

from osteo_daemon.dicom import codes, wording
from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.domain.findings import (
    Attenuation,
    Category,
    CorrectedAttenuation,
    Exclusion,
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    QualityFlag,
    ScreeningResult,
    VertebraFinding,
)
from osteo_daemon.errors import Damaged, NotDicom

_TEXT_WIDTH = 110
_MODEL = re.compile(r"(?P<bundle>\S+) (?P<version>\S+) sha256:(?P<sha256>[0-9a-f]+)")


class NotOurReport(Damaged):
    """The object is not a structured report of this product"""


def read_report(path: Path) -> Dataset:
    """Read a file as one of our structured reports.

    Raises:
        NotDicom: the file is no DICOM object.
        NotOurReport: it is another object.
    """
    try:
        dataset = pydicom.dcmread(path)
    except (InvalidDicomError, OSError) as error:
        raise NotDicom(f"{path.name}: {type(error).__name__}") from error
    if str(dataset.get("SOPClassUID", "")) not in SR_CLASSES.values() or codes.SCHEME not in _schemes(dataset):
        raise NotOurReport(path.name)
    return dataset


def parse_report(dataset: Dataset) -> ScreeningResult:
    """The result that a report was made from, as reported: rounded (docs/report.md) and without durations.

    Raises:
        NotOurReport: a part that every report of ours has is missing.
    """
    try:
        return _parse(dataset)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise NotOurReport(f"{type(error).__name__} while reading its content") from error


def format_report(dataset: Dataset) -> str:
    """The report as text for people: conclusion, vertebra table, flags, network estimates, models; no identity.

    Raises:
        NotOurReport: see `parse_report`.
    """
    result = parse_report(dataset)
    evaluations = _Items(_one(_Items(dataset), codes.QUALITATIVE_EVALUATIONS))
    lines = [
        f"Bone screening report, revision {dataset.get('InstanceNumber', '?')}, "
        f"{dataset.CompletionFlag.lower()}, {dataset.PreliminaryFlag.lower()}, {dataset.VerificationFlag.lower()}",
        f"Study {result.study_instance_uid}",
    ]
    if result.series_instance_uid:
        lines.append(f"Series {result.series_instance_uid}")
    lines += ["", str(_one(evaluations, codes.IMPRESSION).TextValue), ""]
    buffer = io.StringIO()
    console = Console(file=buffer, width=_TEXT_WIDTH, color_system=None, highlight=False)
    if result.vertebrae:
        console.print(_attenuation_table(result))
    networks = [finding for finding in result.vertebrae if finding.network is not None]
    if networks:
        console.print(_network_table(result))
        if any(finding.network is not None and finding.network.status == "investigational" for finding in networks):
            console.print(wording.INVESTIGATIONAL)
    for flag in result.quality_flags:
        console.print(f"Study flag: {wording.flag_text(flag)}")
    for model in result.models:
        console.print(f"Model: {model.bundle} {model.version}, sha256 {model.sha256[:12]}")
    console.print()
    console.print(wording.DISCLAIMER)
    return "\n".join(lines) + buffer.getvalue().rstrip()


class _Items:
    """The content items right below one, found by concept."""

    def __init__(self, parent: Dataset) -> None:
        self._items: list[Dataset] = list(parent.get("ContentSequence", ()))

    def named(self, code: Code) -> Iterator[Dataset]:
        for item in self._items:
            if "ConceptNameCodeSequence" in item and _same(item.ConceptNameCodeSequence[0], code):
                yield item

    def numbers(self, code: Code) -> list[tuple[float, Dataset]]:
        return [(float(item.MeasuredValueSequence[0].NumericValue), item) for item in self.named(code)]

    def number(self, code: Code) -> float | None:
        return next((value for value, _ in self.numbers(code)), None)


def _parse(dataset: Dataset) -> ScreeningResult:
    root = _Items(dataset)
    evaluations = _Items(_one(root, codes.QUALITATIVE_EVALUATIONS))
    vertebrae: dict[Level, VertebraFinding] = {}
    networks: dict[Level, NetworkFinding] = {}
    for measurements in root.named(codes.IMAGING_MEASUREMENTS):
        for group in _Items(measurements).named(codes.MEASUREMENT_GROUP):
            items = _Items(group)
            level = _level(items)
            status = next(items.named(codes.NETWORK_STATUS), None)
            if status is None:
                vertebrae[level] = _finding(level, items)
            else:
                networks[level] = _network(items, status)
    reported = _same(_value(_one(evaluations, codes.OUTCOME)), codes.OUTCOME_REPORTED)
    category = next(evaluations.named(codes.CATEGORY), None)
    exclusion = next(evaluations.named(codes.EXCLUSION), None)
    series = next(evaluations.named(codes.SCREENED_SERIES), None)
    return ScreeningResult(
        study_instance_uid=str(dataset.StudyInstanceUID),
        series_instance_uid=None if series is None else str(series.UID),
        outcome=Outcome.REPORTED if reported else Outcome.EXCLUDED,
        exclusion=None
        if exclusion is None
        else Exclusion(
            code=codes.slug_of(_value(exclusion).CodeMeaning),
            reason=str(_one(evaluations, codes.EXCLUSION_REASON).TextValue),
        ),
        category=None if category is None else _category(_value(category)),
        vertebrae=tuple(_with_network(finding, networks.get(level)) for level, finding in vertebrae.items()),
        quality_flags=_flags(evaluations),
        models=tuple(_model(str(item.TextValue)) for item in evaluations.named(codes.MODEL_BUNDLE)),
    )


def _finding(level: Level, items: _Items) -> VertebraFinding:
    statistics = {
        _value(_one(_Items(item), codes.DERIVATION)).CodeValue: value
        for value, item in items.numbers(codes.ATTENUATION)
    }
    volume = items.number(codes.VOLUME)
    corrected = next(iter(items.numbers(codes.CORRECTED_ATTENUATION)), None)
    x, y, z = (_needed(items.number(code)) for code in codes.CENTRE_LPS)
    return VertebraFinding(
        level=level,
        centre_lps_mm=(x, y, z),
        confidence=_fraction(_needed(items.number(codes.CERTAINTY))),
        attenuation_hu=Attenuation(
            mean=statistics[codes.MEAN.value],
            median=statistics[codes.MEDIAN.value],
            sd=statistics[codes.STANDARD_DEVIATION.value],
            volume_mm3=_needed(volume),
        )
        if statistics
        else None,
        attenuation_hu_corrected=None
        if corrected is None
        else CorrectedAttenuation(mean=corrected[0], factors=_parameters(_Items(corrected[1]), "")),
        quality_flags=_flags(items),
    )


def _network(items: _Items, status: Dataset) -> NetworkFinding:
    probabilities = {name: items.number(code) for name, code in codes.CLASS_PROBABILITIES.items()}
    status_code = _value(status).CodeValue
    return NetworkFinding(
        status=next(name for name, code in codes.NETWORK_STATUSES.items() if code.value == status_code),
        bmd_g_cm2=items.number(codes.BMD),
        t_score=items.number(codes.T_SCORE),
        class_probabilities={name: _fraction(value) for name, value in probabilities.items() if value is not None}
        or None,
        level_probabilities=_parameters(items, "level "),
        expert_weights=tuple(_parameters(items, "expert ").values()),
    )


def _with_network(finding: VertebraFinding, network: NetworkFinding | None) -> VertebraFinding:
    return VertebraFinding(
        level=finding.level,
        centre_lps_mm=finding.centre_lps_mm,
        confidence=finding.confidence,
        attenuation_hu=finding.attenuation_hu,
        attenuation_hu_corrected=finding.attenuation_hu_corrected,
        network=network,
        quality_flags=finding.quality_flags,
    )


def _parameters(items: _Items, prefix: str) -> dict[str, float]:
    found = {}
    for item in items.named(codes.ALGORITHM_PARAMETERS):
        name, _, value = str(item.TextValue).partition("=")
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = float(value)
    return found


def _flags(items: _Items) -> tuple[QualityFlag, ...]:
    severities = {code.value: severity for severity, code in codes.FLAGS.items()}
    found = []
    for item in items._items:
        name = item.ConceptNameCodeSequence[0] if "ConceptNameCodeSequence" in item else None
        if name is not None and name.CodingSchemeDesignator == codes.SCHEME and name.get("CodeValue") in severities:
            found.append(QualityFlag(codes.slug_of(_value(item).CodeMeaning), severities[name.CodeValue]))
    return tuple(found)


def _level(items: _Items) -> Level:
    site = _value(_one(items, codes.FINDING_SITE))
    return next(level for level, code in codes.VERTEBRAE.items() if code.value == site.CodeValue)


def _category(value: Dataset) -> Category:
    return next(category for category, code in codes.CATEGORIES.items() if code.value == value.CodeValue)


def _model(text: str) -> ModelReference:
    match = _MODEL.fullmatch(text)
    if match is None:
        raise ValueError("a model reference has another form")
    return ModelReference(**match.groupdict())


def _schemes(dataset: Dataset) -> set[str]:
    return {str(item.get("CodingSchemeDesignator")) for item in dataset.get("CodingSchemeIdentificationSequence", ())}


def _one(items: _Items, code: Code) -> Dataset:
    found = next(items.named(code), None)
    if found is None:
        raise KeyError(code.meaning)
    return found


def _value(item: Dataset) -> Any:
    return item.ConceptCodeSequence[0]


def _same(found: Dataset, code: Code) -> bool:
    return bool(found.get("CodeValue") == code.value and found.get("CodingSchemeDesignator") == code.scheme_designator)


def _needed(value: float | None) -> float:
    if value is None:
        raise ValueError("a number is missing")
    return value


def _fraction(percent: float) -> float:
    return round(percent / 100, 3)


def _attenuation_table(result: ScreeningResult) -> Table:
    with_corrected = any(finding.attenuation_hu_corrected is not None for finding in result.vertebrae)
    table = Table(title="Trabecular attenuation, HU", title_justify="left")
    table.add_column("Level")
    for name in ("mean", "median", "SD", "mm³"):
        table.add_column(name, justify="right")
    if with_corrected:
        table.add_column("corrected (factors)", justify="right")
    table.add_column("confidence", justify="right")
    table.add_column("flags")
    for finding in result.vertebrae:
        measured = finding.attenuation_hu
        row = [str(finding.level)]
        if measured is None:
            row += ["–"] * 4
        else:
            row += [
                f"{measured.mean:.1f}",
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


def _network_table(result: ScreeningResult) -> Table:
    statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
    table = Table(title=f"Network estimates, {' and '.join(sorted(statuses))}", title_justify="left")
    table.add_column("Level")
    for name in ("BMD g/cm²", "T-score", "P(osteoporosis)", "P(osteopenia)", "level seen"):
        table.add_column(name, justify="right")
    for finding in result.vertebrae:
        network = finding.network
        if network is None:
            continue
        classes = network.class_probabilities or {}
        levels = network.level_probabilities
        likeliest = max(levels, key=lambda name: levels[name], default=None)
        table.add_row(
            str(finding.level),
            "withheld" if network.bmd_g_cm2 is None else f"{network.bmd_g_cm2:.3f}",
            "withheld" if network.t_score is None else f"{network.t_score:+.1f}",
            f"{classes['osteoporosis']:.2f}" if "osteoporosis" in classes else "withheld",
            f"{classes['osteopenia']:.2f}" if "osteopenia" in classes else "withheld",
            "–" if likeliest is None else f"{likeliest} {levels[likeliest]:.2f}",
        )
    return table


def _pairs(factors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {factor:g}" for name, factor in factors.items())
