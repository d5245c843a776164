"""A running screener role, and studies put before it as the receiver does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pydicom

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import JobSummary
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings
from tests.ct_series import column, write_slices
from tests.fakes import CALLING, RoleProcess, settings_text, until


@dataclass
class Bench:
    """State folder, store and screener role of one test."""

    folder: Path
    config: Path
    spool: Spool
    store: JobStore
    role: RoleProcess

    @property
    def log(self) -> str:
        return self.role.log.read_text(errors="replace")

    def worker(self) -> psutil.Process:
        """The role's computing process."""
        assert self.role.process is not None
        (child,) = until(psutil.Process(self.role.process.pid).children)
        return child

    def ready(self, times: int = 1) -> psutil.Process:
        """The worker, once models were loaded for the n-th time."""
        until(lambda: self.log.count("screener_ready") >= times, 180)
        return self.worker()

    def wait_until_computed(self) -> None:
        """Until the worker works no more: its answer lies in the socket, whether or not the role reads it."""
        worker = self.worker()

        def quiet() -> bool:
            before = worker.cpu_times()
            time.sleep(1)
            return worker.cpu_times() == before

        until(quiet, 180)

    def study(self, name: str, **attributes: Any) -> str:
        """An empty CT, complete; it ends EXCLUDED (no_lumbar_vertebra) when it is screened."""
        voxels = np.zeros((50, 16, 16), dtype=np.int16)
        return self.receive(write_slices(self.folder / name, voxels, column(50, 2.5), **attributes))

    def receive(self, files: Sequence[Path], *, complete: bool = True) -> str:
        """Spool and record the files as the receiver does; returns the study's UID."""
        for path in files:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            uids = (str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID))
            stored = self.spool.store_instance(*uids, [path.read_bytes()])
            self.store.record_instance(
                SopInstance(
                    study_instance_uid=uids[0],
                    series_instance_uid=uids[1],
                    sop_class_uid=str(header.SOPClassUID),
                    sop_instance_uid=uids[2],
                    transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
                    path=stored.path,
                    size_bytes=stored.size_bytes,
                    sha256=stored.sha256,
                ),
                CALLING,
            )
        if complete:
            self.store.mark_complete(uids[0], who="test", reason="all sent")
        return uids[0]

    def job(self, study: str) -> Job:
        job = self.store.job(study)
        assert job is not None
        return job

    def summary(self, study: str) -> JobSummary:
        (summary,) = self.store.recent(study_instance_uid=study)
        return summary

    def reaches(self, study: str, state: JobState, seconds: float = 180) -> JobSummary:
        """Wait until a study has reached a state."""
        until(lambda: self.job(study).state is state, seconds)
        return self.summary(study)

    def events(self, study: str) -> list[str]:
        return [event.event for event in self.store.events(study)]


@contextmanager
def running_screener(
    folder: Path,
    *,
    prefix: Sequence[str] = (),
    models: str = "",
    extra: str = "",
    status: int = 0,
    module: str = "osteo_daemon.cli",
    **settings: Any,
) -> Iterator[Bench]:
    """`osteo run screener` with short times, which must end with ``status``; ``settings`` are keys of its section."""
    values = {"lease_seconds": 3, "poll_seconds": 0.1, "retry_base_seconds": 0.1, "threads": 1, **settings}
    section = "\n".join(f"{key} = {str(value).lower()}" for key, value in values.items())
    config = folder / "osteo.toml"
    config.write_text(models + settings_text(folder / "state", 1, extra=f"[screener]\n{section}\n{extra}"))
    loaded = load_settings(config, {})
    role = RoleProcess(["run", "screener", "--config", str(config)], folder / "screener.log", module=module)
    role.start(prefix)
    bench = Bench(folder, config, Spool(loaded.spool_dir), JobStore(loaded.database_url), role)
    try:
        yield bench
    finally:
        ended = role.stop()
        bench.store.close()
    assert ended == status, bench.log
