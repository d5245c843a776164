"""What peers announce: lists of objects, by performed procedure steps and availability notifications."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from osteo_daemon.domain.announcement import AnnouncedInstance, Announcement, AnnounceOutcome, StepState
from osteo_daemon.domain.completeness import Lists
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.evidence_schema import AnnouncedInstanceRow, AnnouncedStudyRow, AnnouncementRow
from osteo_daemon.jobs.schema import InstanceRow
from osteo_daemon.jobs.transitions import utc_now

_ROWS_PER_TRANSACTION = 200


class Announcements(Database):
    """Lists as the receiver takes them and the scheduler weighs them."""

    def announce(self, announcement: Announcement, *, now: datetime | None = None) -> AnnounceOutcome:
        """Take a new list, durably: DONE or DUPLICATE.

        Raises:
            StoreUnavailable: nothing was taken.
        """
        now = now or utc_now()
        uid = announcement.announcement_uid
        with self._writing() as connection:
            self._alone(connection, uid)
            if connection.execute(_row(uid)).first() is not None:
                return AnnounceOutcome.DUPLICATE
            connection.execute(
                insert(AnnouncementRow).values(
                    announcement_uid=uid,
                    kind=announcement.kind.value,
                    source_ae=announcement.source_ae,
                    state=announcement.state.value,
                    created_at=now,
                    changed_at=now,
                )
            )
            _add_studies(connection, uid, announcement.studies)
            _replace_instances(connection, uid, announcement.instances)
        return AnnounceOutcome.DONE

    def amend_announcement(
        self,
        announcement_uid: str,
        source_ae: str,
        state: StepState,
        instances: Iterable[AnnouncedInstance] | None,
        *,
        now: datetime | None = None,
    ) -> AnnounceOutcome:
        """Change a step that is in progress, durably; ``instances`` replace those that it had, None leaves them.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        with self._writing() as connection:
            self._alone(connection, announcement_uid)
            row = connection.execute(_row(announcement_uid)).one_or_none()
            if row is None:
                return AnnounceOutcome.UNKNOWN
            if row.source_ae != source_ae:
                return AnnounceOutcome.FOREIGN
            if row.state != StepState.IN_PROGRESS:
                return AnnounceOutcome.ENDED
            connection.execute(
                update(AnnouncementRow)
                .where(AnnouncementRow.announcement_uid == announcement_uid)
                .values(state=state.value, changed_at=now or utc_now())
            )
            if instances is not None:
                _replace_instances(connection, announcement_uid, instances)
        return AnnounceOutcome.DONE

    def lists(self, study_instance_uid: str, classes: Collection[str]) -> Lists:
        """What was announced for a study beside what is here, of these SOP classes."""
        of_study = AnnouncedStudyRow.study_instance_uid == study_instance_uid
        with self._reading() as connection:
            steps = connection.execute(
                select(AnnouncementRow.kind, AnnouncementRow.state)
                .join(AnnouncedStudyRow, AnnouncedStudyRow.announcement_uid == AnnouncementRow.announcement_uid)
                .where(of_study)
            ).all()
            if not steps:
                return Lists()
            listed = connection.execute(
                select(AnnouncedInstanceRow.sop_instance_uid, AnnouncedInstanceRow.series_instance_uid)
                .join(AnnouncedStudyRow, AnnouncedStudyRow.announcement_uid == AnnouncedInstanceRow.announcement_uid)
                .where(of_study, AnnouncedInstanceRow.sop_class_uid.in_(classes))
                .distinct()
            ).all()
            here = connection.execute(
                select(InstanceRow.sop_instance_uid, InstanceRow.series_instance_uid).where(
                    InstanceRow.study_instance_uid == study_instance_uid, InstanceRow.sop_class_uid.in_(classes)
                )
            ).all()
        named = {row.sop_instance_uid: row.series_instance_uid for row in listed}
        present = {row.sop_instance_uid for row in here}
        begun = {row.series_instance_uid for row in here}
        return Lists(
            kinds=" and ".join(sorted({row.kind.upper() for row in steps})),
            in_progress=any(row.state == StepState.IN_PROGRESS for row in steps),
            ended=any(row.state != StepState.IN_PROGRESS for row in steps),
            listed=len(named),
            here=len(named.keys() & present),
            missing=sum(uid not in present and series in begun for uid, series in named.items()),
            unlisted=len(present - named.keys()),
            absent=len(set(named.values()) - begun),
        )

    def forget_announcements(self, before: datetime) -> int:
        """Remove lists that nobody has changed since a moment; returns how many."""
        old = (
            select(AnnouncementRow.announcement_uid)
            .where(AnnouncementRow.changed_at < before)
            .limit(_ROWS_PER_TRANSACTION)
        )
        total = 0
        while True:
            with self._writing() as connection:
                uids = list(connection.execute(old).scalars())
                for table in (AnnouncedInstanceRow, AnnouncedStudyRow, AnnouncementRow):
                    connection.execute(delete(table).where(table.announcement_uid.in_(uids)))
            total += len(uids)
            if len(uids) < _ROWS_PER_TRANSACTION:
                return total


def _row(announcement_uid: str) -> Any:
    return (
        select(AnnouncementRow.source_ae, AnnouncementRow.state)
        .where(AnnouncementRow.announcement_uid == announcement_uid)
        .with_for_update()
    )


def _add_studies(connection: Connection, announcement_uid: str, studies: Iterable[str]) -> None:
    rows = [{"announcement_uid": announcement_uid, "study_instance_uid": study} for study in sorted(studies)]
    if rows:
        connection.execute(insert(AnnouncedStudyRow), rows)


def _replace_instances(connection: Connection, announcement_uid: str, instances: Iterable[AnnouncedInstance]) -> None:
    connection.execute(delete(AnnouncedInstanceRow).where(AnnouncedInstanceRow.announcement_uid == announcement_uid))
    rows = {
        instance.sop_instance_uid: {
            "announcement_uid": announcement_uid,
            "sop_instance_uid": instance.sop_instance_uid,
            "series_instance_uid": instance.series_instance_uid,
            "sop_class_uid": instance.sop_class_uid,
        }
        for instance in instances
    }
    if rows:
        connection.execute(insert(AnnouncedInstanceRow), list(rows.values()))
