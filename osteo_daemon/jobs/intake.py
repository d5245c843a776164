"""What arrives: instances, open associations, and when a study is complete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, exists, insert, or_, select, update

from osteo_daemon.domain.job import Job, JobKind, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import Quarantined, RecordOutcome
from osteo_daemon.jobs.schema import AssociationRow, InstanceRow, JobRow, QuarantineRow, ReportObjectRow, StudyRow
from osteo_daemon.jobs.transitions import NO_LEASE, add_event, change_state, to_job, utc_now

ROUTINE = 100
"""Priority of a study that nobody hurries."""

HELD_BY_HAND = "held_by_hand"
"""Code of a hold that only a person ends."""

OPEN_ASSOCIATION_FACTOR = 10.0
"""An association left open keeps its last study incomplete for at most this many quiet times."""


class Intake(Database):
    """The receiver's and the scheduler's side of the store."""

    def record_instance(
        self,
        instance: SopInstance,
        source_ae: str,
        *,
        association_id: str | None = None,
        screenable: bool = True,
        now: datetime | None = None,
    ) -> RecordOutcome:
        """Record one durable instance and bring its study's job to RECEIVING, in one durable transaction.

        Args:
            instance: what was received; its file is already durable.
            source_ae: calling AE title.
            association_id: the association it came over, when still open.
            screenable: False for objects that only accompany a CT: they neither create nor reopen a job.
            now: the present, for tests.

        Returns:
            STORED for a new instance; a job past RECEIVING returns there with a higher revision.
            DUPLICATE, CONFLICT and OWN_RESULT change nothing but the study's time of last arrival.

        Raises:
            StoreUnavailable: nothing was recorded; the sender must hear so.
        """
        now = now or utc_now()
        with self._writing() as connection:
            stored = connection.execute(
                select(InstanceRow.sha256, InstanceRow.study_instance_uid).where(
                    InstanceRow.sop_instance_uid == instance.sop_instance_uid
                )
            ).one_or_none()
            if stored is not None:
                _touch(connection, stored.study_instance_uid, now)
                return RecordOutcome.DUPLICATE if stored.sha256 == instance.sha256 else RecordOutcome.CONFLICT
            if connection.execute(
                select(ReportObjectRow.sop_instance_uid).where(
                    ReportObjectRow.sop_instance_uid == instance.sop_instance_uid
                )
            ).first():
                return RecordOutcome.OWN_RESULT
            if not _touch(connection, instance.study_instance_uid, now):
                connection.execute(
                    insert(StudyRow).values(
                        study_instance_uid=instance.study_instance_uid,
                        source_ae=source_ae,
                        first_received_at=now,
                        last_received_at=now,
                    )
                )
            connection.execute(insert(InstanceRow).values(**_columns(instance), source_ae=source_ae, received_at=now))
            if association_id is not None:
                _note_association(connection, association_id, instance.study_instance_uid, source_ae, now)
            if screenable:
                _reopen(connection, instance.study_instance_uid, source_ae, "instance_received", now)
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
            changed = connection.execute(
                update(InstanceRow)
                .where(
                    InstanceRow.sop_instance_uid == instance.sop_instance_uid,
                    InstanceRow.study_instance_uid == instance.study_instance_uid,
                    InstanceRow.series_instance_uid == instance.series_instance_uid,
                )
                .values(**_columns(instance), source_ae=source_ae, received_at=now)
            )
            if changed.rowcount != 1:
                return RecordOutcome.CONFLICT
            _touch(connection, instance.study_instance_uid, now)
            _reopen(connection, instance.study_instance_uid, source_ae, "instance_replaced", now, only_existing=True)
        return RecordOutcome.REPLACED

    def quarantine_instance(
        self, instance: SopInstance, source_ae: str, reason: str, *, now: datetime | None = None
    ) -> None:
        """Record conflicting bytes that the spool keeps apart; the stored instance stays as it is.

        Raises:
            StoreUnavailable: nothing was recorded.
        """
        now = now or utc_now()
        with self._writing() as connection:
            known = select(QuarantineRow.quarantine_id).where(
                QuarantineRow.sop_instance_uid == instance.sop_instance_uid, QuarantineRow.sha256 == instance.sha256
            )
            if connection.execute(known).first():
                return
            connection.execute(
                insert(QuarantineRow).values(
                    sop_instance_uid=instance.sop_instance_uid,
                    study_instance_uid=instance.study_instance_uid,
                    path=str(instance.path),
                    size_bytes=instance.size_bytes,
                    sha256=instance.sha256,
                    reason=reason,
                    source_ae=source_ae,
                    received_at=now,
                )
            )
            job = connection.execute(_screening_job(instance.study_instance_uid)).one_or_none()
            add_event(
                connection,
                study_instance_uid=instance.study_instance_uid,
                job_id=None if job is None else job.job_id,
                now=now,
                who=source_ae,
                event="instance_quarantined",
                reason=f"{instance.sop_instance_uid}: {reason}",
                revision=0 if job is None else job.revision,
            )

    def quarantined(self, study_instance_uid: str | None = None) -> list[Quarantined]:
        """Quarantined bytes, newest first."""
        query = select(QuarantineRow.__table__).order_by(QuarantineRow.quarantine_id.desc())
        if study_instance_uid is not None:
            query = query.where(QuarantineRow.study_instance_uid == study_instance_uid)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [
            Quarantined(
                sop_instance_uid=row.sop_instance_uid,
                study_instance_uid=row.study_instance_uid,
                path=Path(row.path),
                size_bytes=row.size_bytes,
                sha256=row.sha256,
                reason=row.reason,
                source_ae=row.source_ae,
                received_at=row.received_at,
            )
            for row in rows
        ]

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

    def complete_quiet_studies(
        self, quiet_seconds: float, *, now: datetime | None = None, who: str = "scheduler"
    ) -> Sequence[Job]:
        """RECEIVING to READY for studies of which nothing arrived for ``quiet_seconds``.

        A study into which an open association stored last stays incomplete, at most `OPEN_ASSOCIATION_FACTOR`
        quiet times.
        """
        now = now or utc_now()
        quiet = timedelta(seconds=quiet_seconds)
        open_association = exists().where(AssociationRow.study_instance_uid == JobRow.study_instance_uid)
        query = (
            select(JobRow.__table__)
            .join(StudyRow, StudyRow.study_instance_uid == JobRow.study_instance_uid)
            .where(
                JobRow.state == JobState.RECEIVING,
                StudyRow.last_received_at <= now - quiet,
                or_(~open_association, StudyRow.last_received_at <= now - quiet * OPEN_ASSOCIATION_FACTOR),
            )
            .order_by(JobRow.job_id)
            .with_for_update(of=JobRow.__table__)
        )
        with self._reading() as connection:
            # the sweep mostly finds nothing and must not take the write lock for that
            if connection.execute(query.limit(1)).first() is None:
                return []
        done = []
        with self._writing() as connection:
            for row in connection.execute(query).all():
                reason = f"nothing arrived for {quiet_seconds:g} s"
                change_state(connection, row, JobState.READY, who=who, event="study_complete", reason=reason, now=now)
                done.append(to_job(connection.execute(_job(row.job_id)).one()))
        return done

    def mark_complete(self, study_instance_uid: str, *, who: str, reason: str, now: datetime | None = None) -> None:
        """RECEIVING to READY at once, on other evidence than the quiet time.

        Raises:
            IllegalTransition: the study isn't being received.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = connection.execute(_screening_job(study_instance_uid)).one()
            change_state(connection, row, JobState.READY, who=who, event="study_complete", reason=reason, now=now)


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


