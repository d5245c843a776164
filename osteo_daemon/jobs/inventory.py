"""What the store believes to lie in the spool, for comparing it with what does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, or_, select, update

from osteo_daemon.domain.job import FINISHED, JobState
from osteo_daemon.jobs.accompanying import is_unscreened, unscreened
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.schema import (
    EventRow,
    InstanceRow,
    JobRow,
    LeaseRow,
    QuarantineRow,
    ReportObjectRow,
    StudyRow,
)
from osteo_daemon.jobs.transitions import add_event, screening_job, utc_now

LIFT = 100
"""By so much revisions rise where the store may have forgotten some: UIDs made from those must not come again."""

_STUDIES_PER_PAGE = 200
_LIFTED = frozenset(JobState) - FINISHED - {JobState.REPORTED}


class Area(StrEnum):
    """A part of the spool."""

    RECEIVED = "received"
    REPORTS = "reports"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file as its row describes it."""

    area: Area
    sop_instance_uid: str
    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StudyInventory:
    """The files that the store names for one study; ``going`` while retention removes them."""

    study_instance_uid: str
    going: bool
    counted_instances: int
    files: tuple[KnownFile, ...]


class Inventory(Database):
    """The store's side of an integrity check."""

    def inventory(self) -> Iterator[StudyInventory]:
        """Every study with the files it has, in pages: the store may be large and go on working meanwhile."""
        after = ""
        while True:
            with self._reading() as connection:
                studies = connection.execute(
                    select(StudyRow.__table__)
                    .where(StudyRow.study_instance_uid > after)
                    .order_by(StudyRow.study_instance_uid)
                    .limit(_STUDIES_PER_PAGE)
                ).all()
                page = [_of_study(connection, row) for row in studies]
            yield from page
            if len(studies) < _STUDIES_PER_PAGE:
                break
            after = studies[-1].study_instance_uid
        # quarantined bytes may be all that ever came of a study
        with self._reading() as connection:
            alone = connection.execute(
                select(QuarantineRow.study_instance_uid)
                .outerjoin(StudyRow, StudyRow.study_instance_uid == QuarantineRow.study_instance_uid)
                .where(StudyRow.study_instance_uid.is_(None))
                .distinct()
            ).scalars()
            rest = [StudyInventory(uid, False, 0, tuple(_quarantined(connection, uid))) for uid in alone]
        yield from rest

    def inventory_of(self, study_instance_uid: str) -> StudyInventory | None:
        """One study, as it is now."""
        with self._reading() as connection:
            row = connection.execute(
                select(StudyRow.__table__).where(StudyRow.study_instance_uid == study_instance_uid)
            ).one_or_none()
            return None if row is None else _of_study(connection, row)

    def extent(self) -> tuple[int, int]:
        """How many instances the store knows, and the number of its newest event: an older store has a lower one."""
        with self._reading() as connection:
            instances = connection.execute(select(func.count()).select_from(InstanceRow)).scalar_one()
            newest = connection.execute(select(func.max(EventRow.event_id))).scalar_one()
        return instances, newest or 0

    def damage(self) -> list[str]:
        """What the database says is wrong with itself; PostgreSQL keeps its own checks."""
        if not self._sqlite:
            return []
        with self._reading() as connection:
            found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check") if row[0] != "ok"]
            found += [
                f"a row of {row[0]} names a row of {row[2]} that is not there"
                for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
            ]
        return found

    def lift_revision(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """Raise the revision of a study that is yet to be screened by `LIFT`."""
        with self._writing() as connection:
            job = connection.execute(screening_job(study_instance_uid)).one()
            if job.state not in _LIFTED and not is_unscreened(job):
                return
            connection.execute(
                update(JobRow).where(JobRow.job_id == job.job_id).values(revision=JobRow.revision + LIFT)
            )
            add_event(
                connection,
                study_instance_uid=study_instance_uid,
                job_id=job.job_id,
                now=now or utc_now(),
                who=who,
                event="revision_lifted",
                reason=reason,
                revision=job.revision + LIFT,
            )

    def after_restore(self, old_spool: Path, new_spool: Path, *, now: datetime | None = None) -> None:
        """Make an older state of the store fit the present.

        Paths lead to the spool as it lies now. Leases of then are over. A study that was yet to be screened may have
        been reported since: its revision rises, so that no UID of a report comes again with other bytes.
        """
        now = now or utc_now()
        with self._writing() as connection:
            connection.execute(delete(LeaseRow))
            if old_spool != new_spool:
                for table in (InstanceRow, ReportObjectRow, QuarantineRow):
                    path = func.substr(table.path, len(str(old_spool)) + 1)
                    connection.execute(
                        update(table)
                        .where(table.path.startswith(f"{old_spool}/", autoescape=True))
                        .values(path=str(new_spool) + path)
                    )
            yet_to_come = or_(JobRow.state.in_(_LIFTED), unscreened())
            unfinished = connection.execute(select(JobRow.study_instance_uid).where(yet_to_come))
            studies = list(unfinished.scalars())
        for study_instance_uid in studies:
            self.lift_revision(study_instance_uid, "store", "the store was restored from a backup", now=now)


def _of_study(connection: Any, row: Any) -> StudyInventory:
    uid = row.study_instance_uid
    reports = (
        select(ReportObjectRow.__table__)
        .join(JobRow, JobRow.job_id == ReportObjectRow.job_id)
        .where(JobRow.study_instance_uid == uid, ReportObjectRow.removed_at.is_(None))
    )
    instances = select(InstanceRow.__table__).where(InstanceRow.study_instance_uid == uid)
    files = [
        *(_known(Area.RECEIVED, entry) for entry in connection.execute(instances)),
        *(_known(Area.REPORTS, entry) for entry in connection.execute(reports)),
        *_quarantined(connection, uid),
    ]
    return StudyInventory(uid, row.purging_at is not None, row.instances, tuple(files))


def _quarantined(connection: Any, study_instance_uid: str) -> Iterator[KnownFile]:
    query = select(QuarantineRow.__table__).where(QuarantineRow.study_instance_uid == study_instance_uid)
    return (_known(Area.QUARANTINE, entry) for entry in connection.execute(query))


def _known(area: Area, row: Any) -> KnownFile:
    return KnownFile(area, row.sop_instance_uid, Path(row.path), row.size_bytes, row.sha256)
