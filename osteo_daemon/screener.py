"""The screening role: claim a study, have it screened, keep its lease, commit its report.

Two processes share it. This one claims, beats and commits, and never touches a pixel; its worker (`screening_worker`)
computes. So a heartbeat does not depend on a busy interpreter, a lease does not outlive a worker that hangs, and a
study that kills its worker is told from one that hangs it.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from os import getpid
from types import FrameType
from typing import Any

from osteo_daemon.audit.events import process
from osteo_daemon.control import Mode, StatusFile, read_wish
from osteo_daemon.domain.job import Job
from osteo_daemon.errors import LeaseLost, Transient, WorkerDied
from osteo_daemon.handling import tell_read
from osteo_daemon.jobs.claims import WALL_CLOCK_LIMIT
from osteo_daemon.jobs.records import ReportKind
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import LeaseWatch
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.outcome import OutcomeWriter
from osteo_daemon.settings import Settings
from osteo_daemon.vitals import Vitals
from osteo_daemon.worker_process import WorkerProcess

WORKER_DIED = "worker_died"
"""Code of a study whose worker ended in the middle: out of memory, a crash in a decoder."""

_TICK_SECONDS = 0.2  # how soon a signal or a pause is noticed while the worker computes
_CANCEL_SECONDS = 30.0  # how long a worker may go on with a study that nobody wants any more
_SUSPECTS = 64
_PATIENCE_SECONDS = 300.0
"""Models that load, and a store that does not answer, may take so long before the role counts as hanging."""


def run(settings: Settings) -> int:
    """Screen studies until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: a bundle is missing or changed, the GPU asked for isn't there, or the job store can't be
            used.
    """
    configure_logging(settings.log, "screener")
    screener = Screener(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, screener.stop)
    return screener.work()


class Screener:
    """One screening slot: one worker process, one study at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = get_logger()
        self._store = JobStore(settings.database_url)
        self._name = f"screener-{socket.gethostname()}-{getpid()}"
        self._stopping = threading.Event()
        self._outcome = OutcomeWriter(self._store, settings.screener, self._stopping)
        self._status = StatusFile(settings.state_dir)
        self._vitals = Vitals(settings.state_dir, "screener", _PATIENCE_SECONDS)
        self._is_ready = False
        self._worker: WorkerProcess | None = None
        self._ahead: int | None = None  # job that is, or was, read ahead of its turn
        self._reading_ahead = False
        self._suspects: list[int] = []
        self._token = 0

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: no further claim; a study in hand gets a short grace."""
        self._stopping.set()

    def work(self) -> int:
        """Claim and screen until `stop`; returns the exit status: 1 when the worker ends without a study in hand."""
        try:
            while not self._stopping.is_set():
                self._turn()
        except WorkerDied as error:
            # without a study in hand it is not a study's fault: whoever started this role starts it again, later
            self._log.error("worker_died", detail=error.detail)
            return 1
        finally:
            self._vitals.stopping()
            if self._worker is not None:
                self._worker.kill()
            self._status.remove()
            self._store.close()
            self._vitals.close()
        self._log.info("screener_stopped")
        return 0

    def _turn(self) -> None:
        mode = read_wish(self._settings.state_dir).mode
        if mode is Mode.DRAIN:
            self._unload()
        if mode is not Mode.RUN:
            self._status.write(state="paused" if mode is Mode.PAUSE else "drained", job_id=None)
            self._came_round()
            self._idle()
            return
        worker = self._ready_worker()
        if worker is None:
            return
        self._came_round()
        self._status.write(state="idle", job_id=None)
        job = self._claim()
        if job is None:
            self._idle()
            return
        self._status.write(state="screening", job_id=job.job_id)
        self._one(worker, job)

    def _came_round(self) -> None:
        """Models are loaded, or a person wants none; while they load nothing is said."""
        if not self._is_ready:
            self._is_ready = True
            self._vitals.ready()
        self._vitals.alive()

    def _idle(self) -> None:
        """Wait; a worker that dies meanwhile is noticed."""
        if self._worker is None:
            self._stopping.wait(self._settings.screener.poll_seconds)
        elif (message := self._worker.receive(self._settings.screener.poll_seconds)) is not None:
            self._told(message)

    def _ready_worker(self) -> WorkerProcess | None:
        """The worker with its models loaded; None when the node stops first."""
        if self._worker is None:
            self._status.write(state="loading", job_id=None)
            self._worker = WorkerProcess(self._settings)
            while not self._stopping.is_set():
                message = self._worker.receive(_TICK_SECONDS)
                if message is not None and message["type"] == "ready":
                    self._told(message)
                    seconds = round(time.monotonic() - self._worker.started_at, 2)
                    self._log.info("screener_ready", device=message["device"], pid=self._worker.pid, duration_s=seconds)
                    return self._worker
            return None
        return self._worker

    def _unload(self) -> None:
        if self._worker is not None:
            self._log.info("models_unloaded", pid=self._worker.pid)
            self._worker.kill()
            self._worker, self._ahead, self._reading_ahead = None, None, False

    def _claim(self) -> Job | None:
        screener = self._settings.screener
        # the store's own limit is for a screener that hangs itself: it comes after the one that is kept here
        limit = screener.wall_clock_seconds + screener.lease_seconds
        try:
            return self._store.claim(self._name, screener.lease_seconds, screener.maximum_attempts, limit_seconds=limit)
        except Transient as error:
            self._log.warning("claim_failed", error=type(error).__name__)
            return None

    def _one(self, worker: WorkerProcess, job: Job) -> None:
        screener = self._settings.screener
        start = time.monotonic()
        log = self._log.bind(job_id=job.job_id, study_instance_uid=job.study_instance_uid, revision=job.revision)
        log.info("screening_started", attempt=job.attempts)
        self._tell_read(job)
        watch = LeaseWatch(
            screener.lease_seconds, screener.wall_clock_seconds, screener.stop_grace_seconds, self._stopping
        )
        answer: dict[str, Any] = {}
        try:
            answer = self._screened(worker, job, watch)
            outcome = self._outcome.commit(job, answer, watch)
        except LeaseLost:
            outcome = "lease_lost"
        except WorkerDied as error:
            outcome = self._worker_died(job, error)
        except Transient as error:
            # the store: the lease runs out by itself and the study comes back
            outcome = "not_written"
            log.warning("outcome_not_written", error=type(error).__name__)
        log.info("screening_ended", outcome=outcome, duration_s=round(time.monotonic() - start, 2))
        if "gpu_memory" in answer:
            self._status.write(gpu_memory=answer["gpu_memory"])
        if answer.get("spent"):
            log.warning("worker_spent", pid=worker.pid)
            self._kill(worker)

    def _screened(self, worker: WorkerProcess, job: Job, watch: LeaseWatch) -> dict[str, Any]:
        """The worker's answer, or the one that is given in its place.

        Raises:
            LeaseLost: the study changed or was held, or another worker has it.
            WorkerDied: the worker is gone.
            Transient: the store did not answer before anything was asked of the worker.
        """
        self._token += 1
        worker.send({"type": "screen", "token": self._token, "job": job.job_id, **self._study(job)})
        self._ahead, self._reading_ahead = None, False
        while True:
            message = worker.receive(_TICK_SECONDS)
            self._vitals.alive()  # the study's own time is watched below
            if message is not None and message.get("token") == self._token:
                return message
            if message is not None:
                self._told(message)
            if watch.over() or watch.grace_over():
                self._kill(worker)
                return {"type": WALL_CLOCK_LIMIT if watch.over() else "released"}
            if watch.beat_due():
                try:
                    self._store.heartbeat(job, self._settings.screener.lease_seconds)
                except LeaseLost:
                    self._cancel(worker)
                    raise
                except Transient as error:
                    self._log.warning("heartbeat_failed", job_id=job.job_id, error=type(error).__name__)
            self._read_ahead(worker, job)

    def _read_ahead(self, worker: WorkerProcess, present: Job) -> None:
        """Let the worker read the study that will probably be claimed next; nothing is claimed by it."""
        screener = self._settings.screener
        if self._ahead is not None or not screener.prefetch_maximum_bytes or present.job_id in self._suspects:
            return
        try:
            following = self._store.next_ready()
            if following is None or following.job_id in self._suspects or self._stopping.is_set():
                return
            study = self._study(following)
        except Transient:
            return  # a store that does not answer is no reason to drop the study in hand
        self._ahead, self._reading_ahead = following.job_id, True
        worker.send({"type": "prefetch", "job": following.job_id, **study})

    def _study(self, job: Job) -> dict[str, Any]:
        screener = self._settings.screener
        # report_objects lists the oldest revision first: the last of each variant is the one to be replaced
        predecessors = {
            entry.variant: str(entry.path)
            for entry in self._store.report_objects(job.study_instance_uid)
            if entry.kind is ReportKind.SR
        }
        return {
            "study": job.study_instance_uid,
            "revision": job.revision,
            "paths": [str(instance.path) for instance in self._store.instances(job)],
            "predecessors": predecessors,
            "lacks": job.lacks,
            "localizer_bundle": job.localizer_bundle or screener.localizer_bundle,
            "network_bundle": job.network_bundle or screener.network_bundle,
        }

    def _told(self, message: Mapping[str, Any]) -> None:
        """What the worker says between its answers."""
        if message["type"] == "prefetched":
            self._reading_ahead = self._reading_ahead and message["job"] != self._ahead
        elif message["type"] in ("ready", "models"):
            self._status.write(
                device=message["device"],
                models=message["models"],
                refused_bundle=message["refused_bundle"],
                gpu_memory=message.get("gpu_memory", {}),
            )
        elif message["type"] == "shadow":
            self._outcome.keep_shadow(message)

    def _cancel(self, worker: WorkerProcess) -> None:
        """Have the worker drop the study; one that does not is replaced."""
        deadline = time.monotonic() + _CANCEL_SECONDS
        with suppress(WorkerDied):
            worker.send({"type": "cancel", "token": self._token})
            while (left := deadline - time.monotonic()) > 0 and not self._stopping.is_set():
                message = worker.receive(min(left, _TICK_SECONDS))
                if message is not None and message.get("token") == self._token:
                    return
                if message is not None:
                    self._told(message)
        self._kill(worker)

    def _kill(self, worker: WorkerProcess) -> None:
        gone = worker.kill()
        self._worker, self._ahead, self._reading_ahead = None, None, False
        if not gone:
            raise WorkerDied("it cannot be killed")

    def _worker_died(self, job: Job, error: WorkerDied) -> str:
        """Count the attempt, unless the study that was read ahead may have been the cause."""
        suspects = [job.job_id, self._ahead] if self._ahead is not None and self._reading_ahead else []
        self._worker, self._ahead, self._reading_ahead = None, None, False
        self._log.error("worker_died", job_id=job.job_id, detail=error.detail)
        if suspects:
            # from now on each of them runs alone, so that its next end is its own
            self._suspects = [*self._suspects, *suspects][-_SUSPECTS:]
            return self._outcome.release(job)
        return self._outcome.retry(job, WORKER_DIED, error.detail)

    def _tell_read(self, job: Job) -> None:
        try:
            tell_read(self._store, job, process("osteo-screener"))
        except Transient as error:
            self._log.warning("read_not_told", error=type(error).__name__)
