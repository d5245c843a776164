"""Quarantine: bytes that arrived under a SOP Instance UID already stored with other pixels; kept, never used."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import insert, select

from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.records import Quarantined
from osteo_daemon.jobs.schema import QuarantineRow
from osteo_daemon.jobs.transitions import add_event, screening_job, utc_now


class Quarantine(Database):
    """What the receiver keeps apart."""

    def quarantine_instance(
        self, instance: SopInstance, source_ae: str, reason: str, *, now: datetime | None = None
    ) -> None:
        """Record conflicting bytes that the spool keeps apart; the stored instance stays as it is.

        Raises:
            StoreUnavailable: nothing was recorded.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, instance.study_instance_uid)
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
            job = connection.execute(screening_job(instance.study_instance_uid)).one_or_none()
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
