"""Real scans for tests: the labelled torso as a DICOM series, altered copies, predictions read from the documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom

from osteo_daemon.domain.findings import ScreeningResult, Severity
from tests.conftest import ROOT
from tests.ct_series import write_slices

TORSO_CLASSES = {"L5": 27, "L4": 28, "L3": 29, "L2": 30, "L1": 31, "T12": 32}
"""Classes of the torso's label map (the data's readme)."""


@dataclass(frozen=True)
class Torso:
    """The labelled torso: (D, H, W) arrays of 3 mm and their (4, 4) affine to LPS mm."""

    voxels: npt.NDArray[np.float32]
    levels: npt.NDArray[np.uint8]
    bodies: npt.NDArray[np.bool_]
    affine: npt.NDArray[np.float64]

    def body(self, level: str) -> npt.NDArray[np.bool_]:
        """(D, H, W) mask of one vertebral body."""
        return np.asarray((self.levels == TORSO_CLASSES[level]) & self.bodies)

    def centre_lps_mm(self, level: str) -> npt.NDArray[np.float64]:
        """(3,) centroid of one vertebral body."""
        index = np.argwhere(self.body(level)).mean(axis=0)
        return np.asarray(self.affine[:3, :3] @ index + self.affine[:3, 3])


def read_torso(folder: Path) -> Torso:
    """Read the NIfTI files (x, y, z in RAS) as D, H, W in LPS."""

    def array(name: str) -> npt.NDArray[np.float32]:
        image = nib.load(folder / name)
        return np.ascontiguousarray(np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0))

    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nib.load(folder / "example_ct.nii.gz").affine
    return Torso(
        array("example_ct.nii.gz"),
        array("totalseg.nii.gz").astype(np.uint8),
        array("totalseg_vertebrae_body.nii.gz") == 1,
        np.asarray(affine[:, [2, 1, 0, 3]], dtype=np.float64),
    )


def write_torso(torso: Torso, voxels: npt.NDArray[np.float32], folder: Path) -> list[Path]:
    """The torso as axial CT images of 3 mm. Its file names neither tube voltage nor kernel, so neither do these."""
    steps = torso.affine[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    positions = [torso.affine[:3, 3] + index * steps[:, 0] for index in range(len(voxels))]
    return write_slices(
        folder,
        np.round(voxels).astype(np.int16),
        positions,
        orientation=[*(steps[:, 2] / spacing[2]), *(steps[:, 1] / spacing[1])],
        spacing_mm=(float(spacing[1]), float(spacing[2])),
        SliceThickness="3",
        KVP=None,
        ConvolutionKernel=None,
    )


def altered_copy(
    paths: list[Path],
    folder: Path,
    change: Callable[[pydicom.Dataset, npt.NDArray[np.float64]], npt.NDArray[np.float64]],
) -> list[Path]:
    """Copies of CT images; ``change`` gets header and stored values (H, W) and gives the values to store."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array
        values = change(dataset, stored.astype(np.float64))
        limits = np.iinfo(stored.dtype)
        dataset.PixelData = np.clip(np.round(values), limits.min, limits.max).astype(stored.dtype).tobytes()
        written.append(folder / path.name)
        dataset.save_as(written[-1], enforce_file_format=True)
    return written


@dataclass(frozen=True)
class Prediction:
    """A row of the table of predictions in docs/refusals.md."""

    scan: str
    outcome: str
    code: str
    category: str


def predictions() -> list[Prediction]:
    """Read the table from the page."""
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    lines = page.partition("## Predictions")[2].partition("| scan |")[2].splitlines()[2:]
    rows = [line for line in lines if line.startswith("|")]
    return [Prediction(*(cell.strip().strip("`") for cell in row.strip("|").split("|"))) for row in rows]


def departures(prediction: Prediction, result: ScreeningResult) -> list[str]:
    """In what a result differs from its prediction; nothing when it is as predicted."""
    found = []
    if result.outcome.value != prediction.outcome:
        found.append(f"{result.outcome.value} instead of {prediction.outcome}")
    codes = {flag.code for flag in result.quality_flags if flag.severity is Severity.BLOCKING}
    if result.exclusion is not None:
        codes.add(str(result.exclusion.code))
    expected = set() if prediction.code == "none" else {prediction.code}
    if codes != expected:
        found.append(f"codes {sorted(codes)} instead of {sorted(expected)}")
    category = "-" if result.category is None else result.category.value
    if category != prediction.category:
        found.append(f"category {category} instead of {prediction.category}")
    return found
