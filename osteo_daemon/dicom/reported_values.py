"""A screening result as it is reported: rounded once, so that every object and every digest sees the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from osteo_daemon.domain.findings import (
    Attenuation,
    CorrectedAttenuation,
    NetworkFinding,
    ScreeningResult,
    VertebraFinding,
)

ATTENUATION_DECIMALS = 1  # HU; the noise of a mean over a region is about 1 HU
VOLUME_DECIMALS = 0  # mm3
CENTRE_DECIMALS = 1  # mm
HEIGHT_DECIMALS = 1  # mm
BMD_DECIMALS = 3  # g/cm2, as densitometers print it
T_SCORE_DECIMALS = 1  # as densitometers print it
PROBABILITY_DECIMALS = 3
FACTOR_DECIMALS = 4


def as_reported(result: ScreeningResult) -> ScreeningResult:
    """The result rounded to what the report prints and without durations.

    `osteo_daemon.dicom.report_reader.parse_report` gives exactly this back.
    """
    # the index follows from the vertebrae
    return dataclasses.replace(
        result, vertebrae=tuple(_vertebra(entry) for entry in result.vertebrae), durations_s={}, index=None
    )


def result_digest(result: ScreeningResult, effective_settings: str) -> str:
    """sha256 over the result as reported and a description of the settings that shaped it, as hexadecimal digits."""
    document = json.dumps(as_reported(result).to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{len(document)}:{document}{effective_settings}".encode()).hexdigest()


def _vertebra(finding: VertebraFinding) -> VertebraFinding:
    x, y, z = (_round(value, CENTRE_DECIMALS) for value in finding.centre_lps_mm)
    measured, corrected = finding.attenuation_hu, finding.attenuation_hu_corrected
    return dataclasses.replace(
        finding,
        centre_lps_mm=(x, y, z),
        confidence=_round(finding.confidence, PROBABILITY_DECIMALS),
        attenuation_hu=None
        if measured is None
        else Attenuation(
            mean=_round(measured.mean, ATTENUATION_DECIMALS),
            median=_round(measured.median, ATTENUATION_DECIMALS),
            sd=_round(measured.sd, ATTENUATION_DECIMALS),
            volume_mm3=_round(measured.volume_mm3, VOLUME_DECIMALS),
            voxel_count=measured.voxel_count,
            standard_error=None
            if measured.standard_error is None
            else _round(measured.standard_error, ATTENUATION_DECIMALS),
        ),
        attenuation_hu_corrected=None
        if corrected is None
        else CorrectedAttenuation(
            mean=_round(corrected.mean, ATTENUATION_DECIMALS), factors=_mapping(corrected.factors, FACTOR_DECIMALS)
        ),
        network=None if finding.network is None else _network(finding.network),
        heights_mm=None
        if finding.heights_mm is None
        else (
            _round(finding.heights_mm[0], HEIGHT_DECIMALS),
            _round(finding.heights_mm[1], HEIGHT_DECIMALS),
            _round(finding.heights_mm[2], HEIGHT_DECIMALS),
        ),
    )


def _network(network: NetworkFinding) -> NetworkFinding:
    classes, interval = network.class_probabilities, network.bmd_interval_90_g_cm2
    return dataclasses.replace(
        network,
        bmd_g_cm2=None if network.bmd_g_cm2 is None else _round(network.bmd_g_cm2, BMD_DECIMALS),
        t_score=None if network.t_score is None else _round(network.t_score, T_SCORE_DECIMALS),
        class_probabilities=None if classes is None else _mapping(classes, PROBABILITY_DECIMALS),
        level_probabilities=_mapping(network.level_probabilities, PROBABILITY_DECIMALS),
        expert_weights=tuple(_round(weight, PROBABILITY_DECIMALS) for weight in network.expert_weights),
        bmd_interval_90_g_cm2=None
        if interval is None
        else (_round(interval[0], BMD_DECIMALS), _round(interval[1], BMD_DECIMALS)),
    )


def _mapping(values: Mapping[str, float], decimals: int) -> dict[str, float]:
    return {str(name): _round(value, decimals) for name, value in values.items()}


def _round(value: float, decimals: int) -> float:
    # adding zero turns -0.0 into 0.0: both print alike and must hash alike
    return round(float(value), decimals) + 0.0
