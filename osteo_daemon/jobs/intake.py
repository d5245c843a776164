"""What arrives: instances and open associations."""

from __future__ import annotations

import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from osteo_daemon.domain.job import Job, JobKind, JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import StoreUnavailable
from osteo_daemon.jobs.accompanying import is_unscreened, note_accompanying
from osteo_daemon.jobs.counts import count_jobs
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.next_slice import instance_columns, record_next_slice
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.schema import AssociationRow, InstanceRow, JobRow, ReportObjectRow, StudyRow
from osteo_daemon.jobs.transitions import NO_CLAIM, add_event, change_state, screening_job, utc_now
from osteo_daemon.jobs.turns import know_source

HELD_BY_HAND = "held_by_hand"
"""Code of a hold that only a person ends."""


class Intake(Database):
    """The receiver's side of the store."""

    def record_instance(
        self,
        instance: SopInstance,
        source_ae: str,
        *,
        association_id: str | None = None,
        screenable: bool = True,
        priority: Priority = Priority.ROUTINE,
        now: datetime | None = None,
    ) -> RecordOutcome:
        """Record one durable instance and bring its study's job to RECEIVING, in one durable transaction.

        Args:
            instance: what was received; its file is already durable.
            source_ae: calling AE title.
            association_id: the association it came over, when still open.
            screenable: False for objects that only accompany a CT: they reopen no job, and a study of nothing else is
                EXCLUDED.
            priority: of the job that the study's first instance creates.
            now: the present, for tests.

        Returns:
            STORED for a new instance; a job past RECEIVING returns there with a higher revision.
            DUPLICATE, CONFLICT and OWN_RESULT change nothing but the study's time of last arrival.

        Raises:
            StoreUnavailable: nothing was recorded; the sender must hear so. So too while the study's files are being
                removed, and when a removal that ended meanwhile took this one along.
        """
        now = now or utc_now()

        def next_slice(connection: sqlite3.Connection) -> bool:
            return record_next_slice(connection, instance, source_ae, now)

        if self._sqlite and screenable and association_id is None and self._plain_commits.run(next_slice):
            return RecordOutcome.STORED

        def record(connection: Connection) -> RecordOutcome:
            return self._record(connection, instance, source_ae, association_id, screenable, priority, now)

        return self._together(record)

    def _record(
        self,
        connection: Connection,
        instance: SopInstance,
        source_ae: str,
        association_id: str | None,
        screenable: bool,
        priority: Priority,
        now: datetime,
    ) -> RecordOutcome:
        self._alone(connection, instance.study_instance_uid)
        stored = connection.execute(
            select(InstanceRow.sha256, InstanceRow.study_instance_uid).where(
                InstanceRow.sop_instance_uid == instance.sop_instance_uid
            )
        ).one_or_none()
        if stored is not None:
            _touch(connection, stored.study_instance_uid, now, path=instance.path)
            return RecordOutcome.DUPLICATE if stored.sha256 == instance.sha256 else RecordOutcome.CONFLICT
        if connection.execute(
            select(ReportObjectRow.sop_instance_uid).where(
                ReportObjectRow.sop_instance_uid == instance.sop_instance_uid
            )
        ).first():
            return RecordOutcome.OWN_RESULT
        if not _touch(connection, instance.study_instance_uid, now, path=instance.path, more=1):
            connection.execute(
                insert(StudyRow).values(
                    study_instance_uid=instance.study_instance_uid,
                    source_ae=source_ae,
                    first_received_at=now,
                    last_received_at=now,
                    instances=1,
                )
            )
        connection.execute(
            insert(InstanceRow).values(**instance_columns(instance), source_ae=source_ae, received_at=now)
        )
        if association_id is not None:
            _note_association(connection, association_id, instance.study_instance_uid, source_ae, now)
        if screenable:
            _reopen(connection, instance.study_instance_uid, source_ae, "instance_received", now, priority=priority)
        else:
            note_accompanying(connection, instance.study_instance_uid, source_ae, priority, now)
        return RecordOutcome.STORED

    def replace_instance(self, instance: SopInstance, source_ae: str, *, now: datetime | None = None) -> RecordOutcome:
        """Take new bytes for a stored UID: same pixels and geometry, other header or transfer syntax.

        The study's job gets a higher revision, so that its report names the present identity. The former file stays
        in the spool for the retention rules.

        Raises:
            StoreUnavailable: nothing was recorded.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, instance.study_instance_uid)
            changed = connection.execute(
                update(InstanceRow)
                .where(
                    InstanceRow.sop_instance_uid == instance.sop_instance_uid,
                    InstanceRow.study_instance_uid == instance.study_instance_uid,
                    InstanceRow.series_instance_uid == instance.series_instance_uid,
                )
                .values(**instance_columns(instance), source_ae=source_ae, received_at=now)
            )
            if changed.rowcount != 1:
                return RecordOutcome.CONFLICT
            _touch(connection, instance.study_instance_uid, now, path=instance.path)
            _reopen(connection, instance.study_instance_uid, source_ae, "instance_replaced", now, only_existing=True)
        return RecordOutcome.REPLACED

    def stored_instance(self, sop_instance_uid: str) -> SopInstance | None:
        """The instance stored under a UID, or None."""
        with self._reading() as connection:
            row = connection.execute(
                select(InstanceRow.__table__).where(InstanceRow.sop_instance_uid == sop_instance_uid)
            ).one_or_none()
        return None if row is None else to_instance(row)

    def instances(self, job: Job) -> list[SopInstance]:
        """Every instance of the job's study, by series and SOP Instance UID."""
        with self._reading() as connection:
            rows = connection.execute(
                select(InstanceRow.__table__)
                .where(InstanceRow.study_instance_uid == job.study_instance_uid)
                .order_by(InstanceRow.series_instance_uid, InstanceRow.sop_instance_uid)
            ).all()
        return [to_instance(row) for row in rows]

    def association_closed(self, association_id: str) -> None:
        """The association no longer speaks for the completeness of any study."""
        with self._writing() as connection:
            connection.execute(delete(AssociationRow).where(AssociationRow.association_id == association_id))

    def forget_associations(self) -> None:
        """A receiver starts: no association of an earlier one is open."""
        with self._writing() as connection:
            connection.execute(delete(AssociationRow))


