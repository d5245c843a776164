"""A study through the real screening into the archive: the network's own voxels, and no word of whose they are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from osteo_daemon.archive.archivist import Archivist
from osteo_daemon.archive.key import make_key
from osteo_daemon.archive.record import MARGIN_VOXELS, StudyVois
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.imaging.preprocess import extract_voi
from osteo_daemon.inference.screening import StudyScreener
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.labels import body_mask, posterior_mask
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from osteo_daemon.settings import Settings
from osteo_daemon.worker_process import WorkerProcess
from tests.segmentations import write_segmentation

LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")


def settings_of(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "state_dir": folder / "state",
            "archive": {"enabled": True, "consent": "vote", "key_file": folder / "link.key"},
            "receiver": {"minimum_free_bytes": 0, "low_free_bytes": 1},
            "screener": {"vertebrae": "segmentation", "device": "cpu", "threads": 1},
            "site": {"trend": False},
        }
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A virtual patient with a segmentation: the localizer need not run."""
    folder = tmp_path_factory.mktemp("archived")
    patient = VirtualPatient(seed=7_000_021, age_years=93, sex="F", density_mg_cm3=90.0, bmi_kg_m2=24.0)
    study = render_study(patient, coarse_scanner(3.0, noise_hu=12.0, seed=7_000_021), top="T11")
    paths = write_series(study, folder)
    for path in paths:
        image = pydicom.dcmread(path)
        image.PatientName, image.PatientID, image.IssuerOfPatientID = "SECRETNAME^ANNA", "SECRETID77", "SECRETISSUER"
        image.PatientBirthDate, image.StudyDate, image.AccessionNumber = "19330207", "20260105", "SECRETACC9"
        image.save_as(path)
    source = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    masks = {
        f"vertebrae_{level}": body_mask(study.labels, level) | posterior_mask(study.labels, level) for level in LEVELS
    }
    return [*paths, write_segmentation(folder / "seg.dcm", masks, study.affine, source)]


def check_nothing_tells_who(settings: Settings, files: list[Path]) -> None:
    uids = {
        str(pydicom.dcmread(path, stop_before_pixels=True)[name].value)
        for path in files[-2:]
        for name in (
            "StudyInstanceUID",
            "SeriesInstanceUID",
            "SOPInstanceUID",
            "FrameOfReferenceUID",
        )
    }
    words = [b"SECRET", b"ANNA", b"19330207", b"20260105", b"2026-01-05", *(uid.encode() for uid in uids)]
    kept = [path for path in settings.archive_dir.rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        content = path.read_bytes() + str(path.relative_to(settings.archive_dir)).encode()
        for word in words:
            assert word not in content, (path.name, word)


def the_study(archive: VoiArchive) -> StudyVois:
    (entry,) = archive.entries()
    return archive.read(entry)


def test_what_is_archived_is_what_the_network_saw(files: list[Path], tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    make_key(tmp_path / "link.key")
    screening = StudyScreener.load(settings).screen(files)
    archivist = Archivist(settings)
    archivist.take(screening, 1)
    archivist.wait()
    kept = the_study(VoiArchive(settings, JobStore(settings.database_url)))
    assert [vertebra.level for vertebra in kept.vertebrae] == list(LEVELS)
    assert screening.voi is not None
    assert screening.volume is not None
    assert kept.hu.shape[1:] == tuple(n + 2 * MARGIN_VOXELS for n in screening.voi.shape)
    for index, (vertebra, record) in enumerate(zip(screening.vertebrae, kept.vertebrae, strict=True)):
        seen = extract_voi(screening.volume, vertebra.centre_lps_mm, vertebra.axes_lps, screening.voi)
        assert np.abs(kept.on_grid(index, screening.voi, 0) - seen.hu).max() <= 0.5 + 1e-3
        assert record.coverage == pytest.approx(seen.coverage, abs=1e-4)
    measured = {str(v.level): v.attenuation_hu for v in screening.result.vertebrae}
    for record in kept.vertebrae:
        attenuation = measured[record.level]
        assert attenuation is not None
        assert record.features["median_hu"] == pytest.approx(attenuation.median, abs=1e-3)
    about = kept.acquisition
    assert (about.age_years, about.sex, about.kvp, about.kernel_class) == (90, "F", 120.0, "soft")
    assert about.phase == "unenhanced"
    check_nothing_tells_who(settings, files)


def _screen(worker: WorkerProcess, token: int, files: list[Path], settings: Settings) -> dict[str, Any]:
    worker.send(
        {
            "type": "screen",
            "token": token,
            "study": str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID),
            "revision": token,
            "paths": [str(path) for path in files],
            "predecessors": {},
            "lacks": None,
            "localizer_bundle": settings.screener.localizer_bundle,
            "network_bundle": settings.screener.network_bundle,
        }
    )
    while True:
        message = worker.receive(120)
        assert message is not None
        if message.get("token") == token:
            return message


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_archive_that_fails_fails_no_study(files: list[Path], tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    make_key(tmp_path / "link.key")
    (tmp_path / "link.key").chmod(0o644)
    store = JobStore(settings.database_url)
    archive = VoiArchive(settings, store)
    worker = WorkerProcess(settings)
    try:
        assert _screen(worker, 1, files, settings)["type"] == "reported"
        _wait(lambda: archive.status().not_archived == {"ConfigurationError": 1})
        assert archive.entries() == []
        (tmp_path / "link.key").chmod(0o600)
        assert _screen(worker, 2, files, settings)["type"] == "reported"
        _wait(archive.entries)
    finally:
        worker.kill()
    ((_, who),) = archive.identities()
    assert (who.patient_id, who.issuer, who.accession) == ("SECRETID77", "SECRETISSUER", "SECRETACC9")
    assert archive.verify() == []
    check_nothing_tells_who(settings, files)
