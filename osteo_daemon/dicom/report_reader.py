"""Our structured reports read back as the result they were made from, whatever their class and language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.coding import Code

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.basic_text import text_number
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


class ContentItems:
    """The content items right below one, found by concept."""

    def __init__(self, parent: Dataset) -> None:
        self._items: list[Dataset] = list(parent.get("ContentSequence", ()))

    def named(self, code: Code) -> Iterator[Dataset]:
        """Items of a concept, in order."""
        for item in self._items:
            if "ConceptNameCodeSequence" in item and _same(item.ConceptNameCodeSequence[0], code):
                yield item

    def numbers(self, code: Code) -> list[tuple[float, Dataset]]:
        """Numbers of a concept with their items; in Basic Text they are texts."""
        return [
            (
                text_number(str(item.TextValue))
                if item.ValueType == "TEXT"
                else float(item.MeasuredValueSequence[0].NumericValue),
                item,
            )
            for item in self.named(code)
        ]

    def number(self, code: Code) -> float | None:
        """The first number of a concept."""
        return next((value for value, _ in self.numbers(code)), None)


def _parse(dataset: Dataset) -> ScreeningResult:
    root = ContentItems(dataset)
    evaluations = ContentItems(one(root, codes.QUALITATIVE_EVALUATIONS))
    vertebrae: dict[Level, VertebraFinding] = {}
    networks: dict[Level, NetworkFinding] = {}
    for measurements in root.named(codes.IMAGING_MEASUREMENTS):
        for group in ContentItems(measurements).named(codes.MEASUREMENT_GROUP):
            items = ContentItems(group)
            level = _level(items)
            status = next(items.named(codes.NETWORK_STATUS), None)
            if status is None:
                vertebrae[level] = _finding(level, items)
            else:
                networks[level] = _network(items, status)
    reported = _same(_value(one(evaluations, codes.OUTCOME)), codes.OUTCOME_REPORTED)
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
            reason=str(one(evaluations, codes.EXCLUSION_REASON).TextValue),
        ),
        category=None if category is None else _category(_value(category)),
        vertebrae=tuple(replace(finding, network=networks.get(level)) for level, finding in vertebrae.items()),
        quality_flags=_flags(evaluations),
        models=tuple(_model(str(item.TextValue)) for item in evaluations.named(codes.MODEL_BUNDLE)),
    )


def _finding(level: Level, items: ContentItems) -> VertebraFinding:
    statistics = {
        _value(one(ContentItems(item), codes.DERIVATION)).CodeValue: value
        for value, item in items.numbers(codes.ATTENUATION)
    }
    volume = items.number(codes.VOLUME)
    corrected = next(iter(items.numbers(codes.CORRECTED_ATTENUATION)), None)
    x, y, z = (_needed(items.number(code)) for code in codes.CENTRE_LPS)
    heights = [items.number(code) for code in codes.HEIGHTS]
    return VertebraFinding(
        level=level,
        centre_lps_mm=(x, y, z),
        confidence=_fraction(_needed(items.number(codes.CERTAINTY))),
        attenuation_hu=Attenuation(
            mean=statistics[codes.MEAN.value],
            median=statistics[codes.MEDIAN.value],
            sd=statistics[codes.STANDARD_DEVIATION.value],
            volume_mm3=_needed(volume),
            voxel_count=None if (count := items.number(codes.VOXEL_COUNT)) is None else int(count),
            standard_error=items.number(codes.STANDARD_ERROR),
        )
        if statistics
        else None,
        attenuation_hu_corrected=None
        if corrected is None
        else CorrectedAttenuation(mean=corrected[0], factors=_parameters(ContentItems(corrected[1]), "")),
        quality_flags=_flags(items),
        heights_mm=None if None in heights else (_needed(heights[0]), _needed(heights[1]), _needed(heights[2])),
        compression_grade=None if (grade := items.number(codes.COMPRESSION_GRADE)) is None else int(grade),
    )


def _network(items: ContentItems, status: Dataset) -> NetworkFinding:
    status_code = _value(status).CodeValue
    named_status = next(name for name, code in codes.NETWORK_STATUSES.items() if code.value == status_code)
    estimates = codes.ESTIMATES[named_status]
    probabilities = {name: items.number(code) for name, code in estimates.class_probabilities.items()}
    lower, upper = (items.number(code) for code in estimates.interval_90)
    t_score = next(iter(items.numbers(estimates.t_score)), None)
    return NetworkFinding(
        status=named_status,
        bmd_g_cm2=items.number(estimates.bmd),
        t_score=None if t_score is None else t_score[0],
        class_probabilities={name: _fraction(value) for name, value in probabilities.items() if value is not None}
        or None,
        level_probabilities=_parameters(items, "level "),
        expert_weights=tuple(_parameters(items, "expert ").values()),
        bmd_interval_90_g_cm2=None if lower is None or upper is None else (lower, upper),
        t_score_reference=None
        if t_score is None
        else next(
            (text for name, text in _parameter_texts(ContentItems(t_score[1])) if name == "reference"),
            None,
        ),
        withheld={
            name: codes.slug_of(_value(item).CodeMeaning)
            for name, code in codes.WITHHELD.items()
            for item in items.named(code)
        },
        quality_flags=_flags(items),
    )


def _parameters(items: ContentItems, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value) for name, value in _parameter_texts(items) if name.startswith(prefix)
    }


def _parameter_texts(items: ContentItems) -> Iterator[tuple[str, str]]:
    for item in items.named(codes.ALGORITHM_PARAMETERS):
        name, _, value = str(item.TextValue).partition("=")
        yield name, value


def _flags(items: ContentItems) -> tuple[QualityFlag, ...]:
    severities = {code.value: severity for severity, code in codes.FLAGS.items()}
    found = []
    for item in items._items:
        name = item.ConceptNameCodeSequence[0] if "ConceptNameCodeSequence" in item else None
        if name is not None and name.CodingSchemeDesignator == codes.SCHEME and name.get("CodeValue") in severities:
            found.append(QualityFlag(codes.slug_of(_value(item).CodeMeaning), severities[name.CodeValue]))
    return tuple(found)


def _level(items: ContentItems) -> Level:
    site = _value(one(items, codes.FINDING_SITE))
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


def one(items: ContentItems, code: Code) -> Dataset:
    """The first item of a concept.

    Raises:
        KeyError: there is none.
    """
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
