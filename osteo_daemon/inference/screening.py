"""One study's way from DICOM files to a `ScreeningResult`: select, locate, measure, predict, decide."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydicom.dataset import Dataset

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.eligibility import CLASSIFICATION_AGE_YEARS, MINIMUM_AGE_YEARS, ExclusionCode, age_years
from osteo_daemon.domain.findings import (
    MEASURED_LEVELS,
    Exclusion,
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    QualityFlag,
    ScreeningResult,
    Severity,
    VertebraFinding,
)
from osteo_daemon.errors import ConfigurationError, Damaged, NotEligible
from osteo_daemon.imaging.selection import Candidate, Rejection, refusal, select_series
from osteo_daemon.imaging.series import ct_slices, one_study
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, find_bundle
from osteo_daemon.inference.density import Measurement, measure
from osteo_daemon.inference.quality import ScanQuality, assess, correct, tube_voltage
from osteo_daemon.inference.vertebra import Vertebra
from osteo_daemon.inference.vertebra_network import MINIMUM_COVERAGE, Prediction, VertebraNetwork
from osteo_daemon.inference.vertebra_source import Scan, VertebraSource, choose_source
from osteo_daemon.settings import Settings

Progress = Callable[[str], None]

CLINICAL = "clinical"
"""Status of a bundle that a site promoted on a verdict on real DXA pairs."""

LEVEL_DISAGREEMENT_PROBABILITY = 0.8
"""The network contradicts the localiser's name when it gives this much to another level."""


@dataclass(frozen=True, slots=True, eq=False)
class Screening:
    """A result with what its report is built from.

    Attributes:
        result: what was found, or why the study was not screened.
        headers: headers without pixels: of the screened series in the order of the volume's D axis, or of any one
            image of an excluded study.
        volume: the screened series; None for an excluded study.
        measurements: regions of each measured level.
        manifest: versions, bundle digests, device, durations, rejected series, measured scan quality.
    """

    result: ScreeningResult
    headers: tuple[Dataset, ...]
    volume: CtVolume | None
    measurements: Mapping[Level, Measurement]
    manifest: Mapping[str, Any]


