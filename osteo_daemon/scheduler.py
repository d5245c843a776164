"""The scheduler: timed steps that move rows and remove or copy files, never work on pixels.

It talks to senders only: how many images a study has, and what they asked to be committed; other steps go on meanwhile.
One scheduler leads: another one on the same store waits for its lease.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from osteo_daemon.audit.courier import courier_of
from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.dicom.peer import hang_up_all
from osteo_daemon.domain.completeness import Outcome
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.backup import make_backup, remove_old_backups
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.leadership import Leadership
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.promises import Promises
from osteo_daemon.pull.schedule import STEP_PREFIX, enqueue
from osteo_daemon.retention_sweep import RetentionSweep
from osteo_daemon.settings import NamedPullSettings, Settings
from osteo_daemon.stopping import at_the_end
from osteo_daemon.timetable import Timetable
from osteo_daemon.vitals import Vitals

_LEASE_SWEEP_SECONDS = 10.0
_COUNTS_SECONDS = 300.0
_DRIFT = "drift_report"
_LOOK_SECONDS = 1.0
_SILENCE_SECONDS = 12 * _LEASE_SWEEP_SECONDS
"""When no step was looked at for so long, the timetable hangs: one is due every ten seconds."""


class Scheduler:
    """The node's timed steps, one leader.

    Args:
        settings: of the node.
        clock: gives the present in UTC.

    Raises:
        StoreUnavailable: the job store does not answer.
        ConfigurationError: the spool cannot be used, or times in the settings cannot be read.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._settings = settings
        self._clock = clock
        self._jobs = JobStore(settings.database_url)
        self._completeness = CompletenessSweep(settings, self._jobs)
        self._stopping = threading.Event()
        self._retention = RetentionSweep(settings, self._jobs, clock, self._stopping.is_set)
        self._timetable = Timetable(self._jobs, lambda: self._leadership.leads)
        self._leadership = Leadership(self._jobs, self._timetable.announce)
        self._plan(self._timetable)

    def _plan(self, steps: Timetable) -> None:
        settings = self._settings
        steps.every(settings.completeness.sweep_seconds, "completeness_sweep", self.complete_quiet_studies)
        steps.every(_LEASE_SWEEP_SECONDS, "lease_sweep", self.take_back_expired)
        steps.every(_LEASE_SWEEP_SECONDS, "delivery_retry", self.take_back_deliveries)
        steps.every(_COUNTS_SECONDS, "fold_counts", self.fold_counts)
        steps.every(settings.retention.sweep_seconds, "retention", self.retain)
        if settings.commitment_scp.enabled:
            promises = Promises(settings, self._jobs, is_stopping=self._stopping.is_set)
            steps.every(settings.commitment_scp.poll_seconds, "commitment_requests", promises.run)
        if settings.refit.enabled and settings.refit.site:
            steps.at(settings.refit.cron, "scheduled_refit", self.ask_for_refit)
        for entry in settings.pulls:
            name, act = f"{STEP_PREFIX}{entry.name}", partial(self.enqueue_pull, entry)
            if entry.cron:
                steps.at(entry.cron, name, act)
            else:
                steps.every(entry.every_hours * 3600, name, act)
        if settings.backup.folder is not None:
            steps.every(settings.backup.every_hours * 3600, "backup", self.back_up)
        if settings.drift.enabled:
            steps.at(settings.drift.cron, _DRIFT, self.watch_drift)

    def start(self) -> None:
        """Run the steps in threads of their own."""
        self._timetable.start()
        self._leadership.start()

    @property
    def silent_seconds(self) -> float:
        """How long ago the last step was looked at."""
        return self._timetable.silent_seconds

    def stop(self) -> None:
        """Let running steps finish, give the lease back and close."""
        self._stopping.set()
        self._completeness.close()
        hang_up_all()  # a question falls back to the quiet time, a report that was cut off comes again
        self._timetable.stop()
        self._leadership.resign()
        self._jobs.close()

    def complete_quiet_studies(self) -> str:
        """RECEIVING to READY for studies that are complete, or have waited long enough for what they lack."""
        done = self._completeness.run()
        for study in done:
            incomplete = study.verdict.outcome is Outcome.INCOMPLETE
            log = get_logger().warning if incomplete else get_logger().info
            log(
                "study_incomplete" if incomplete else "study_complete",
                job_id=study.job.job_id,
                study_instance_uid=study.job.study_instance_uid,
                revision=study.job.revision,
                reason=study.verdict.reason,
            )
        return f"{len(done)} complete" if done else ""

    def take_back_expired(self) -> str:
        """SCREENING to READY for jobs whose worker is gone."""
        if count := self._jobs.take_back_expired():
            get_logger().warning("leases_expired", count=count)
        return f"{count} taken back" if count else ""

    def take_back_deliveries(self) -> str:
        """SENDING to PENDING for deliveries whose deliverer is gone."""
        if count := self._jobs.take_back_deliveries():
            get_logger().warning("delivery_leases_expired", count=count)
        return f"{count} taken back" if count else ""

    def fold_counts(self) -> str:
        """Keep `counts_by_state` quick."""
        self._jobs.fold_counts()
        return ""

    def retain(self) -> str:
        """Remove what is older than the settings want it, of finished studies only.

        Raises:
            ConfigurationError: the machine's clock was moved, so that no age can be trusted.
        """
        return self._retention.run()

    def enqueue_pull(self, entry: NamedPullSettings) -> str:
        """Write a pull down; the puller does it."""
        said = enqueue(entry, self._jobs, self._clock().astimezone().date())
        get_logger().info("pull_due", kind=entry.name, detail=said)
        return said

    def back_up(self) -> str:
        """Copy store and spool as the settings say; only the newest copies stay."""
        backup = self._settings.backup
        assert backup.folder is not None  # noqa: S101 - the step exists only then
        folder = backup.folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        made = make_backup(self._settings.database_url, self._settings.spool_dir, folder, spool=backup.spool)
        removed = remove_old_backups(backup.folder, backup.keep)
        get_logger().info("backup_made", bytes=made.store_bytes + made.size_bytes, count=made.files)
        return f"{made.store_bytes} bytes of store, {made.files} files; {removed} old ones removed"

    def watch_drift(self) -> str:
        """Compare the present with the reference, write a report, tell of new alarms."""
        from osteo_daemon.drift_watch import look  # scipy: a second and 50 MB that no other step needs

        return look(self._settings, self._jobs, self._clock(), self._timetable.seconds_between(_DRIFT)).detail

    def ask_for_refit(self) -> str:
        """Ask for a refit when enough labels are new; the refitter does the work."""
        wanted = self._settings.refit
        new = self._jobs.new_labels(wanted.site)
        if new < wanted.minimum_new_labels:
            return f"{new} new labels; a refit is asked for with {wanted.minimum_new_labels}"
        try:
            asked = self._jobs.request_refit(wanted.site, who="schedule", reason=f"{new} new labels")
        except ConfigurationError as error:
            return error.detail  # one is open: the labels are new to the next run, too
        get_logger().info("refit_asked_for", job_id=asked.refit_id, count=new)
        return f"refit {asked.refit_id} of {wanted.site} with {new} new labels"


def run(settings: Settings) -> int:
    """Schedule until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, "scheduler")
    ended = threading.Event()
    at_the_end(ended.set)
    vitals = Vitals(settings.state_dir, "scheduler", 2 * _SILENCE_SECONDS)
    scheduler = Scheduler(settings)
    scheduler.start()
    # every machine's scheduler brings what lies on that machine, whoever leads
    courier = courier_of(settings)
    if courier is not None:
        courier.start()
    get_logger().info("scheduler_started", quiet_s=settings.completeness.quiet_seconds)
    with vitals:
        vitals.ready()
        while not ended.wait(_LOOK_SECONDS):
            if scheduler.silent_seconds < _SILENCE_SECONDS:
                vitals.alive()
        vitals.stopping()
        scheduler.stop()
        if courier is not None:
            courier.stop()
    get_logger().info("stopped")
    return 0
