"""What the scheduler knows of studies that still arrive, and the end of their arrival."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, exists, func, insert, or_, select, update

from osteo_daemon.domain.completeness import Lacks, with_gap
from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.evidence_schema import AnnouncedStudyRow, AnnouncementRow, SourceGapsRow
from osteo_daemon.jobs.intake import to_instance
from osteo_daemon.jobs.schema import AssociationRow, EventRow, InstanceRow, JobRow, StudyRow
from osteo_daemon.jobs.transitions import CLOCK_STEP, add_event, change_state, screening_job, to_job, utc_now

_LONG_AGO_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Receiving:
    """A study that is being received.

    Attributes:
        instances: how many objects are here, of every class.
        open_association: one that stored into it last is still open.
        announced_at: when a list of its objects was last changed.
    """

    job_id: int
    study_instance_uid: str
    source_ae: str
    revision: int
    last_received_at: datetime
    instances: int
    open_association: bool
    announced_at: datetime | None

    def quiet_seconds(self, now: datetime) -> float:
        """How long nothing came.

        A moment in the future was written by a clock that has been set back since: nothing arrived after that.
        """
        if self.last_received_at > now + CLOCK_STEP:
            return _LONG_AGO_SECONDS
        return (now - self.last_received_at).total_seconds()


class Completeness(Database):
    """The scheduler's side of what arrives."""

    def receiving_studies(self, shortest_seconds: float, *, now: datetime | None = None) -> list[Receiving]:
        """Studies in RECEIVING of which nothing came for a while, or of which something was announced."""
        now = now or utc_now()
        quiet = or_(
            StudyRow.last_received_at <= now - timedelta(seconds=shortest_seconds),
            StudyRow.last_received_at > now + CLOCK_STEP,
        )
        announced = exists().where(AnnouncedStudyRow.study_instance_uid == JobRow.study_instance_uid)
        with self._reading() as connection:
            # the sweep mostly finds nothing and must not take the write lock for that
            return [_receiving(row) for row in connection.execute(_studies().where(or_(quiet, announced)))]

    def complete_study(
        self,
        study: Receiving,
        *,
        event: str,
        reason: str,
        lacks: Lacks | None = None,
        gap_seconds: float | None = None,
        who: str = "scheduler",
        now: datetime | None = None,
    ) -> Job | None:
        """RECEIVING to READY, unless something came, went or was announced since ``study`` was read.

        Args:
            event: slug, ``study_complete`` or ``study_incomplete``.
            lacks: what the study is known to lack; its report says so.
            gap_seconds: the largest gap between its instances: so its source sends.

        Returns:
            The job, or None when the study has changed.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, study.study_instance_uid)
            row = connection.execute(_studies().where(JobRow.job_id == study.job_id)).one_or_none()
            if row is None or _receiving(row) != study:
                return None
            job = connection.execute(screening_job(study.study_instance_uid)).one()
            change_state(connection, job, JobState.READY, who=who, event=event, reason=reason, now=now, lacks=lacks)
            if gap_seconds is not None:
                _note_gap(connection, study.source_ae, gap_seconds, now)
            return to_job(connection.execute(screening_job(study.study_instance_uid)).one())

    def note_wait(self, study: Receiving, reason: str, *, now: datetime | None = None) -> None:
        """Say in the history of a study what it waits for."""
        with self._writing() as connection:
            add_event(
                connection,
                study_instance_uid=study.study_instance_uid,
                job_id=study.job_id,
                now=now or utc_now(),
                who="scheduler",
                event="study_waits",
                reason=reason,
                revision=study.revision,
            )

    def mark_complete(self, study_instance_uid: str, *, who: str, reason: str, now: datetime | None = None) -> None:
        """RECEIVING to READY at once, on other evidence than the quiet time.

        Raises:
            IllegalTransition: the study isn't being received.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = connection.execute(screening_job(study_instance_uid)).one()
            change_state(
                connection, row, JobState.READY, who=who, event="study_complete", reason=reason, now=now, lacks=None
            )

    def instances_of(self, study_instance_uid: str, classes: Collection[str]) -> list[SopInstance]:
        """What is here of a study, of these SOP classes."""
        query = select(InstanceRow.__table__).where(
            InstanceRow.study_instance_uid == study_instance_uid, InstanceRow.sop_class_uid.in_(classes)
        )
        with self._reading() as connection:
            return [to_instance(row) for row in connection.execute(query)]

    def arrivals(self, study_instance_uid: str, source_ae: str) -> list[datetime]:
        """When each object of a study came from one source: since it was complete last, and the one before."""
        query = select(InstanceRow.received_at).where(
            InstanceRow.study_instance_uid == study_instance_uid, InstanceRow.source_ae == source_ae
        )
        complete_at = select(func.max(EventRow.at)).where(
            EventRow.study_instance_uid == study_instance_uid,
            EventRow.from_state == JobState.RECEIVING.value,
            EventRow.to_state == JobState.READY.value,
        )
        with self._reading() as connection:
            moments = sorted(connection.execute(query).scalars())
            since = connection.execute(complete_at).scalar()
        before = 0 if since is None else bisect_right(moments, since)
        return moments[max(before - 1, 0) :]

    def source_gaps(self) -> dict[str, list[float]]:
        """The largest gap in each of a source's last studies, in seconds, by AE title."""
        with self._reading() as connection:
            rows = connection.execute(select(SourceGapsRow.source_ae, SourceGapsRow.gaps_seconds)).all()
        return {row.source_ae: list(row.gaps_seconds) for row in rows}


def _studies() -> Any:
    open_association = exists().where(AssociationRow.study_instance_uid == JobRow.study_instance_uid)
    announced_at = (
        select(func.max(AnnouncementRow.changed_at))
        .join(AnnouncedStudyRow, AnnouncedStudyRow.announcement_uid == AnnouncementRow.announcement_uid)
        .where(AnnouncedStudyRow.study_instance_uid == JobRow.study_instance_uid)
        .scalar_subquery()
    )
    return (
        select(
            JobRow.job_id,
            JobRow.study_instance_uid,
            JobRow.source_ae,
            JobRow.revision,
            StudyRow.last_received_at,
            StudyRow.instances,
            open_association.label("open_association"),
            announced_at.label("announced_at"),
        )
        .join(StudyRow, StudyRow.study_instance_uid == JobRow.study_instance_uid)
        .where(JobRow.state == JobState.RECEIVING)
        .order_by(JobRow.job_id)
    )


def _receiving(row: Any) -> Receiving:
    return Receiving(
        job_id=row.job_id,
        study_instance_uid=row.study_instance_uid,
        source_ae=row.source_ae,
        revision=row.revision,
        last_received_at=row.last_received_at,
        instances=row.instances,
        open_association=bool(row.open_association),
        announced_at=row.announced_at,
    )


def _note_gap(connection: Connection, source_ae: str, gap_seconds: float, now: datetime) -> None:
    row = connection.execute(
        select(SourceGapsRow.gaps_seconds).where(SourceGapsRow.source_ae == source_ae).with_for_update()
    ).one_or_none()
    values = {"gaps_seconds": with_gap(() if row is None else row.gaps_seconds, gap_seconds), "changed_at": now}
    if row is None:
        connection.execute(insert(SourceGapsRow).values(source_ae=source_ae, **values))
    else:
        connection.execute(update(SourceGapsRow).where(SourceGapsRow.source_ae == source_ae).values(**values))