@dataclass(slots=True)
class _Clock:
    """Seconds spent in each stage of one screening."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


class StudyScreener:
    """Screens studies one after another with warm models."""

    def __init__(self, source: VertebraSource, network: ModelBundle | None, device: torch.device) -> None:
        self.device = device
        self._locate = source
        self._network_models = (
            () if network is None else (ModelReference(network.name, network.version, network.sha256),)
        )
        self.models = (source.model, *self._network_models)
        self._network = None if network is None else VertebraNetwork.from_bundle(network, device)
        self._network_status = "" if network is None else network.status

    @classmethod
    def load(cls, settings: Settings, device: torch.device | None = None) -> StudyScreener:
        """Load and verify the bundles that the settings name.

        Args:
            settings: of the node.
            device: another than that of the settings.

        Raises:
            BundleError: a bundle is missing, changed or of another schema.
            ConfigurationError: the GPU or the program asked for isn't there.
        """
        screener = settings.screener
        if screener.threads:
            torch.set_num_threads(screener.threads)
        chosen = device or choose_device(screener.device)
        network = find_bundle(screener.network_bundle, settings.models_dir) if screener.network_enabled else None
        return cls(choose_source(settings, chosen), network, chosen)

    def screen(self, source: Iterable[Path] | StudyFiles, progress: Progress = lambda _stage: None) -> Screening:
        """Screen one study.

        Args:
            source: every object of one study, in any order, as files or read ahead; other objects than CT images are
                passed over.
            progress: called with the name of each stage as it starts.

        Raises:
            Damaged: no readable object, several studies, or a slice of the screened series can't be decoded.
        """
        clock = _Clock()
        progress("read headers")
        with clock.stage("headers"):
            files = source if isinstance(source, StudyFiles) else StudyFiles.read(source)
        headers = files.headers
        if not headers:
            reasons = "; ".join(entry.reason for entry in files.unreadable[:3])
            raise Damaged(f"there is no readable DICOM object{': ' + reasons if reasons else ''}")
        study_uid = one_study(headers)
        rejections: list[Rejection] = []
        try:
            patient = _Patient.of(headers[0][1])
            candidates, rejections = select_series(ct_slices(headers))
            if not candidates:
                raise refusal(rejections)
            patient.check_age()
            return self._first_screenable(study_uid, candidates, rejections, patient, files, clock, progress)
        except NotEligible as exclusion:
            result = ScreeningResult(
                study_instance_uid=study_uid,
                series_instance_uid=None,
                outcome=Outcome.EXCLUDED,
                exclusion=Exclusion(exclusion.code, exclusion.reason),
                category=None,
                models=self.models,
                durations_s=clock.seconds,
            )
            ct = next((header for _, header in headers if header.get("Modality") == "CT"), headers[0][1])
            return Screening(result, (ct,), None, {}, self._manifest(result, rejections, None))

    def _first_screenable(
        self,
        study_uid: str,
        candidates: Sequence[Candidate],
        rejections: list[Rejection],
        patient: _Patient,
        files: StudyFiles,
        clock: _Clock,
        progress: Progress,
    ) -> Screening:
        first: NotEligible | None = None
        for candidate in candidates:
            try:
                return self._screen_stack(study_uid, candidate, rejections, patient, files, clock, progress)
            except NotEligible as error:
                rejections.append(
                    Rejection(candidate.stack.series_instance_uid, ExclusionCode(error.code), error.reason)
                )
                first = first or error
        if first is None:
            raise ValueError("select_series gives at least one candidate")
        raise first

    def _screen_stack(
        self,
        study_uid: str,
        candidate: Candidate,
        rejections: Sequence[Rejection],
        patient: _Patient,
        files: StudyFiles,
        clock: _Clock,
        progress: Progress,
    ) -> Screening:
        stack = candidate.stack
        progress("decode")
        with clock.stage("decode"):
            volume = files.volume(stack)
        progress("find vertebrae")
        with clock.stage("localize"):
            located = self._locate(Scan(volume, stack.header, files.headers))
        localization = located.localization
        vertebrae = [vertebra for vertebra in localization.vertebrae if vertebra.level in MEASURED_LEVELS]
        progress("measure")
        with clock.stage("measure"):
            quality = assess(volume, [v.centre_lps_mm for v in vertebrae], [v.axes_lps for v in vertebrae])
            measurements = {
                Level(vertebra.level): measure(volume, vertebra.body_region, vertebra.axes_lps)
                for vertebra in vertebrae
            }
        progress("predict")
        with clock.stage("network"):
            predictions = self._predict(volume, vertebrae)
        kvp = tube_voltage(stack.header)
        findings, correction_flags = [], set[QualityFlag]()
        for vertebra, prediction in zip(vertebrae, predictions, strict=True):
            finding, flags = _finding(
                vertebra,
                measurements[Level(vertebra.level)],
                prediction,
                self._network_status,
                "" if self._network is None else self._network.scale.reference,
                kvp,
                patient,
            )
            findings.append(finding)
            correction_flags.update(flags)
        study_flags = [*candidate.quality_flags, *localization.flags, *quality.quality_flags, *patient.quality_flags]
        study_flags += sorted(correction_flags, key=lambda flag: flag.code)
        if files.unreadable:
            study_flags.append(QualityFlag("unreadable_objects", Severity.CAUTION))
        decision = decide(findings, study_flags)
        result = ScreeningResult(
            study_instance_uid=study_uid,
            series_instance_uid=stack.series_instance_uid,
            outcome=Outcome.REPORTED,
            exclusion=None,
            category=decision.category,
            vertebrae=tuple(findings),
            quality_flags=(*study_flags, *decision.quality_flags),
            models=(located.model, *self._network_models),
            durations_s=clock.seconds,
        )
        slices = tuple(item.header for item in stack.slices)
        manifest = self._manifest(result, rejections, quality) | {"vertebrae": located.to_manifest()}
        return Screening(result, slices, volume, measurements, manifest)

    def _predict(self, volume: CtVolume, vertebrae: Sequence[Vertebra]) -> Sequence[Prediction | None]:
        if self._network is None:
            return [None] * len(vertebrae)
        return self._network.predict(volume, [(str(v.level), v.centre_lps_mm, v.axes_lps) for v in vertebrae])

    def _manifest(
        self, result: ScreeningResult, rejections: Sequence[Rejection], quality: ScanQuality | None
    ) -> dict[str, Any]:
        measured = (
            {}
            if quality is None
            else {
                "air_hu": quality.air_hu,
                "fat_hu": quality.fat_hu,
                "vessel_hu": quality.vessel_hu,
                "noise_hu": quality.noise_hu,
            }
        )
        packages = ("osteo-daemon", "torch", "monai", "pydicom", "highdicom", "numpy", "scipy")
        return {
            "schema": "osteo-manifest/1",
            "outcome": result.outcome.value,
            "exclusion": None if result.exclusion is None else result.exclusion.code,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "models": [{"bundle": m.bundle, "version": m.version, "sha256": m.sha256} for m in result.models],
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "scan_quality": measured,
            "rejected_series": [
                {"series_instance_uid": r.series_instance_uid, "code": r.code.value, "reason": r.reason}
                for r in rejections
            ],
            "durations_s": dict(result.durations_s),
        }


@dataclass(frozen=True, slots=True)
class _Patient:
    """What the header says of age and sex; a missing one withholds what needs it and is never replaced."""

    age_years: int | None
    sex: str | None

    @classmethod
    def of(cls, header: Dataset) -> _Patient:
        values = (header.get("PatientAge"), header.get("PatientBirthDate"), header.get("StudyDate"))
        sex = str(header.get("PatientSex") or "").strip().upper()
        return cls(age_years(*(str(value or "") for value in values)), sex if sex in ("F", "M") else None)

    def check_age(self) -> None:
        if self.age_years is not None and self.age_years < MINIMUM_AGE_YEARS:
            reason = f"the patient is younger than {MINIMUM_AGE_YEARS} years"
            raise NotEligible(ExclusionCode.AGE_BELOW_LIMIT, reason)

    @property
    def classifiable(self) -> bool:
        """True when WHO classes and T-scores are defined for this patient."""
        return self.age_years is not None and self.age_years >= CLASSIFICATION_AGE_YEARS and self.sex is not None

    @property
    def quality_flags(self) -> tuple[QualityFlag, ...]:
        flags = []
        if self.age_years is None:
            flags.append(QualityFlag("age_missing", Severity.CAUTION))
        elif self.age_years < CLASSIFICATION_AGE_YEARS:
            flags.append(QualityFlag("age_below_classification", Severity.INFO))
        if self.sex is None:
            flags.append(QualityFlag("sex_missing", Severity.CAUTION))
        return tuple(flags)


def _finding(
    vertebra: Vertebra,
    measurement: Measurement,
    prediction: Prediction | None,
    status: str,
    reference: str,
    kvp: float | None,
    patient: _Patient,
) -> tuple[VertebraFinding, tuple[QualityFlag, ...]]:
    flags = [*vertebra.flags, *measurement.quality_flags]
    corrected, correction_flags = None, tuple[QualityFlag, ...]()
    if measurement.attenuation is not None:
        corrected, correction_flags = correct(measurement.attenuation, kvp)
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
        )
        likeliest = max(prediction.level_probabilities, key=lambda level: prediction.level_probabilities[level])
        # an investigational network raises no doubt about names either
        if (
            status == CLINICAL
            and likeliest != vertebra.level
            and prediction.level_probabilities[likeliest] >= LEVEL_DISAGREEMENT_PROBABILITY
        ):
            flags.append(QualityFlag("level_disagreement", Severity.INFO))
    x, y, z = (round(float(value), 1) for value in np.asarray(vertebra.centre_lps_mm))
    finding = VertebraFinding(
        level=Level(vertebra.level),
        centre_lps_mm=(x, y, z),
        confidence=round(float(vertebra.confidence), 3),
        attenuation_hu=measurement.attenuation,
        attenuation_hu_corrected=corrected,
        network=network,
        quality_flags=tuple(flags),
    )
    return finding, correction_flags


def _withheld(prediction: Prediction, patient: _Patient) -> dict[str, str]:
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


def choose_device(name: str) -> torch.device:
    """The device that the setting ``auto``, ``cpu`` or ``cuda`` means on this machine.

    Raises:
        ConfigurationError: ``cuda`` is asked for and there is no usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError('screener.device is "cuda" and torch sees no GPU; check the driver or set "auto"')
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
