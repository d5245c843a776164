"""The scheduler: timed steps that move rows and remove or copy files, never work on pixels.

It talks to senders only: how many images a study has, and what they asked to be committed; other steps go on meanwhile.

APScheduler skips a run silently when it is one second late; here a late run still counts, several late runs count
once, and a missed one is logged and kept. One scheduler leads: another one on the same store waits for its lease.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.audit.courier import courier_of
from osteo_daemon.audit.events import process
from osteo_daemon.audit.message import AuditMessage
from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.dicom.peer import hang_up_all
from osteo_daemon.domain.completeness import Outcome
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import ConfigurationError, Damaged, Transient
from osteo_daemon.handling import deletion_of, tell
from osteo_daemon.jobs.backup import make_backup, remove_old_backups
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.promises import Promises
from osteo_daemon.pull.schedule import STEP_PREFIX, enqueue
from osteo_daemon.settings import NamedPullSettings, Settings
from osteo_daemon.stopping import at_the_end

_MISFIRE_GRACE_SECONDS = 24 * 3600
_LEASE_SWEEP_SECONDS = 10.0
_COUNTS_SECONDS = 300.0
_LEADER_LEASE_SECONDS = 15.0
_LEADER = "scheduler"
_CLOCK_SECONDS = 1.0
_CLOCK_STEP_SECONDS = 2.0  # slewing is slower, an administrator's or NTP's step is larger
_NOTED_EVERY_SECONDS = 60.0
"""Steps that run more often and have nothing to tell write their row only this often."""

_STUDIES_PER_SWEEP = 2000
_PAGE = 100
_CLOCK_MAY_MOVE = timedelta(hours=2)
_LISTS_KEPT = timedelta(days=30)
"""What peers announced is of no more use then, and what they asked was answered."""

_MAKE_UP_SECONDS = 60.0
"""How soon after a start comes the run that was due while the scheduler was down."""


@dataclass
class _Step:
    """One timed step and what was not yet written of its runs."""

    name: str
    act: Callable[[], str]
    seconds: float
    runs: int = 0
    noted_at: datetime | None = None


class Scheduler:
    """The node's timed steps, one leader.

    Args:
        settings: of the node.
        clock: gives the present in UTC.

    Raises:
        StoreUnavailable: the job store does not answer.
        ConfigurationError: the spool cannot be used.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._settings = settings
        self._clock = clock
        self._started = clock(), time.monotonic()
        self._jobs = JobStore(settings.database_url)
        self._completeness = CompletenessSweep(settings, self._jobs)
        self._spool = Spool(settings.spool_dir)
        self._name = f"scheduler-{socket.gethostname()}-{os.getpid()}"
        self._leads_until = 0.0
        self._stopping = threading.Event()
        self._asking = threading.Lock()
        self._steps: dict[str, _Step] = {}
        self._engine: Any = BackgroundScheduler(
            timezone="UTC",
            executors={"default": ThreadPoolExecutor(8)},
            job_defaults={"misfire_grace_time": _MISFIRE_GRACE_SECONDS, "coalesce": True, "max_instances": 1},
        )
        self._engine.add_listener(self._on_event, EVENT_JOB_MISSED | EVENT_JOB_ERROR | EVENT_JOB_MAX_INSTANCES)
        self._engine.add_job(self.lead, "interval", seconds=_LEADER_LEASE_SECONDS / 3, id="lead")
        last = {run.step: run.started_at for run in self._jobs.scheduler_runs()}
        self._add("completeness_sweep", self.complete_quiet_studies, settings.completeness.sweep_seconds, last)
        self._add("lease_sweep", self.take_back_expired, _LEASE_SWEEP_SECONDS, last)
        self._add("delivery_retry", self.take_back_deliveries, _LEASE_SWEEP_SECONDS, last)
        self._add("fold_counts", self.fold_counts, _COUNTS_SECONDS, last)
        self._add("retention", self.retain, settings.retention.sweep_seconds, last)
        if settings.commitment_scp.enabled:
            promises = Promises(settings, self._jobs, is_stopping=self._stopping.is_set)
            self._add("commitment_requests", promises.run, settings.commitment_scp.poll_seconds, last)
        if settings.refit.enabled and settings.refit.site:
            self._add_cron("scheduled_refit", self.ask_for_refit, settings.refit.cron, last)
        for entry in settings.pulls:
            name, act = f"{STEP_PREFIX}{entry.name}", partial(self.enqueue_pull, entry)
            if entry.cron:
                self._add_cron(name, act, entry.cron, last)
            else:
                self._add(name, act, entry.every_hours * 3600, last)
        if settings.backup.folder is not None:
            self._add("backup", self.back_up, settings.backup.every_hours * 3600, last)
        if settings.drift.enabled:
            self._add_cron("drift_report", self.watch_drift, settings.drift.cron, last)

    @property
    def leads(self) -> bool:
        """True when this process runs the steps."""
        return time.monotonic() < self._leads_until

    def start(self) -> None:
        """Run the steps in threads of their own."""
        self._engine.start()
        self.lead()
        threading.Thread(target=self._watch_clock, name="clock", daemon=True).start()

    def _watch_clock(self) -> None:
        """APScheduler plans by the wall clock: when that is set back, every step would wait until it catches up."""
        ahead = time.time() - time.monotonic()
        while not self._stopping.wait(_CLOCK_SECONDS):
            before, ahead = ahead, time.time() - time.monotonic()
            if ahead < before - _CLOCK_STEP_SECONDS:
                get_logger().warning("clock_set_back", wait_s=round(before - ahead))
                for job in self._engine.get_jobs():
                    job.modify(next_run_time=datetime.now(UTC))

    def stop(self) -> None:
        """Let running steps finish, give the lease back and close."""
        with self._asking:
            self._stopping.set()
        self._completeness.close()
        hang_up_all()  # a question falls back to the quiet time, a report that was cut off comes again
        self._engine.shutdown(wait=True)
        if self.leads:
            try:
                self._jobs.resign(_LEADER, self._name)
            except Transient as error:
                get_logger().warning("lease_not_given_back", error=type(error).__name__, detail=error.detail)
        self._jobs.close()

    def lead(self) -> None:
        """Take or keep the lease of the leader."""
        led, asked_at = self.leads, time.monotonic()
        try:
            leads = self._jobs.lead(_LEADER, self._name, _LEADER_LEASE_SECONDS, is_gone=_is_gone)
            # while the question is open the lease in hand holds: steps that are due at the same moment must not be lost
            self._leads_until = asked_at + _LEADER_LEASE_SECONDS if leads else 0.0
        except Transient as error:
            get_logger().warning("lease_not_renewed", error=type(error).__name__, detail=error.detail)
        if self.leads != led:
            get_logger().info("leads" if self.leads else "follows", worker=self._name)
            if self.leads:
                self._announce()

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
        keep, now = self._settings.retention, self._clock()
        wall, steady = self._started
        moved = now - wall - timedelta(seconds=time.monotonic() - steady)
        if abs(moved) > _CLOCK_MAY_MOVE:
            # a clock that runs a month ahead would have everything removed
            raise ConfigurationError(
                f"the clock was moved by {moved.total_seconds() / 3600:.1f} h since the scheduler started: nothing is "
                "removed; set it right, then restart the scheduler"
            )
        unfinished = self._jobs.being_purged()
        for study_instance_uid in unfinished:
            deletion = self._deletion(study_instance_uid)
            self._jobs.finish_purge(study_instance_uid, self._spool)
            tell(deletion)
        done = {"interrupted": len(unfinished)}
        if keep.images_days:
            done["images"] = self._purge(now - timedelta(days=keep.images_days), images=True)
        if keep.reports_days:
            done["reports"] = self._purge(now - timedelta(days=keep.reports_days), images=False)
        if keep.quarantine_days:
            done["quarantined"] = self._jobs.purge_quarantine(now - timedelta(days=keep.quarantine_days), self._spool)
        done["announcements"] = self._jobs.forget_announcements(now - _LISTS_KEPT)
        done["commitment requests"] = self._jobs.forget_pledge_requests(now - _LISTS_KEPT)
        if keep.events_days:
            done["events"] = self._jobs.forget_events(now - timedelta(days=keep.events_days))
        # whether or not it is still on: what is kept has its limits
        archived = VoiArchive(self._settings, self._jobs).retain(now)
        done |= {f"archived studies {why}": count for why, count in archived.items()}
        detail = ", ".join(f"{count} {what}" for what, count in done.items() if count)
        kept = 0 if self._settings.destinations else self._jobs.counts_by_state()[JobState.REPORTED]
        if kept:
            # their reports are owed to nobody, and nobody has them: neither finished nor on its way
            get_logger().warning("reports_without_destination", count=kept)
            detail = f"{detail}, {kept} REPORTED ones stay for want of a destination".removeprefix(", ")
        if detail:
            get_logger().info("retention_done", detail=detail)
        return detail

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

        return look(self._settings, self._jobs, self._clock(), self._steps["drift_report"].seconds).detail

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

    def _announce(self) -> None:
        """Make every step visible before its first run."""
        for step in self._steps.values():
            self._write(step, {"interval_seconds": step.seconds, "next_at": self._next_at(step)}, {})

    def _deletion(self, study_instance_uid: str) -> AuditMessage | None:
        return deletion_of(self._jobs, study_instance_uid, process("osteo-scheduler"))

    def _purge(self, before: datetime, *, images: bool) -> int:
        kept, count = frozenset(self._settings.keep.sources), 0
        while count < _STUDIES_PER_SWEEP and not self._stopping.is_set():
            studies = (
                self._jobs.purgeable_images(before, _PAGE, kept_sources=kept)
                if images
                else self._jobs.purgeable_reports(before, _PAGE)
            )
            for study_instance_uid in studies:
                deletion = self._deletion(study_instance_uid)
                purged = self._jobs.purge_finished(
                    study_instance_uid,
                    self._spool,
                    before=before,
                    images=images,
                    reports=not images,
                    kept_sources=kept,
                )
                if purged:
                    tell(deletion)
            count += len(studies)
            if len(studies) < _PAGE:
                break
        return count

    def _add(self, name: str, act: Callable[[], str], seconds: float, last: dict[str, datetime | None]) -> None:
        step = self._steps[name] = _Step(name, act, seconds)
        now = datetime.now(UTC)
        # a step of many hours must not begin its wait anew with every start
        due = last.get(name)
        coming = now + timedelta(seconds=min(seconds, _MAKE_UP_SECONDS))
        # a run noted in the future was noted by a clock that has been set back since
        first = coming if due is None or due > now else max(coming, due + timedelta(seconds=seconds))
        self._engine.add_job(
            self._run, "interval", args=[step], seconds=seconds, id=name, name=name, next_run_time=first
        )

    def _add_cron(self, name: str, act: Callable[[], str], crontab: str, last: dict[str, datetime | None]) -> None:
        """A step at set times, in UTC; one that was due while no scheduler ran is made up for."""
        try:
            trigger = CronTrigger.from_crontab(crontab, timezone="UTC")
        except ValueError as error:
            raise ConfigurationError(f"the cron of {name}, {crontab!r}: {error}") from error
        now = datetime.now(UTC)
        coming = trigger.get_next_fire_time(None, now)
        if coming is None:
            raise ConfigurationError(f"the cron of {name}, {crontab!r}, never comes")
        after = trigger.get_next_fire_time(coming, coming + timedelta(seconds=1)) or coming + timedelta(days=365)
        step = self._steps[name] = _Step(name, act, (after - coming).total_seconds())
        ran = last.get(name)
        due = None if ran is None or ran > now else trigger.get_next_fire_time(None, ran)
        if due is not None and due < now:
            coming = min(coming, now + timedelta(seconds=_MAKE_UP_SECONDS))
        self._engine.add_job(self._run, trigger, args=[step], id=name, name=name, next_run_time=coming)

    def _run(self, step: _Step) -> None:
        if not self.leads:
            return
        started = datetime.now(UTC)
        outcome = "done"
        try:
            detail = step.act()
        except (Transient, ConfigurationError, Damaged) as error:
            # the next run is the retry; the reason stands where people look
            get_logger().warning("step_failed", kind=step.name, error=type(error).__name__, detail=error.detail)
            outcome, detail = type(error).__name__, error.detail
        self._note(step, started, outcome, detail)

    def _note(self, step: _Step, started: datetime, outcome: str, detail: str) -> None:
        step.runs += 1
        now = datetime.now(UTC)
        told = step.noted_at is not None and now - step.noted_at < timedelta(seconds=_NOTED_EVERY_SECONDS)
        if told and outcome == "done" and not detail:
            return
        values = {
            "interval_seconds": step.seconds,
            "started_at": started,
            "ended_at": now,
            "outcome": outcome,
            "detail": detail or None,
        }
        next_at = self._next_at(step)
        if next_at is not None:  # not known any more when the scheduler stops: what was said before stays
            values["next_at"] = next_at
        if self._write(step, values, {"runs": step.runs, "failures": int(outcome != "done")}):
            step.runs, step.noted_at = 0, now

    def _next_at(self, step: _Step) -> datetime | None:
        with self._asking:
            # the engine waits for its steps under a lock that this question needs
            job = None if self._stopping.is_set() else self._engine.get_job(step.name)
        return None if job is None else job.next_run_time

    def _write(self, step: _Step, values: dict[str, Any], more: dict[str, int]) -> bool:
        try:
            self._jobs.note_run(step.name, values=values, more=more)
        except Transient as error:
            get_logger().warning("step_not_noted", kind=step.name, error=type(error).__name__)
            return False
        return True

    def _on_event(self, event: Any) -> None:
        if event.code == EVENT_JOB_ERROR:
            get_logger().error("step_failed", kind=event.job_id, error=type(event.exception).__name__)
            self._count(event.job_id, "failures", type(event.exception).__name__)
        elif event.code == EVENT_JOB_MISSED:
            get_logger().warning("step_missed", kind=event.job_id)
            self._count(event.job_id, "missed", "missed")
        else:
            get_logger().warning("step_still_runs", kind=event.job_id)

    def _count(self, name: str, counter: str, outcome: str) -> None:
        step = self._steps.get(name)
        if step is None or not self.leads:
            return
        self._write(step, {"interval_seconds": step.seconds, "outcome": outcome}, {counter: 1})


def _is_gone(holder: str) -> bool:
    """True for a scheduler of this machine whose process has ended."""
    place, _, pid = holder.rpartition("-")
    if place != f"scheduler-{socket.gethostname()}" or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def run(settings: Settings) -> int:
    """Schedule until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, "scheduler")
    ended = threading.Event()
    at_the_end(ended.set)
    scheduler = Scheduler(settings)
    scheduler.start()
    # every machine's scheduler brings what lies on that machine, whoever leads
    courier = courier_of(settings)
    if courier is not None:
        courier.start()
    get_logger().info("scheduler_started", quiet_s=settings.completeness.quiet_seconds)
    ended.wait()
    scheduler.stop()
    if courier is not None:
        courier.stop()
    get_logger().info("stopped")
    return 0
