"""Where the vertebrae of a scan come from: the localiser's network, a DICOM segmentation, or TotalSegmentator.

The setting ``screener.vertebrae`` chooses. A segmentation must have been made for the screened series; where there is
none that can be used, the network takes over. TotalSegmentator has no such stand-in: who asked for it gets it, or the
study waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydicom.dataset import Dataset

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import SEGMENTATION_SOURCE, ModelReference, QualityFlag, Severity
from osteo_daemon.errors import NotEligible, VertebraeUnusable
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.masked_vertebrae import localize_masks
from osteo_daemon.inference.segmentation_reader import is_segmentation, read_segmentation
from osteo_daemon.inference.signature import find_signed_bundle
from osteo_daemon.inference.totalsegmentator import TotalSegmentator
from osteo_daemon.inference.vertebra import Localization
from osteo_daemon.settings import Settings

NETWORK, SEGMENTATION, TOTALSEGMENTATOR = "network", "segmentation", "totalsegmentator"

OUR_MANUFACTURER = "osteo_daemon"
"""Segmentations of our own are passed over: they would return the network's names without its doubts."""


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A scan with what its study holds beside it.

    Attributes:
        header: of one slice of the screened series.
        others: file and header of every object of the study.
    """

    volume: CtVolume
    header: Dataset
    others: Sequence[tuple[Path, Dataset]]


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Vertebrae and who found them.

    Attributes:
        source: ``network``, ``segmentation`` or ``totalsegmentator``.
        model: bundle, segmentation object or program that they come from.
        passed_over: why segmentations of the study were not used: SOP Instance UID and reason.
    """

    localization: Localization
    source: str
    model: ModelReference
    passed_over: tuple[tuple[str, str], ...] = ()

    def to_manifest(self) -> dict[str, Any]:
        """The provenance as the manifest keeps it."""
        return {
            "source": self.source,
            "from": {"bundle": self.model.bundle, "version": self.model.version, "sha256": self.model.sha256},
            "passed_over": [{"sop_instance_uid": uid, "reason": reason} for uid, reason in self.passed_over],
        }


class VertebraSource(Protocol):
    """A scan in, named vertebrae out."""

    @property
    def model(self) -> ModelReference:
        """What finds the vertebrae as long as the study brings none."""

    def __call__(self, scan: Scan) -> Located:
        """Find the vertebrae of a scan.

        Raises:
            NotEligible: there are none to be found.
            Transient: a later attempt may succeed.
        """


@dataclass(frozen=True, slots=True, eq=False)
class NetworkSource:
    """The localiser."""

    localizer: SpineLocalizer
    model: ModelReference

    def __call__(self, scan: Scan) -> Located:
        """Find the vertebrae of a scan; see `SpineLocalizer`."""
        return Located(self.localizer(scan.volume), NETWORK, self.model)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentationSource:
    """The newest segmentation of the study that fits the scan; ``otherwise`` where none does."""

    otherwise: VertebraSource

    @property
    def model(self) -> ModelReference:
        """That of the stand-in."""
        return self.otherwise.model

    def __call__(self, scan: Scan) -> Located:
        """Read, carry over and cut the masks; a segmentation that can't be used gives its reason and way to the next.

        Raises:
            NotEligible: see ``otherwise``.
        """
        passed_over: list[tuple[str, str]] = []
        candidates = [(path, header) for path, header in scan.others if is_segmentation(header)]
        for path, header in sorted(candidates, key=lambda entry: _age(entry[1]), reverse=True):
            uid = str(header.SOPInstanceUID)
            try:
                _check_reference(header, scan.header)
                read = read_segmentation(path)
                localization = localize_masks(read.regions, scan.volume)
            except VertebraeUnusable as error:
                passed_over.append((uid, error.detail))
                continue
            model = ModelReference(SEGMENTATION_SOURCE, read.sop_instance_uid, read.sha256)
            flag = QualityFlag("vertebrae_from_segmentation", Severity.INFO)
            return Located(_with_flag(localization, flag), SEGMENTATION, model, tuple(passed_over))
        located = self.otherwise(scan)
        if not passed_over:
            return located
        flag = QualityFlag("segmentation_not_used", Severity.INFO)
        return replace(located, localization=_with_flag(located.localization, flag), passed_over=tuple(passed_over))


@dataclass(frozen=True, slots=True, eq=False)
class TotalSegmentatorSource:
    """An installed TotalSegmentator."""

    program: TotalSegmentator

    @property
    def model(self) -> ModelReference:
        """Program and weights."""
        return self.program.model

    def __call__(self, scan: Scan) -> Located:
        """Run it on the scan.

        Raises:
            NotEligible: ``no_lumbar_vertebra`` when it finds none, ``insufficient_coverage`` when what it finds is no
                lumbar spine that can be measured.
            Transient: it failed or took too long.
        """
        regions = self.program(scan.volume)
        if not any(level.startswith("L") for level in regions):
            raise NotEligible(ExclusionCode.NO_LUMBAR_VERTEBRA, "TotalSegmentator found no lumbar vertebra")
        try:
            localization = localize_masks(regions, scan.volume)
        except VertebraeUnusable as error:
            raise NotEligible(ExclusionCode.INSUFFICIENT_COVERAGE, error.detail) from error
        flag = QualityFlag("vertebrae_from_totalsegmentator", Severity.INFO)
        return Located(_with_flag(localization, flag), TOTALSEGMENTATOR, self.program.model)


def choose_source(settings: Settings, device: torch.device) -> VertebraSource:
    """The source that ``screener.vertebrae`` names.

    Raises:
        BundleError: the localiser's bundle cannot be used.
        ConfigurationError: TotalSegmentator or its weights are missing.
    """
    chosen = settings.screener.vertebrae
    if chosen == TOTALSEGMENTATOR:
        return TotalSegmentatorSource(TotalSegmentator.find(settings.totalsegmentator, device.type))
    localizer = find_signed_bundle(settings.screener.localizer_bundle, settings)
    model = ModelReference(localizer.name, localizer.version, localizer.sha256)
    network = NetworkSource(SpineLocalizer.from_bundle(localizer, device), model)
    return SegmentationSource(network) if chosen == SEGMENTATION else network


def _check_reference(segmentation: Dataset, screened: Dataset) -> None:
    """A segmentation speaks of the screened series only in the same frame of reference.

    Raises:
        VertebraeUnusable: another frame, none, or a segmentation of our own.
    """
    if str(segmentation.get("Manufacturer") or "") == OUR_MANUFACTURER:
        raise VertebraeUnusable("made by this product")
    frame = str(segmentation.get("FrameOfReferenceUID") or "")
    if not frame or frame != str(screened.get("FrameOfReferenceUID") or ""):
        raise VertebraeUnusable("not in the frame of reference of the screened series")


def _age(header: Dataset) -> tuple[str, str, str]:
    """Sorts segmentations by their date and time of content; the UID makes the order the same every time."""
    return (
        str(header.get("ContentDate") or ""),
        str(header.get("ContentTime") or ""),
        str(header.get("SOPInstanceUID") or ""),
    )


def _with_flag(localization: Localization, flag: QualityFlag) -> Localization:
    return replace(localization, flags=(*localization.flags, flag))
