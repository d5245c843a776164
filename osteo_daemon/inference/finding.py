"""One vertebra's measurement and estimates as the finding that is reported."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from osteo_daemon.domain.findings import Level, NetworkFinding, QualityFlag, Severity, VertebraFinding
from osteo_daemon.inference.contrast import Phase
from osteo_daemon.inference.density import Measurement
from osteo_daemon.inference.patient import Patient
from osteo_daemon.inference.quality import correct
from osteo_daemon.inference.vertebra import Vertebra
from osteo_daemon.inference.vertebra_network import MINIMUM_COVERAGE, Prediction

CLINICAL = "clinical"
"""Status of a bundle that a site promoted on a verdict on real DXA pairs."""

LEVEL_DISAGREEMENT_PROBABILITY = 0.8
"""The network contradicts the localiser's name when it gives this much to another level."""


def finding_of(
    vertebra: Vertebra,
    measurement: Measurement,
    prediction: Prediction | None,
    status: str,
    reference: str,
    kvp: float | None,
    phase: Phase,
    patient: Patient,
    names_confirmed: bool,
) -> tuple[VertebraFinding, tuple[QualityFlag, ...]]:
    flags = [*vertebra.flags, *measurement.quality_flags]
    corrected, correction_flags = None, tuple[QualityFlag, ...]()
    if measurement.attenuation is not None:
        corrected, correction_flags = correct(measurement.attenuation, kvp, phase)
    network = None
    if prediction is not None:
        network = NetworkFinding(
            status=status,
            bmd_g_cm2=_rounded(prediction.bmd_g_cm2, 3),
            t_score=_rounded(prediction.t_score, 1) if patient.classifiable else None,
            class_probabilities=_shares(prediction.class_probabilities) if patient.classifiable else None,
            level_probabilities=_shares(prediction.level_probabilities) or {},
            expert_weights=tuple(round(weight, 3) for weight in prediction.expert_weights),
            bmd_interval_90_g_cm2=_interval(prediction.bmd_interval_90_g_cm2),
            t_score_reference=reference if prediction.t_score is not None and patient.classifiable else None,
            withheld=_withheld(prediction, patient),
            quality_flags=(QualityFlag("network_out_of_distribution", Severity.CAUTION),)
            if prediction.out_of_distribution
            else (),
        )
        likeliest = max(prediction.level_probabilities, key=lambda level: prediction.level_probabilities[level])
        # an investigational network raises no doubt about names either
        if (
            status == CLINICAL
            # one vertebra alone errs too often: all of them read together must disagree, too
            and not names_confirmed
            and likeliest != vertebra.level
            and prediction.level_probabilities[likeliest] >= LEVEL_DISAGREEMENT_PROBABILITY
        ):
            flags.append(QualityFlag("level_disagreement", Severity.INFO))
    heights = vertebra.heights
    x, y, z = (round(float(value), 1) for value in np.asarray(vertebra.centre_lps_mm))
    finding = VertebraFinding(
        level=Level(vertebra.level),
        centre_lps_mm=(x, y, z),
        confidence=round(float(vertebra.confidence), 3),
        attenuation_hu=measurement.attenuation,
        attenuation_hu_corrected=corrected,
        network=network,
        quality_flags=tuple(flags),
        heights_mm=None
        if heights is None
        else (round(heights.anterior_mm, 1), round(heights.middle_mm, 1), round(heights.posterior_mm, 1)),
        compression_grade=vertebra.compression_grade,
    )
    return finding, correction_flags


def _withheld(prediction: Prediction, patient: Patient) -> dict[str, str]:
    """Why a value of the network isn't given, by value; codes of docs/report.md."""
    if prediction.bmd_g_cm2 is None:
        reason = "scan_edge" if prediction.coverage < MINIMUM_COVERAGE else "level_without_reference"
        return {"bmd": reason, "t_score": reason, "class": reason}
    if not patient.classifiable:
        reason = next(flag.code for flag in patient.quality_flags)
        return {"t_score": reason, "class": reason}
    return {} if prediction.t_score is not None else {"t_score": "level_without_reference"}


def _interval(values: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if values is None else (round(values[0], 3), round(values[1], 3))


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _shares(values: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if values is None else {name: round(value, 3) for name, value in values.items()}
