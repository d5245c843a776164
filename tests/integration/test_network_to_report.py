"""Over the network to a report: multi-frame CT as it is sent, and compressed pixels that lie, with one worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import EnhancedCTImageStorage, JPEG2000Lossless

from osteo_daemon.dicom.report_reader import read_report
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.records import ReportKind
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from tests.ct_series import column, write_slices
from tests.enhanced_ct import write_enhanced
from tests.fakes import local_receiver, settings_text, storescu, until
from tests.integration.screening import running_screener
from tests.unit.test_decoder import claiming


@pytest.mark.slow
def test_multi_frame_ct_is_reported_and_a_bomb_is_held_by_one_worker(tmp_path: Path) -> None:
    patient = VirtualPatient(seed=12, age_years=70, sex="F", density_mg_cm3=90.0)
    files = write_series(render_study(patient, coarse_scanner(5.0), top="L3", bottom="S1"), tmp_path / "single")
    frames = tmp_path / "frames.dcm"
    sent = write_enhanced(frames, files, transfer_syntax_uid=JPEG2000Lossless)
    bomb = _bomb(tmp_path)

    (tmp_path / "receiver").mkdir()
    with running_screener(tmp_path, network_enabled=False) as bench:
        until(lambda: "screener_ready" in bench.log, 240)
        worker = bench.worker()
        with local_receiver(tmp_path / "receiver", settings_text(tmp_path / "state", 0)) as port:
            for paths in ([frames], bomb):
                done = storescu(port, paths, "-xv")
                assert done.returncode == 0, done.stderr
        held, reported = str(dcmread(bomb[0]).StudyInstanceUID), str(sent.StudyInstanceUID)
        for study in (held, reported):
            bench.store.mark_complete(study, who="test", reason="all sent")

        found = bench.reaches(held, JobState.HELD, 120)
        assert found.code == "PixelDataUnreadable"
        assert found.detail is not None
        assert "slice 30" in found.detail
        assert bench.job(held).attempts == 1  # for good: no second worker meets it

        bench.reaches(reported, JobState.REPORTED, 200)
        assert bench.worker().pid == worker.pid
        objects = {entry.kind: entry.path for entry in bench.store.report_objects(reported)}
        report = read_report(objects[ReportKind.SR])
        assert report.StudyInstanceUID == reported
        evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        referred = {str(item.ReferencedSOPClassUID) for series in evidence for item in series.ReferencedSOPSequence}
        assert EnhancedCTImageStorage in referred


def _bomb(folder: Path) -> list[Path]:
    """A series of 50 slices in JPEG 2000, one of which claims 65535 x 65535 pixels."""
    voxels = np.random.default_rng(1).integers(-1000, 1000, (50, 64, 64))
    files = write_slices(folder / "bomb", voxels, column(50, 2.5))
    for number, path in enumerate(files, start=1):
        dataset = dcmread(path)
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        if number == 30:
            dataset.PixelData = encapsulate([claiming(get_frame(dataset.PixelData, 0, number_of_frames=1), 65535)])
        dataset.save_as(path)
    return files
