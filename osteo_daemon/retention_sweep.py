"""One sweep of retention: what goes now, as the settings say, of finished studies only."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import datetime, timedelta

from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.audit.events import process
from osteo_daemon.audit.message import AuditMessage
from osteo_daemon.domain.job import FINISHED, JobState
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.handling import deletion_of, tell
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings

_STUDIES_PER_SWEEP = 2000
_PAGE = 100
_CLOCK_MAY_MOVE = timedelta(hours=2)
_LISTS_KEPT = timedelta(days=30)
"""What peers announced is of no more use then, and what they asked was answered."""


class RetentionSweep:
    """Removes by age and state.

    Args:
        settings: of the node.
        jobs: its job store.
        clock: gives the present in UTC.
        is_stopping: whether to leave the rest to the next sweep.

    Raises:
        ConfigurationError: the spool cannot be used.
    """

    def __init__(
        self, settings: Settings, jobs: JobStore, clock: Callable[[], datetime], is_stopping: Callable[[], bool]
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._spool = Spool(settings.spool_dir)
        self._clock = clock
        self._is_stopping = is_stopping
        self._started = clock(), time.monotonic()

    def run(self) -> str:
        """Remove what is older than the settings want it; gives what there is to tell.

        Raises:
            ConfigurationError: the machine's clock was moved, so that no age can be trusted.
            StoreUnavailable: the job store does not answer.
        """
        keep, now = self._settings.retention, self._trusted_now()
        done = {"interrupted": self._finish_what_was_begun()}
        excluded_days = keep.images_days if keep.excluded_days is None else keep.excluded_days
        done["images"] = 0
        for days, state in ((keep.images_days, JobState.DELIVERED), (excluded_days, JobState.EXCLUDED)):
            if days:
                done["images"] += self._purge(now - timedelta(days=days), images=True, states={state})
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
        parts = [f"{count} {what}" for what, count in done.items() if count]
        if kept := 0 if self._settings.destinations else self._jobs.counts_by_state()[JobState.REPORTED]:
            # their reports are owed to nobody, and nobody has them: neither finished nor on its way
            get_logger().warning("reports_without_destination", count=kept)
            parts.append(f"{kept} REPORTED ones stay for want of a destination")
        detail = ", ".join(parts)
        if detail:
            get_logger().info("retention_done", detail=detail)
        return detail

    def _trusted_now(self) -> datetime:
        now = self._clock()
        wall, steady = self._started
        moved = now - wall - timedelta(seconds=time.monotonic() - steady)
        if abs(moved) > _CLOCK_MAY_MOVE:
            # a clock that runs a month ahead would have everything removed
            raise ConfigurationError(
                f"the clock was moved by {moved.total_seconds() / 3600:.1f} h since the scheduler started: nothing is "
                "removed; set it right, then restart the scheduler"
            )
        return now

    def _finish_what_was_begun(self) -> int:
        unfinished = self._jobs.being_purged()
        for study_instance_uid in unfinished:
            deletion = self._deletion(study_instance_uid)
            self._jobs.finish_purge(study_instance_uid, self._spool)
            tell(deletion)
        return len(unfinished)

    def _purge(self, before: datetime, *, images: bool, states: Collection[JobState] = FINISHED) -> int:
        kept, count = frozenset(self._settings.keep.sources), 0
        while count < _STUDIES_PER_SWEEP and not self._is_stopping():
            studies = (
                self._jobs.purgeable_images(before, _PAGE, states=states, kept_sources=kept)
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
                    states=states,
                    kept_sources=kept,
                )
                if purged:
                    tell(deletion)
            count += len(studies)
            if len(studies) < _PAGE:
                break
        return count

    def _deletion(self, study_instance_uid: str) -> AuditMessage | None:
        return deletion_of(self._jobs, study_instance_uid, process("osteo-scheduler"))