def to_instance(row: Any) -> SopInstance:
    """A row of `InstanceRow` as the domain's value."""
    return SopInstance(
        study_instance_uid=row.study_instance_uid,
        series_instance_uid=row.series_instance_uid,
        sop_class_uid=row.sop_class_uid,
        sop_instance_uid=row.sop_instance_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        path=Path(row.path),
        size_bytes=row.size_bytes,
        sha256=row.sha256,
    )


def _touch(connection: Connection, study_instance_uid: str, now: datetime, *, path: Path, more: int = 0) -> bool:
    """Note an arrival; False when the study is not known.

    Retention removes files and rows under the same lock as this transaction. A file that was written before such a
    removal and is recorded after it is gone: that must not be acknowledged.
    """
    study = connection.execute(
        update(StudyRow)
        .where(StudyRow.study_instance_uid == study_instance_uid)
        .values(last_received_at=now, instances=StudyRow.instances + more)
        .returning(StudyRow.purging_at, StudyRow.purged_at)
    ).one_or_none()
    if study is None:
        return False
    if study.purging_at is not None:
        raise StoreUnavailable("the files of this study are being removed")
    if study.purged_at is not None and not path.exists():
        raise StoreUnavailable("the files of this study were removed meanwhile")
    return True


def _note_association(
    connection: Connection, association_id: str, study_instance_uid: str, source_ae: str, now: datetime
) -> None:
    values = {"study_instance_uid": study_instance_uid, "source_ae": source_ae, "changed_at": now}
    changed = connection.execute(
        update(AssociationRow).where(AssociationRow.association_id == association_id).values(**values)
    )
    if changed.rowcount == 0:
        connection.execute(insert(AssociationRow).values(association_id=association_id, **values))


def _reopen(
    connection: Connection,
    study_instance_uid: str,
    who: str,
    event: str,
    now: datetime,
    *,
    priority: Priority = Priority.ROUTINE,
    only_existing: bool = False,
) -> None:
    """Bring the study's job to RECEIVING: create it, or return it there under a higher revision."""
    job = connection.execute(screening_job(study_instance_uid)).one_or_none()
    if job is None:
        if only_existing:
            return
        know_source(connection, who)
        job_id = connection.execute(
            insert(JobRow)
            .values(
                kind=JobKind.SCREEN,
                study_instance_uid=study_instance_uid,
                source_ae=who,
                state=JobState.RECEIVING,
                priority=priority.value,
                revision=1,
                attempts=0,
                fencing_token=0,
                created_at=now,
                changed_at=now,
            )
            .returning(JobRow.job_id)
        ).scalar_one()
        count_jobs(connection, {JobState.RECEIVING: 1})
        add_event(
            connection,
            study_instance_uid=study_instance_uid,
            job_id=job_id,
            now=now,
            who=who,
            event=event,
            reason="first instance",
            revision=1,
            to_state=JobState.RECEIVING,
        )
        return
    if job.state is JobState.RECEIVING:
        return
    if job.state is JobState.HELD and job.code == HELD_BY_HAND:
        return  # what a person stopped, a late slice does not start; it is screened when they let go
    change_state(
        connection,
        job,
        JobState.RECEIVING,
        who=who,
        event=event,
        reason="an instance changed" if only_existing else "a further instance",
        now=now,
        revision=job.revision if is_unscreened(job) else job.revision + 1,
        attempts=0,
        not_before=None,
        code=None,
        detail=None,
        localizer_bundle=None,
        network_bundle=None,
        images_purged_at=None,
        reports_purged_at=None,
        **NO_CLAIM,
    )
