"""One study's way from DICOM files to a `ScreeningResult`: select, locate, measure, predict, decide."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydicom.dataset import Dataset

from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import (
    MEASURED_LEVELS,
    Category,
    Exclusion,
    Level,
    ModelReference,
    Outcome,
    QualityFlag,
    ScreeningResult,
    Severity,
)
from osteo_daemon.errors import ConfigurationError, Damaged, NotEligible, PixelDataUnreadable
from osteo_daemon.imaging.acquisition import scanner_of
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.imaging.selection import Candidate, Rejection, not_preferred, other_series, refusal, select_series
from osteo_daemon.imaging.slices import ct_slices, one_study
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.inference.contrast import measure_enhancement
from osteo_daemon.inference.density import Measurement, measure
from osteo_daemon.inference.finding import finding_of
from osteo_daemon.inference.level_sequence import names_confirmed
from osteo_daemon.inference.patient import Patient
from osteo_daemon.inference.quality import ScanQuality, assess, check_scale, tube_voltage
from osteo_daemon.inference.signature import find_signed_bundle
from osteo_daemon.inference.surroundings import survey
from osteo_daemon.inference.transitional import settled_flags
from osteo_daemon.inference.vertebra import Vertebra
from osteo_daemon.inference.vertebra_network import Prediction, VertebraNetwork
from osteo_daemon.inference.vertebra_source import Scan, VertebraSource, choose_source
from osteo_daemon.settings import Settings

Progress = Callable[[str], None]

MAXIMUM_SCREENED_SERIES = 3
"""Series of one study that are screened in full, until one gives a category without contrast agent."""

MAXIMUM_PROBED_SERIES = 4
"""Series that are looked at for contrast agent when the first holds some; reading one costs a second or more."""


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
        vertebrae: the measured ones, with their frames.
        voi: the grid that the network saw each of them on; None without network.
    """

    result: ScreeningResult
    headers: tuple[Dataset, ...]
    volume: CtVolume | None
    measurements: Mapping[Level, Measurement]
    manifest: Mapping[str, Any]
    vertebrae: tuple[Vertebra, ...] = ()
    voi: VoiSpec | None = None

    def of_incomplete_study(self, lacks: Lacks) -> Screening:
        """The same of a study that was known to lack something when it was screened: its flags say so."""
        flag = QualityFlag(lacks.value, _SEVERITY_OF_LACK[lacks])
        result = replace(self.result, quality_flags=(flag, *self.result.quality_flags))
        return replace(self, result=result)


_SEVERITY_OF_LACK = {
    # what is measured is measured on even stacks, never across a hole: the number stands, and more images may change it
    Lacks.IMAGES: Severity.CAUTION,
    # the series that is here is whole: another one may have been the better choice, or is not sent here at all
    Lacks.SERIES: Severity.INFO,
}


@dataclass(frozen=True, slots=True, eq=False)
class _Attempt:
    """One screened series of a study that may hold a better one."""

    screening: Screening
    vertebrae: tuple[Vertebra, ...]
    enhanced: bool

    @property
    def decided(self) -> bool:
        """True when the series gave a category."""
        return self.screening.result.category is not Category.INDETERMINATE

    @property
    def rank(self) -> tuple[bool, bool]:
        """The smaller the better: a category first, then no contrast agent."""
        return (not self.decided, self.enhanced)

    @property
    def shortcoming(self) -> str:
        """What speaks against it, in words."""
        if not self.decided:
            return "it gives no category"
        return "it holds contrast agent" if self.enhanced else "another one was screened first"


