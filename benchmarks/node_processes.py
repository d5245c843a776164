"""The processes of a node under load: started again when they end, and one that stands in for the screener."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pydicom
from pydicom.uid import generate_uid

from benchmarks.results import ROOT
from osteo_daemon.errors import LeaseLost, Transient
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings


def stand_in(config: Path, report: Path, service_s: float) -> None:
    """Claim, wait the service time, commit a report: the screener's side of the store without the computing."""
    settings = load_settings(config, {})
    store, spool = JobStore(settings.database_url), Spool(settings.spool_dir)
    template = pydicom.dcmread(report)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    while not stopping.is_set():
        job = store.claim("stand-in", settings.screener.lease_seconds)
        if job is None:
            stopping.wait(settings.screener.poll_seconds)
            continue
        start = time.monotonic()
        uid = generate_uid(entropy_srcs=[job.study_instance_uid, str(job.revision)])
        template.StudyInstanceUID = job.study_instance_uid
        template.SOPInstanceUID = template.file_meta.MediaStorageSOPInstanceUID = uid
        written = io.BytesIO()
        template.save_as(written, enforce_file_format=True)
        stored = spool.store_report(job.study_instance_uid, uid, [written.getvalue()])
        entry = ReportObject(
            ReportKind.SR, str(template.SOPClassUID), uid, stored.path, stored.size_bytes, stored.sha256
        )
        time.sleep(max(start + service_s - time.monotonic(), 0.0))
        # late slices may have taken the study away meanwhile: that is what LeaseLost is for, and it comes again
        try:
            store.commit_report(job, {"stand_in": True}, [entry], [NewDelivery("pacs", (uid,))])
        except (LeaseLost, Transient) as error:
            print(type(error).__name__, file=sys.stderr, flush=True)


@dataclass
class Roles:
    """The processes, started again when they end."""

    commands: Mapping[str, Sequence[str]]
    log: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    restarts: list[tuple[float, str]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def tend(self) -> None:
        """Start what is not running."""
        for role, command in self.commands.items():
            process = self.running.get(role)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.restarts.append((time.monotonic() - self.start, role))
            with self.log.open("ab") as sink:
                self.running[role] = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)

    def memory_mb(self) -> dict[str, float]:
        """Resident set of each role with its children."""
        found: dict[str, float] = {}
        for role, process in self.running.items():
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                found[role] = sum(member.memory_info().rss for member in family) / 1e6
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
