"""The screening role: claim a study, screen it, spool its report objects, commit, again."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from os import getpid
from types import FrameType

from osteo_daemon.dicom.report_objects import BuiltObject
from osteo_daemon.domain.findings import Exclusion, Outcome
from osteo_daemon.domain.job import Job
from osteo_daemon.errors import ConfigurationError, Damaged, LeaseLost, Transient
from osteo_daemon.inference.screening import Screening, StudyScreener
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import Heartbeat
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.reporting import PreviousReport, build_report
from osteo_daemon.settings import Settings


class _Stopped(BaseException):
    """SIGTERM came: leave the study where it is."""


def run(settings: Settings) -> int:
    """Screen studies until SIGTERM or SIGINT; returns the exit status.

    Raises:
        BundleError: a model bundle is missing or changed.
        ConfigurationError: the job store or the spool can't be used, or the GPU asked for isn't there.
    """
    configure_logging(settings.log, "screener")
    worker = Worker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.stop)
    worker.work()
    return 0


class Worker:
    """One screening process: one study at a time, models warm."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = get_logger()
        self._store = JobStore(settings.database_url)
        self._spool = Spool(settings.spool_dir)
        self._name = f"screener-{socket.gethostname()}-{getpid()}"
        self._stopping = threading.Event()
        self._interruptible = False
        start = time.perf_counter()
        self._screener = StudyScreener.load(settings)
        self._log.info(
            "screener_ready", device=str(self._screener.device), duration_s=round(time.perf_counter() - start, 2)
        )
        for model in self._screener.models:
            self._log.info("model_loaded", bundle=model.bundle, version=model.version, digest=model.sha256)

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: finish at once; a study in hand goes back without losing an attempt."""
        self._stopping.set()
        if self._interruptible:
            self._interruptible = False
            raise _Stopped

    def work(self) -> None:
        """Claim and screen until `stop`."""
        screener = self._settings.screener
        while not self._stopping.is_set():
            try:
                job = self._store.claim(self._name, screener.lease_seconds, screener.maximum_attempts)
            except Transient as error:
                self._log.warning("claim_failed", error=type(error).__name__)
                job = None
            if job is None:
                self._stopping.wait(screener.poll_seconds)
                continue
            self._one(job)
        self._log.info("screener_stopped")

    def _one(self, job: Job) -> None:
        start = time.perf_counter()
        log = self._log.bind(job_id=job.job_id, study_instance_uid=job.study_instance_uid, revision=job.revision)
        log.info("screening_started", attempt=job.attempts)
        outcome = "released"
        try:
            lease = self._settings.screener.lease_seconds
            with Heartbeat(lambda: self._store.heartbeat(job, lease), lease):
                outcome = self._screen(job)
        except _Stopped:
            with suppress(LeaseLost):
                self._store.release(job)
        except LeaseLost:
            outcome = "lease_lost"
        except Damaged as error:
            outcome = "held"
            self._end(self._store.hold, job, type(error).__name__, error.detail)
        except (ConfigurationError, Transient) as error:
            outcome = "retry"
            self._end(self._retry, job, type(error).__name__, error.detail)
        except Exception as error:  # noqa: BLE001 - the process's loop edge: one study must not end the worker
            outcome = "retry"
            # only the class: a library's message may quote what it was given
            log.error("screening_crashed", error=type(error).__name__, detail=where(error.__traceback__))
            self._end(self._retry, job, type(error).__name__, "an error inside the program, see its log")
        log.info("screening_ended", outcome=outcome, duration_s=round(time.perf_counter() - start, 2))

    def _screen(self, job: Job) -> str:
        instances, predecessors = self._store.instances(job), self._predecessors(job)
        with self._computing():
            screening = self._screener.screen(instance.path for instance in instances)
            built = screening.result.exclusion or build_report(
                screening, self._settings, datetime.now(UTC), revision=job.revision, predecessors=predecessors
            )
        if isinstance(built, Exclusion):
            self._store.exclude(job, built.code, built.reason, screening.result.to_json())
            return built.code
        objects = {entry.sop_instance_uid: self._keep(job, entry) for entry in built.objects}
        deliveries = [
            NewDelivery(destination.name, tuple(entry.sop_instance_uid for entry in built.for_destination(destination)))
            for destination in self._settings.destinations
        ]
        self._store.commit_report(job, screening.result.to_json(), list(objects.values()), deliveries)
        return _summary(screening)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The long computing part, which a signal may cut off; never a transaction."""
        self._interruptible = True
        try:
            if self._stopping.is_set():
                raise _Stopped
            yield
        finally:
            self._interruptible = False

    def _keep(self, job: Job, entry: BuiltObject) -> ReportObject:
        stored = self._spool.store_report(job.study_instance_uid, entry.sop_instance_uid, [entry.data])
        return ReportObject(
            kind=ReportKind(entry.kind),
            sop_class_uid=entry.sop_class_uid,
            sop_instance_uid=entry.sop_instance_uid,
            path=stored.path,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            variant=entry.variant,
        )

    def _predecessors(self, job: Job) -> dict[str, PreviousReport]:
        # report_objects lists the oldest revision first: the last of each variant is the one to be replaced
        return {
            entry.variant: PreviousReport.read(entry.path)
            for entry in self._store.report_objects(job.study_instance_uid)
            if entry.kind is ReportKind.SR
        }

    def _retry(self, job: Job, code: str, detail: str) -> None:
        delay = self._settings.screener.retry_base_seconds * 2 ** (job.attempts - 1)
        # jitter: several workers that failed for one reason don't come back at one moment
        not_before = datetime.now(UTC) + timedelta(seconds=delay * random.uniform(0.8, 1.2))  # noqa: S311
        self._store.retry_later(job, code, detail, not_before)

    def _end(self, act: Callable[[Job, str, str], None], job: Job, code: str, detail: str) -> None:
        try:
            act(job, code, detail)
        except (LeaseLost, Transient) as error:
            # the lease runs out by itself and another worker takes the study
            self._log.warning("outcome_not_written", error=type(error).__name__)


def _summary(screening: Screening) -> str:
    category = screening.result.category
    return Outcome.REPORTED.value if category is None else f"{Outcome.REPORTED.value}, {category.value}"
