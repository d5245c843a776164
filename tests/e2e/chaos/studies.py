"""Many small studies from one rendered virtual patient: screenable ones, and ones with a known reason not to be."""

from __future__ import annotations

import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.uid import UID

from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from tests.conftest import ROOT

REPORTED = "reported"
EXCLUSIONS = {"sharp": "unsuitable_kernel", "short": "insufficient_coverage"}
"""Kinds of studies that must end excluded, and with which code."""

_SHORT_SLICES = 8


@dataclass(frozen=True)
class SmallStudy:
    """One study on disk. ``kind``: `REPORTED` or a key of `EXCLUSIONS`."""

    number: int
    uid: str
    kind: str
    files: tuple[Path, ...]


class Corpus:
    """Renders once, then makes studies by giving the same slices other UIDs and another patient."""

    def __init__(self, folder: Path, seed: int) -> None:
        patient = VirtualPatient(seed=11, age_years=70, sex="F", density_mg_cm3=90.0)
        study = render_study(patient, coarse_scanner(5.0), top="L3", bottom="S1")
        self._slices = [pydicom.dcmread(path) for path in write_series(study, folder / "rendered")]
        self._sources = _screened_at_rest(folder)
        self._folder = folder
        self._seed = seed

    def study(self, number: int, kind: str) -> SmallStudy:
        """Study ``number``: the same number and seed give the same bytes."""
        folder = self._folder / f"study-{number:04d}"
        folder.mkdir(parents=True)
        study_uid, series_uid = self._uid("study", number), self._uid("series", number)
        files = []
        for position, dataset in enumerate(self._slices[: _SHORT_SLICES if kind == "short" else None]):
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = self._uid("image", number, position)
            dataset.PatientID, dataset.PatientName = f"CHAOS-{number}", f"Chaos^Number{number}"
            dataset.ConvolutionKernel = "LUNG" if kind == "sharp" else "SOFT"
            path = folder / f"{position:03d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            files.append(path)
        return SmallStudy(number, study_uid, kind, tuple(files))

    def expected_sources(self, number: int) -> set[str]:
        """Images of a screenable study that its segmentation must name."""
        return {str(self._uid("image", number, position)) for position in self._sources}

    def _uid(self, *parts: object) -> UID:
        text = "/".join(str(part) for part in (self._seed, *parts))
        return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, text).int}")


def _screened_at_rest(folder: Path) -> list[int]:
    """Positions of the slices that the segmentation of the whole rendered study names."""
    command = [
        sys.executable,
        "-m",
        "osteo_daemon.cli",
        "screen",
        str(folder / "rendered"),
        "--out",
        str(folder / "at-rest"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    segmentation = pydicom.dcmread(folder / "at-rest" / "segmentation.dcm")
    named = {
        str(instance.ReferencedSOPInstanceUID)
        for series in segmentation.ReferencedSeriesSequence
        for instance in series.ReferencedInstanceSequence
    }
    rendered = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((folder / "rendered").iterdir())]
    return [position for position, header in enumerate(rendered) if header.SOPInstanceUID in named]
