"""Rendered virtual patients on disk, so that a benchmark run again pays for reading them only.

A file is named after everything that its pixels depend on: patient, scanner, limits and the source of the phantom.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

import osteo_daemon.phantom
from benchmarks.heldout import COVERAGES, Draw
from benchmarks.results import ROOT
from osteo_daemon.phantom.body import build_body
from osteo_daemon.phantom.study import PhantomStudy, render_study, true_vertebrae

FOLDER = ROOT / "runs" / "spine-phantoms"
"""Ignored by git; about 4 MB a patient."""


def source_digest(*packages: Path) -> str:
    """Hexadecimal digest of the Python source in some folders or files, by name and content."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.glob("*.py")) if package.is_dir() else [package]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def phantom_source() -> Path:
    """Folder of the phantom's source."""
    return Path(osteo_daemon.phantom.__path__[0])


def phantom(draw: Draw) -> PhantomStudy:
    """The scan of one draw with its ideal attenuation, from the cache where it is there."""
    top, bottom = COVERAGES[draw.coverage]
    key = f"{draw.patient!r}|{draw.scanner!r}|{top}|{bottom}|{source_digest(phantom_source())}"
    path = (
        FOLDER / f"{draw.anatomy.replace(' ', '-')}-{draw.seed:04d}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    )
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            voxels, labels, ideal, affine = (stored[name] for name in ("voxels", "labels", "ideal_hu", "affine"))
        body = build_body(draw.patient, draw.scanner, draw.scanner.pixel_spacing_mm)
        first, last = float(affine[2, 3]), float(affine[2, 3] + affine[2, 0] * (len(voxels) - 1))
        truth = true_vertebrae(body, first, last)
        return PhantomStudy(voxels, affine, labels, truth, draw.patient, draw.scanner, ideal)
    study = render_study(draw.patient, draw.scanner, top=top, bottom=bottom, workers=1, ideal=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file, voxels=study.voxels, labels=study.labels, ideal_hu=study.ideal_hu, affine=study.affine
        )
    partial.replace(path)
    return study
