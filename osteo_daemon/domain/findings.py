"""What a screening finds: the values that travel from the screener to the report, in plain Python.

`ScreeningResult` serialises to and from the JSON schema ``osteo-result/1`` (docs/report.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA = "osteo-result/1"


class Level(StrEnum):
    """Vertebral levels the product knows, cranial to caudal."""

    T10 = "T10"
    T11 = "T11"
    T12 = "T12"
    L1 = "L1"
    L2 = "L2"
    L3 = "L3"
    L4 = "L4"
    L5 = "L5"
    S1 = "S1"


MEASURED_LEVELS = (Level.T12, Level.L1, Level.L2, Level.L3, Level.L4, Level.L5)
"""Levels whose attenuation is measured and reported."""

AVERAGED_LEVELS = (Level.L1, Level.L2, Level.L3, Level.L4)
"""Levels that may enter the category (the ISCD's DXA region, and QCT practice: two or more lumbar vertebrae)."""


class Severity(StrEnum):
    """What a quality flag means for the result."""

    INFO = "info"  # said, changes nothing
    CAUTION = "caution"  # the number stands, read it with care
    BLOCKING = "blocking"  # the number may not decide the category


class Category(StrEnum):
    """Study category from attenuation alone. There is no "normal"."""

    LOW = "low"
    REDUCED = "reduced"
    NOT_FLAGGED = "not_flagged"
    INDETERMINATE = "indeterminate"


class Outcome(StrEnum):
    """How a screening ended."""

    REPORTED = "reported"
    EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class QualityFlag:
    """A remark on a vertebra or a study; every code is explained in docs/report.md."""

    code: str
    severity: Severity


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Why a study was not screened: a code of `eligibility.ExclusionCode` and one line for people."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Attenuation:
    """Trabecular attenuation as measured.

    Attributes:
        mean, median, sd: over the region's voxels in HU.
        volume_mm3: of the region.
        voxel_count: voxels in the region; None in results written before 0.2.0.
        standard_error: of the mean in HU, correlation between voxels included; None as above.
    """

    mean: float
    median: float
    sd: float
    volume_mm3: float
    voxel_count: int | None = None
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class CorrectedAttenuation:
    """Attenuation in HU after published corrections.

    Attributes:
        mean: the measured mean, corrected.
        factors: every correction by name, in the order of application. A name that ends in ``_hu`` is added, every
            other one multiplies.
    """

    mean: float
    factors: Mapping[str, float]

    def apply(self, attenuation_hu: float) -> float:
        """Another attenuation of the same vertebra (its median) under the same corrections."""
        for name, value in self.factors.items():
            attenuation_hu = attenuation_hu + value if name.endswith("_hu") else attenuation_hu * value
        return attenuation_hu


@dataclass(frozen=True, slots=True)
class AttenuationIndex:
    """What the category was decided by, and L1 by itself; medians in HU.

    Attributes:
        levels: levels of L1-L4 that count.
        measured, corrected: mean of their medians as measured, and after corrections (the deciding one).
        l1_measured, l1_corrected: L1's median, None when L1 doesn't count.
    """

    levels: tuple[Level, ...]
    measured: float
    corrected: float
    l1_measured: float | None
    l1_corrected: float | None


@dataclass(frozen=True, slots=True)
class NetworkFinding:
    """Calibrated output of the network channel for one vertebra.

    Attributes:
        status: the bundle's status, ``investigational`` or ``clinical``.
        bmd_g_cm2: areal BMD on the scale that the bundle declares, or None when withheld.
        t_score: against the reference that the report names, or None when age or sex is missing or below the limit.
        class_probabilities: ``normal``, ``osteopenia``, ``osteoporosis``; sums to 1.
        level_probabilities: vertebral level to probability; sums to 1.
        expert_weights: gate weight per expert; sums to 1.
        bmd_interval_90_g_cm2: 90 % prediction interval of the BMD, or None when that is withheld.
        t_score_reference: the young adults that the T-score compares with, as the bundle names them.
        withheld: why a value isn't given: ``bmd``, ``t_score`` or ``class`` to a code of docs/report.md.
        quality_flags: on these estimates alone; they never touch the category.
    """

    status: str
    bmd_g_cm2: float | None
    t_score: float | None
    class_probabilities: Mapping[str, float] | None
    level_probabilities: Mapping[str, float]
    expert_weights: tuple[float, ...]
    bmd_interval_90_g_cm2: tuple[float, float] | None = None
    t_score_reference: str | None = None
    withheld: Mapping[str, str] = field(default_factory=dict)
    quality_flags: tuple[QualityFlag, ...] = ()


@dataclass(frozen=True, slots=True)
class VertebraFinding:
    """One vertebra of the report; ``centre_lps_mm`` in the patient coordinate system of PS3.3 C.7.6.2.1.1.

    ``heights_mm`` are the body's anterior, middle and posterior height, ``compression_grade`` 0 to 3 follows from them
    and the neighbours' (docs/localizer.md); None where they could not be measured.
    """

    level: Level
    centre_lps_mm: tuple[float, float, float]
    confidence: float
    attenuation_hu: Attenuation | None
    attenuation_hu_corrected: CorrectedAttenuation | None = None
    network: NetworkFinding | None = None
    quality_flags: tuple[QualityFlag, ...] = ()
    heights_mm: tuple[float, float, float] | None = None
    compression_grade: int | None = None

    @property
    def blocked(self) -> bool:
        """True when a blocking flag keeps this level out of the category."""
        return any(flag.severity is Severity.BLOCKING for flag in self.quality_flags)


SEGMENTATION_SOURCE = "dicom-segmentation"
"""`ModelReference.bundle` of vertebrae out of a study's segmentation: its version is the SOP Instance UID, its sha256
that of the file."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Which bundle made a number: its name, version and the sha256 of its manifest."""

    bundle: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ScreeningResult:
    """The outcome of one screening; the single source of report, picture and console."""

    study_instance_uid: str
    series_instance_uid: str | None
    outcome: Outcome
    exclusion: Exclusion | None
    category: Category | None
    vertebrae: tuple[VertebraFinding, ...] = ()
    quality_flags: tuple[QualityFlag, ...] = ()
    models: tuple[ModelReference, ...] = ()
    durations_s: Mapping[str, float] = field(default_factory=dict)
    index: AttenuationIndex | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values in the order of the schema ``osteo-result/1``."""
        return {
            "schema": SCHEMA,
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "outcome": self.outcome.value,
            "exclusion": None if self.exclusion is None else dataclasses.asdict(self.exclusion),
            "category": None if self.category is None else self.category.value,
            "vertebrae": [_vertebra_to_json(vertebra) for vertebra in self.vertebrae],
            "quality_flags": [_flag_to_json(flag) for flag in self.quality_flags],
            "models": [dataclasses.asdict(model) for model in self.models],
            "durations_s": dict(self.durations_s),
            "index_hu": None
            if self.index is None
            else {**dataclasses.asdict(self.index), "levels": [level.value for level in self.index.levels]},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ScreeningResult:
        """Read back what `to_json` wrote.

        Raises:
            ValueError: the document is not of this schema or a field is missing.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"not an {SCHEMA} document: schema is {document.get('schema')!r}")
        try:
            return cls(
                study_instance_uid=document["study_instance_uid"],
                series_instance_uid=document["series_instance_uid"],
                outcome=Outcome(document["outcome"]),
                exclusion=None if document["exclusion"] is None else Exclusion(**document["exclusion"]),
                category=None if document["category"] is None else Category(document["category"]),
                vertebrae=tuple(_vertebra_from_json(entry) for entry in document["vertebrae"]),
                quality_flags=tuple(_flag_from_json(entry) for entry in document["quality_flags"]),
                models=tuple(ModelReference(**entry) for entry in document["models"]),
                durations_s=dict(document["durations_s"]),
                index=_index_from_json(document.get("index_hu")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a complete {SCHEMA} document: {error}") from error


def _index_from_json(entry: Mapping[str, Any] | None) -> AttenuationIndex | None:
    # results written before 0.2.0 have none
    if entry is None:
        return None
    return AttenuationIndex(**{**entry, "levels": tuple(Level(level) for level in entry["levels"])})


def _flag_to_json(flag: QualityFlag) -> dict[str, str]:
    return {"code": flag.code, "severity": flag.severity.value}


def _flag_from_json(entry: Mapping[str, str]) -> QualityFlag:
    return QualityFlag(code=entry["code"], severity=Severity(entry["severity"]))


def _vertebra_to_json(vertebra: VertebraFinding) -> dict[str, Any]:
    corrected = vertebra.attenuation_hu_corrected
    network = vertebra.network
    return {
        "level": vertebra.level.value,
        "centre_lps_mm": list(vertebra.centre_lps_mm),
        "confidence": vertebra.confidence,
        "attenuation_hu": None if vertebra.attenuation_hu is None else dataclasses.asdict(vertebra.attenuation_hu),
        "attenuation_hu_corrected": None
        if corrected is None
        else {"mean": corrected.mean, "factors": dict(corrected.factors)},
        "network": None
        if network is None
        else {
            "status": network.status,
            "bmd_g_cm2": network.bmd_g_cm2,
            "t_score": network.t_score,
            "class_probabilities": None if network.class_probabilities is None else dict(network.class_probabilities),
            "level_probabilities": dict(network.level_probabilities),
            "expert_weights": list(network.expert_weights),
            "bmd_interval_90_g_cm2": None
            if network.bmd_interval_90_g_cm2 is None
            else list(network.bmd_interval_90_g_cm2),
            "t_score_reference": network.t_score_reference,
            "withheld": dict(network.withheld),
            "quality_flags": [_flag_to_json(flag) for flag in network.quality_flags],
        },
        "quality_flags": [_flag_to_json(flag) for flag in vertebra.quality_flags],
        "heights_mm": None if vertebra.heights_mm is None else list(vertebra.heights_mm),
        "compression_grade": vertebra.compression_grade,
    }


def _vertebra_from_json(entry: Mapping[str, Any]) -> VertebraFinding:
    corrected, network = entry["attenuation_hu_corrected"], entry["network"]
    heights = entry.get("heights_mm")  # absent from documents of before they were added
    return VertebraFinding(
        level=Level(entry["level"]),
        centre_lps_mm=(entry["centre_lps_mm"][0], entry["centre_lps_mm"][1], entry["centre_lps_mm"][2]),
        confidence=entry["confidence"],
        attenuation_hu=None if entry["attenuation_hu"] is None else Attenuation(**entry["attenuation_hu"]),
        attenuation_hu_corrected=None if corrected is None else CorrectedAttenuation(**corrected),
        network=None if network is None else _network_from_json(network),
        quality_flags=tuple(_flag_from_json(flag) for flag in entry["quality_flags"]),
        heights_mm=None if heights is None else (heights[0], heights[1], heights[2]),
        compression_grade=entry.get("compression_grade"),
    )


def _network_from_json(entry: Mapping[str, Any]) -> NetworkFinding:
    # results written before 0.2.0 have no interval, reference, reasons and flags
    interval = entry.get("bmd_interval_90_g_cm2")
    return NetworkFinding(
        **{
            **entry,
            "expert_weights": tuple(entry["expert_weights"]),
            "bmd_interval_90_g_cm2": None if interval is None else (interval[0], interval[1]),
            "quality_flags": tuple(_flag_from_json(flag) for flag in entry.get("quality_flags", ())),
        }
    )