_BEST_RANK = (False, False)


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
        network = find_signed_bundle(screener.network_bundle, settings) if screener.network_enabled else None
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
            patient = Patient.of(headers[0][1])
            series = ct_slices(headers)
            candidates, rejections = select_series(series)
            rejections += other_series(headers, series.keys())
            if not candidates:
                raise refusal(rejections)
            patient.check_age()
            return self._best_screening(study_uid, candidates, rejections, patient, files, clock, progress)
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

    def _best_screening(
        self,
        study_uid: str,
        candidates: Sequence[Candidate],
        rejections: list[Rejection],
        patient: Patient,
        files: StudyFiles,
        clock: _Clock,
        progress: Progress,
    ) -> Screening:
        """The first candidate that gives a category without contrast agent, else the best of the first few."""
        refused: NotEligible | None = None
        kept: tuple[Candidate, _Attempt] | None = None
        screened = probed = 0
        for candidate in candidates:
            enough = screened >= MAXIMUM_SCREENED_SERIES or probed >= MAXIMUM_PROBED_SERIES
            if kept is not None and (kept[1].rank == _BEST_RANK or enough):
                rejections.append(not_preferred(candidate, kept[0]))
                continue
            try:
                if kept is not None and kept[1].decided:
                    probed += 1
                    if not self._may_be_native(candidate, kept, files, clock):
                        rejections.append(not_preferred(candidate, kept[0], "it holds contrast agent, too"))
                        continue
                attempt = self._screen_stack(study_uid, candidate, patient, files, clock, progress)
            except PixelDataUnreadable:
                if kept is None:
                    raise
                rejections.append(not_preferred(candidate, kept[0], "its pixels cannot be read"))
                continue
            except NotEligible as error:
                uid = candidate.stack.series_instance_uid
                rejections.append(Rejection(uid, ExclusionCode(error.code), error.reason))
                refused = refused or error
                continue
            screened += 1
            if kept is None:
                kept = candidate, attempt
            elif attempt.rank < kept[1].rank:
                rejections.append(not_preferred(kept[0], candidate, kept[1].shortcoming))
                kept = candidate, attempt
            else:
                rejections.append(not_preferred(candidate, kept[0], attempt.shortcoming))
        if kept is None:
            raise refused or ValueError("select_series gives at least one candidate")
        screening = kept[1].screening
        rejected = [rejection.to_json() for rejection in rejections]
        return replace(screening, manifest={**screening.manifest, "rejected_series": rejected})

    def _may_be_native(
        self, candidate: Candidate, kept: tuple[Candidate, _Attempt], files: StudyFiles, clock: _Clock
    ) -> bool:
        """Look for contrast agent where the vertebrae of the screened series are, if the two share their geometry."""
        frames = {str(stack.header.get("FrameOfReferenceUID") or "") for stack in (candidate.stack, kept[0].stack)}
        if len(frames) > 1 or "" in frames:
            return True
        with clock.stage("probe"):
            enhancement = measure_enhancement(files.volume(candidate.stack), kept[1].vertebrae)
        return enhancement.aorta_hu is None or not enhancement.enhanced

    def _screen_stack(
        self,
        study_uid: str,
        candidate: Candidate,
        patient: Patient,
        files: StudyFiles,
        clock: _Clock,
        progress: Progress,
    ) -> _Attempt:
        stack = candidate.stack
        progress("decode")
        with clock.stage("decode"):
            volume = files.volume(stack)
            surroundings = survey(volume)
            check_scale(surroundings)
        progress("find vertebrae")
        with clock.stage("localize"):
            located = self._locate(Scan(volume, stack.header, files.headers))
        localization = located.localization
        vertebrae = [vertebra for vertebra in localization.vertebrae if vertebra.level in MEASURED_LEVELS]
        progress("measure")
        with clock.stage("measure"):
            quality = assess(volume, vertebrae, surroundings)
            measurements = {
                Level(vertebra.level): measure(volume, vertebra.body_region, vertebra.axes_lps)
                for vertebra in vertebrae
            }
        progress("predict")
        with clock.stage("network"):
            predictions = self._predict(volume, vertebrae, stack.header)
            confirmed = names_confirmed([v.level for v in vertebrae], predictions)
        kvp = tube_voltage(stack.header)
        findings, correction_flags = [], set[QualityFlag]()
        for vertebra, prediction in zip(vertebrae, predictions, strict=True):
            finding, flags = finding_of(
                vertebra,
                measurements[Level(vertebra.level)],
                prediction,
                self._network_status,
                "" if self._network is None else self._network.scale.reference,
                kvp,
                quality.enhancement.phase,
                patient,
                confirmed,
            )
            findings.append(finding)
            correction_flags.update(flags)
        study_flags = [*candidate.quality_flags, *settled_flags(localization, findings)]
        study_flags += [*quality.quality_flags, *patient.quality_flags]
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
            index=decision.index,
        )
        slices = tuple(item.header for item in stack.slices)
        manifest = self._manifest(result, (), quality) | {"vertebrae": located.to_manifest()}
        voi = None if self._network is None else self._network.voi
        screening = Screening(result, slices, volume, measurements, manifest, tuple(vertebrae), voi)
        return _Attempt(screening, tuple(vertebrae), quality.enhancement.enhanced)

    def _predict(self, volume: CtVolume, vertebrae: Sequence[Vertebra], header: Dataset) -> Sequence[Prediction | None]:
        if self._network is None:
            return [None] * len(vertebrae)
        places = [(str(v.level), v.centre_lps_mm, v.axes_lps) for v in vertebrae]
        return self._network.predict(volume, places, scanner=scanner_of(header))

    def _manifest(
        self, result: ScreeningResult, rejections: Sequence[Rejection], quality: ScanQuality | None
    ) -> dict[str, Any]:
        packages = ("osteo-daemon", "torch", "monai", "pydicom", "highdicom", "numpy", "scipy")
        return {
            "schema": "osteo-manifest/1",
            "outcome": result.outcome.value,
            "exclusion": None if result.exclusion is None else result.exclusion.code,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "models": [{"bundle": m.bundle, "version": m.version, "sha256": m.sha256} for m in result.models],
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "scan_quality": {} if quality is None else quality.to_json(),
            "rejected_series": [rejection.to_json() for rejection in rejections],
            "durations_s": dict(result.durations_s),
        }


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
