"""The screening role as a process: bad studies end in a state with a reason, and the process goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom

from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings
from tests.ct_series import column, write_slices
from tests.fakes import CALLING, RoleProcess, settings_text, until


def _receive(spool: Spool, store: JobStore, files: Sequence[Path]) -> str:
    """Spool and record the files as the receiver does, complete; returns the study's UID."""
    for path in files:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        uids = (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
        stored = spool.store_instance(*uids, [path.read_bytes()])
        study, series, instance = (str(uid) for uid in uids)
        store.record_instance(
            SopInstance(
                study_instance_uid=study,
                series_instance_uid=series,
                sop_class_uid=str(header.SOPClassUID),
                sop_instance_uid=instance,
                transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
                path=stored.path,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
            ),
            CALLING,
        )
    store.mark_complete(study, who="test", reason="all sent")
    return study


def test_bad_studies_end_with_a_reason_and_the_next_one_runs(tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 1))
    settings = load_settings(config, {})
    spool, store = Spool(settings.spool_dir), JobStore(settings.database_url)
    voxels = np.zeros((50, 16, 16), dtype=np.int16)

    cut = write_slices(tmp_path / "cut", voxels, column(50, 2.5), PatientName="Secret^Name", PatientID="SECRET-7")
    cut[25].write_bytes(cut[25].read_bytes()[:-100])
    truncated = _receive(spool, store, cut)
    sharp = _receive(spool, store, write_slices(tmp_path / "sharp", voxels, column(50, 2.5), ConvolutionKernel="LUNG"))
    empty = _receive(spool, store, write_slices(tmp_path / "empty", voxels, column(50, 2.5)))

    role = RoleProcess(["run", "screener", "--config", str(config)], tmp_path / "screener.log").start()
    try:
        until(lambda: store.counts_by_state()[JobState.READY] + store.counts_by_state()[JobState.SCREENING] == 0, 120)
    finally:
        status = role.stop()
    assert status == 0, role.log.read_text()

    found = {job.study_instance_uid: job for job in store.recent()}
    assert (found[truncated].state, found[truncated].code) == (JobState.HELD, "PixelDataUnreadable")
    assert "slice 26" in (found[truncated].detail or "")
    assert (found[sharp].state, found[sharp].code) == (JobState.EXCLUDED, "unsuitable_kernel")
    assert (found[empty].state, found[empty].code) == (JobState.EXCLUDED, "no_lumbar_vertebra")
    assert len(store.instances(store.job(truncated))) == 50  # held, nothing deleted
    assert all(instance.path.exists() for instance in store.instances(store.job(truncated)))
    log = role.log.read_text()
    assert "Secret" not in log
    assert "SECRET-7" not in log
    assert "Traceback" not in log
