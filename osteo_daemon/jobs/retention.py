"""What goes, and when: files of finished studies by age, files of any study by hand.

Order of a removal: mark (what shall go, and that it is not done), files and rows batch by batch, then the mark goes.
A process that is killed in between leaves a marked study, which the next run finishes. While the mark stands nothing is
stored into the study, and a file that was written before its removal and recorded after it is not acknowledged (see
`osteo_daemon.jobs.intake`): both happen under the lock of the study's row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, exists, select, update

from osteo_daemon.domain.job import FINISHED, JobState
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.delivery_rows import move
from osteo_daemon.jobs.evidence_schema import CommittedStudyRow
from osteo_daemon.jobs.pledges import is_committed
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.schema import (
    DeliveryRow,
    EventRow,
    InstanceRow,
    JobRow,
    QuarantineRow,
    ReportObjectRow,
    StudyRow,
)
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.transitions import NO_CLAIM, add_event, change_state, screening_job, utc_now

PURGED_BY_HAND = "purged_by_hand"
"""Code of an unfinished study whose files a person removed."""

_FILES_PER_TRANSACTION = 50
"""The write lock is held while so many files are removed."""

_ROWS_PER_TRANSACTION = 1000


class Retention(Database):
    """The scheduler's broom, and the operator's."""

    def purgeable_images(
        self,
        before: datetime,
        limit: int = 100,
        *,
        states: Collection[JobState] = FINISHED,
        kept_sources: Collection[str] = (),
    ) -> list[str]:
        """Studies that came into one of these finished states before a moment and whose images are still there.

        The oldest first.
        Studies that came from ``kept_sources`` or that a sender was promised (`osteo_daemon.jobs.pledges`) are none.
        """
        promised = exists().where(CommittedStudyRow.study_instance_uid == JobRow.study_instance_uid)
        condition = JobRow.images_purged_at.is_(None) & ~promised & JobRow.source_ae.not_in(kept_sources)
        return self._purgeable(condition, before, limit, states)

    def purgeable_reports(self, before: datetime, limit: int = 100) -> list[str]:
        """Studies finished before a moment whose report objects are still there and are owed to nobody."""
        owed = exists().where(DeliveryRow.job_id == JobRow.job_id, DeliveryRow.state != DeliveryState.DELIVERED)
        return self._purgeable(JobRow.reports_purged_at.is_(None) & ~owed, before, limit)

    def being_purged(self) -> list[str]:
        """Studies whose removal was begun and not finished."""
        # not IS NOT NULL: for that SQLite would read every study
        marked = select(StudyRow.study_instance_uid).where(StudyRow.purging_at > datetime(2000, 1, 1, tzinfo=UTC))
        with self._reading() as connection:
            return list(connection.execute(marked).scalars())

    def purge_finished(
        self,
        study_instance_uid: str,
        spool: Spool,
        *,
        before: datetime,
        images: bool,
        reports: bool,
        states: Collection[JobState] = FINISHED,
        kept_sources: Collection[str] = (),
        who: str = "scheduler",
        now: datetime | None = None,
    ) -> bool:
        """Remove files of a study that came into one of these finished states before a moment.

        False when it no longer is so, or is kept.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, study_instance_uid)
            job = connection.execute(screening_job(study_instance_uid)).one_or_none()
            if job is None or job.state not in FINISHED.intersection(states) or job.changed_at >= before:
                return False
            if images and (job.source_ae in kept_sources or is_committed(connection, study_instance_uid)):
                return False
            what = " and ".join(name for name, wanted in (("images", images), ("reports", reports)) if wanted)
            _mark(connection, job, images, reports, who, f"{what} of a study finished before {before:%Y-%m-%d}", now)
        self.finish_purge(study_instance_uid, spool, now=now)
        return True

    def purge_study(
        self,
        study_instance_uid: str,
        spool: Spool,
        who: str,
        reason: str,
        *,
        force: bool = False,
        also_committed: bool = False,
        now: datetime | None = None,
    ) -> None:
        """A person removes a study's images, reports and quarantined bytes; job, history and result stay.

        Args:
            study_instance_uid: of the study.
            spool: where its files lie.
            who: removes them.
            reason: why.
            force: also what was not yet screened or delivered: the study ends as HELD (or FAILED when its report was
                due), and no delivery of it goes on.
            also_committed: even if a sender was promised that it is kept, and may have removed its own copy.
            now: the present, for tests.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is not finished, and not forced; or it was promised.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, study_instance_uid)
            job = connection.execute(screening_job(study_instance_uid)).one_or_none()
            if job is None:
                raise KeyError(study_instance_uid)
            if (job.state not in FINISHED or _owed(connection, job)) and not force:
                raise IllegalTransition(f"study_purged: the study is {job.state} and not everything was delivered")
            if not also_committed and is_committed(connection, study_instance_uid):
                raise IllegalTransition("study_purged: a sender was promised that this study is kept")
            connection.execute(
                delete(CommittedStudyRow).where(CommittedStudyRow.study_instance_uid == study_instance_uid)
            )
            _end_unfinished(connection, job, who, reason, now)
            _mark(connection, job, True, True, who, reason, now)
        self.finish_purge(study_instance_uid, spool, quarantined=True, now=now)

    def finish_purge(
        self, study_instance_uid: str, spool: Spool, *, quarantined: bool = False, now: datetime | None = None
    ) -> None:
        """Do what the marks of a study ask for; a second call after a crash goes on where the first ended."""
        now = now or utc_now()
        while self._remove_images(study_instance_uid, spool):
            pass
        with self._writing() as connection:
            self._alone(connection, study_instance_uid)
            job = _marked(connection, study_instance_uid)
            if job is None:
                return
            if job.images_purged_at is not None:
                # what a later header replaced has no row any more
                spool.remove(spool.received_files(study_instance_uid))
            if job.reports_purged_at is not None:
                _remove_reports(connection, job.job_id, spool, now)
                # of attempts that never committed
                spool.remove(spool.report_files(study_instance_uid))
            if quarantined:
                _remove_quarantined(connection, QuarantineRow.study_instance_uid == study_instance_uid, spool)
            connection.execute(
                update(StudyRow)
                .where(StudyRow.study_instance_uid == study_instance_uid)
                .values(purging_at=None, purged_at=now)
            )
        spool.prune(study_instance_uid)

    def purge_quarantine(self, before: datetime, spool: Spool) -> int:
        """Remove quarantined bytes received before a moment; returns how many files."""
        total = 0
        while True:
            with self._writing() as connection:
                studies = _remove_quarantined(connection, QuarantineRow.received_at < before, spool)
            for study_instance_uid in set(studies):
                spool.prune(study_instance_uid)
            total += len(studies)
            if len(studies) < _FILES_PER_TRANSACTION:
                return total

    def forget_events(self, before: datetime) -> int:
        """Remove the history of finished studies from before a moment; returns how many rows."""
        old = (
            select(EventRow.event_id)
            .join(JobRow, JobRow.job_id == EventRow.job_id)
            .where(EventRow.at < before, JobRow.state.in_(FINISHED))
            .limit(_ROWS_PER_TRANSACTION)
        )
        total = 0
        while True:
            with self._writing() as connection:
                count = connection.execute(delete(EventRow).where(EventRow.event_id.in_(old))).rowcount
            total += count
            if count < _ROWS_PER_TRANSACTION:
                return total

    def _purgeable(
        self, condition: Any, before: datetime, limit: int, states: Collection[JobState] = FINISHED
    ) -> list[str]:
        found: list[str] = []
        with self._reading() as connection:
            for state in sorted(FINISHED.intersection(states)):
                query = (
                    select(JobRow.study_instance_uid)
                    .where(condition, JobRow.state == state, JobRow.changed_at < before)
                    .order_by(JobRow.changed_at)
                    .limit(limit - len(found))
                )
                found += connection.execute(query).scalars()
        return found

    def _remove_images(self, study_instance_uid: str, spool: Spool) -> bool:
        """One batch; False when none is left (or none shall go)."""
        with self._writing() as connection:
            self._alone(connection, study_instance_uid)
            job = _marked(connection, study_instance_uid)
            if job is None or job.images_purged_at is None:
                return False
            rows = connection.execute(
                select(InstanceRow.sop_instance_uid, InstanceRow.path)
                .where(InstanceRow.study_instance_uid == study_instance_uid)
                .limit(_FILES_PER_TRANSACTION)
            ).all()
            # the files first: the next run finishes a row without a file, a file without a row would be taken up again
            spool.remove(Path(row.path) for row in rows)
            connection.execute(
                delete(InstanceRow).where(InstanceRow.sop_instance_uid.in_([row.sop_instance_uid for row in rows]))
            )
            connection.execute(
                update(StudyRow)
                .where(StudyRow.study_instance_uid == study_instance_uid)
                .values(instances=StudyRow.instances - len(rows))
            )
        return len(rows) == _FILES_PER_TRANSACTION


def _marked(connection: Connection, study_instance_uid: str) -> Any:
    marked = select(StudyRow.purging_at).where(StudyRow.study_instance_uid == study_instance_uid).with_for_update()
    if connection.execute(marked).scalar() is None:
        return None
    return connection.execute(screening_job(study_instance_uid)).one()


def _mark(connection: Connection, job: Any, images: bool, reports: bool, who: str, reason: str, now: datetime) -> None:
    connection.execute(
        update(StudyRow).where(StudyRow.study_instance_uid == job.study_instance_uid).values(purging_at=now)
    )
    marks = {
        name: now
        for name, wanted in (("images_purged_at", images), ("reports_purged_at", reports))
        if wanted and getattr(job, name) is None
    }
    if marks:
        connection.execute(update(JobRow).where(JobRow.job_id == job.job_id).values(**marks))
    add_event(
        connection,
        study_instance_uid=job.study_instance_uid,
        job_id=job.job_id,
        now=now,
        who=who,
        event="study_purged",
        reason=reason,
        revision=job.revision,
    )


def _owed(connection: Connection, job: Any) -> bool:
    waiting = select(DeliveryRow.delivery_id).where(
        DeliveryRow.job_id == job.job_id, DeliveryRow.state != DeliveryState.DELIVERED
    )
    return connection.execute(waiting.limit(1)).first() is not None


def _end_unfinished(connection: Connection, job: Any, who: str, reason: str, now: datetime) -> None:
    """By force: nothing may be screened or sent whose files are gone."""
    unfinished = select(DeliveryRow.delivery_id).where(
        DeliveryRow.job_id == job.job_id, DeliveryRow.state != DeliveryState.DELIVERED
    )
    for delivery_id in connection.execute(unfinished.with_for_update()).scalars().all():
        move(connection, delivery_id, DeliveryState.REFUSED, now, outcome=PURGED_BY_HAND, detail=reason)
    if job.state in FINISHED | {JobState.HELD, JobState.FAILED}:
        return
    ended = JobState.FAILED if job.state is JobState.REPORTED else JobState.HELD
    change_state(
        connection,
        job,
        ended,
        who=who,
        event="study_abandoned",
        reason=reason,
        now=now,
        code=PURGED_BY_HAND,
        detail=reason,
        not_before=None,
        **NO_CLAIM,
    )


def _remove_reports(connection: Connection, job_id: int, spool: Spool, now: datetime) -> None:
    there = (ReportObjectRow.job_id == job_id, ReportObjectRow.removed_at.is_(None))
    spool.remove(Path(path) for path in connection.execute(select(ReportObjectRow.path).where(*there)).scalars())
    connection.execute(update(ReportObjectRow).where(*there).values(removed_at=now))


def _remove_quarantined(connection: Connection, condition: Any, spool: Spool) -> Sequence[str]:
    """One batch; the studies of the files that went."""
    rows = connection.execute(
        select(QuarantineRow.quarantine_id, QuarantineRow.path, QuarantineRow.study_instance_uid)
        .where(condition)
        .limit(_FILES_PER_TRANSACTION)
    ).all()
    spool.remove(Path(row.path) for row in rows)
    connection.execute(
        delete(QuarantineRow).where(QuarantineRow.quarantine_id.in_([row.quarantine_id for row in rows]))
    )
    return [row.study_instance_uid for row in rows]