def _columns(instance: SopInstance) -> dict[str, Any]:
    return {
        "sop_instance_uid": instance.sop_instance_uid,
        "study_instance_uid": instance.study_instance_uid,
        "series_instance_uid": instance.series_instance_uid,
        "sop_class_uid": instance.sop_class_uid,
        "transfer_syntax_uid": instance.transfer_syntax_uid,
        "path": str(instance.path),
        "size_bytes": instance.size_bytes,
        "sha256": instance.sha256,
    }


def _job(job_id: int) -> Any:
    return select(JobRow.__table__).where(JobRow.job_id == job_id).with_for_update()


def _screening_job(study_instance_uid: str) -> Any:
    return (
        select(JobRow.__table__)
        .where(JobRow.study_instance_uid == study_instance_uid, JobRow.kind == JobKind.SCREEN)
        .with_for_update()
    )


def _touch(connection: Connection, study_instance_uid: str, now: datetime) -> bool:
    changed = connection.execute(
        update(StudyRow).where(StudyRow.study_instance_uid == study_instance_uid).values(last_received_at=now)
    )
    return changed.rowcount == 1


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
    only_existing: bool = False,
) -> None:
    """Bring the study's job to RECEIVING: create it, or return it there under a higher revision."""
    job = connection.execute(_screening_job(study_instance_uid)).one_or_none()
    if job is None:
        if only_existing:
            return
        job_id = connection.execute(
            insert(JobRow)
            .values(
                kind=JobKind.SCREEN,
                study_instance_uid=study_instance_uid,
                state=JobState.RECEIVING,
                priority=ROUTINE,
                revision=1,
                attempts=0,
                fencing_token=0,
                created_at=now,
                changed_at=now,
            )
            .returning(JobRow.job_id)
        ).scalar_one()
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
        revision=job.revision + 1,
        attempts=0,
        not_before=None,
        code=None,
        detail=None,
        **NO_LEASE,
    )
