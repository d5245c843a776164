"""The durable list of what a pull found and has fetched: a pull that is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, or_, select, update

from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.pull_rows import (
    Pull,
    PulledState,
    PulledStudy,
    PulledStudyRow,
    PullRow,
    PullState,
    StudyHere,
)
from osteo_daemon.jobs.schema import InstanceRow, JobRow, QuarantineRow, ReportObjectRow
from osteo_daemon.jobs.transitions import CLOCK_STEP, utc_now

OPEN_PULLS = frozenset({PullState.SEARCHING, PullState.FETCHING})
"""States of pulls that have something to do."""


class Pulls(Database):
    """The side of the store that fetches from archives."""

    def create_pull(self, archive: str, criteria: dict[str, Any], *, now: datetime | None = None) -> int:
        """A new pull, about to search; returns its number."""
        now = now or utc_now()
        values = {"archive": archive, "state": PullState.SEARCHING.value, "criteria": criteria}
        with self._writing() as connection:
            return connection.execute(
                insert(PullRow).values(**values, created_at=now, changed_at=now).returning(PullRow.pull_id)
            ).scalar_one()

    def pull(self, pull_id: int) -> Pull:
        """A pull as it stands.

        Raises:
            KeyError: no such pull.
        """
        with self._reading() as connection:
            row = connection.execute(select(PullRow.__table__).where(PullRow.pull_id == pull_id)).one_or_none()
        if row is None:
            raise KeyError(pull_id)
        return _pull(row)

    def pulls(self, limit: int = 50) -> list[Pull]:
        """Pulls, the newest first."""
        with self._reading() as connection:
            rows = connection.execute(select(PullRow.__table__).order_by(PullRow.pull_id.desc()).limit(limit))
            return [_pull(row) for row in rows]

    def latest_pull(self, name: str) -> Pull | None:
        """The newest pull of a ``[[pulls]]`` entry; None when there was none."""
        query = (
            select(PullRow.__table__)
            .where(PullRow.criteria["name"].as_string() == name)
            .order_by(PullRow.pull_id.desc())
            .limit(1)
        )
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _pull(row)

    def pull_found(self, pull_id: int, study_instance_uids: Iterable[str], *, now: datetime | None = None) -> int:
        """Note some hundred studies that the archive has; those noted before stay as they are.

        Returns:
            How many are new.
        """
        now = now or utc_now()
        wanted = list(dict.fromkeys(study_instance_uids))
        with self._writing() as connection:
            of_pull = PulledStudyRow.pull_id == pull_id
            there = connection.execute(select(func.count()).select_from(PulledStudyRow).where(of_pull)).scalar_one()
            known = set(
                connection.execute(
                    select(PulledStudyRow.study_instance_uid).where(
                        of_pull, PulledStudyRow.study_instance_uid.in_(wanted)
                    )
                ).scalars()
            )
            new = [uid for uid in wanted if uid not in known]
            if new:
                rows = [
                    {
                        "pull_id": pull_id,
                        "study_instance_uid": uid,
                        "position": position,
                        "state": PulledState.WANTED.value,
                        "attempts": 0,
                        "instances": 0,
                        "changed_at": now,
                    }
                    for position, uid in enumerate(new, start=there)
                ]
                connection.execute(insert(PulledStudyRow), rows)
        return len(new)

    def change_pull(
        self, pull_id: int, state: PullState, detail: str | None = None, *, now: datetime | None = None
    ) -> None:
        """An open pull goes on to another state.

        Raises:
            KeyError: no such pull.
            IllegalTransition: it has ended.
        """
        with self._writing() as connection:
            row = connection.execute(select(PullRow.state).where(PullRow.pull_id == pull_id)).one_or_none()
            if row is None:
                raise KeyError(pull_id)
            if row.state not in OPEN_PULLS:
                raise IllegalTransition(f"the pull is {row.state}")
            connection.execute(
                update(PullRow)
                .where(PullRow.pull_id == pull_id)
                .values(state=state.value, detail=detail, changed_at=now or utc_now())
            )

    def reopen_pull(self, pull_id: int, *, failed_too: bool, now: datetime | None = None) -> None:
        """A pull that ended goes on; studies that failed too, with new attempts, when ``failed_too``.

        Raises:
            KeyError: no such pull.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = connection.execute(select(PullRow.state).where(PullRow.pull_id == pull_id)).one_or_none()
            if row is None:
                raise KeyError(pull_id)
            if failed_too:
                connection.execute(
                    update(PulledStudyRow)
                    .where(PulledStudyRow.pull_id == pull_id, PulledStudyRow.state == PulledState.FAILED.value)
                    .values(state=PulledState.WANTED.value, attempts=0, not_before=None, changed_at=now)
                )
            if row.state not in OPEN_PULLS:
                # what a cancelled search had not found yet it finds now
                searching = row.state == PullState.CANCELLED
                state = PullState.SEARCHING if searching else PullState.FETCHING
                connection.execute(
                    update(PullRow)
                    .where(PullRow.pull_id == pull_id)
                    .values(state=state.value, detail=None, changed_at=now)
                )

    def next_wanted(self, pull_id: int, *, now: datetime | None = None) -> PulledStudy | None:
        """The study to fetch now; None when there is none whose time has come."""
        now = now or utc_now()
        query = (
            _studies(pull_id)
            .where(
                PulledStudyRow.state == PulledState.WANTED.value,
                or_(
                    PulledStudyRow.not_before.is_(None),
                    PulledStudyRow.not_before <= now,
                    PulledStudyRow.changed_at > now + CLOCK_STEP,  # the clock was set back since
                ),
            )
            .order_by(PulledStudyRow.attempts, PulledStudyRow.position)
            .limit(1)
        )
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _study(row)

    def next_wanted_at(self, pull_id: int) -> datetime | None:
        """When the next study that waits for another attempt may be fetched; None when none waits."""
        with self._reading() as connection:
            soonest: datetime | None = connection.execute(
                select(func.min(PulledStudyRow.not_before)).where(
                    PulledStudyRow.pull_id == pull_id, PulledStudyRow.state == PulledState.WANTED.value
                )
            ).scalar_one()
        return soonest

    def pull_attempted(self, pull_id: int, study_instance_uid: str, *, now: datetime | None = None) -> int:
        """An attempt at a study begins, counted at once: one that kills its process is charged. Returns its number."""
        with self._writing() as connection:
            attempts: int = connection.execute(
                _one(pull_id, study_instance_uid)
                .values(attempts=PulledStudyRow.attempts + 1, changed_at=now or utc_now())
                .returning(PulledStudyRow.attempts)
            ).scalar_one()
        return attempts

    def pull_settled(
        self,
        pull_id: int,
        study_instance_uid: str,
        state: PulledState,
        *,
        instances: int = 0,
        detail: str | None = None,
        not_before: datetime | None = None,
        uncharged: bool = False,
        now: datetime | None = None,
    ) -> None:
        """What an attempt came to; ``uncharged`` takes the attempt back: it was not the study's fault."""
        with self._writing() as connection:
            connection.execute(
                _one(pull_id, study_instance_uid).values(
                    state=state.value,
                    instances=PulledStudyRow.instances + instances,
                    attempts=PulledStudyRow.attempts - int(uncharged),
                    detail=detail,
                    not_before=not_before,
                    changed_at=now or utc_now(),
                )
            )

    def pull_counts(self, pull_id: int) -> dict[PulledState, int]:
        """How many studies of a pull stand where; every state is named."""
        query = (
            select(PulledStudyRow.state, func.count())
            .where(PulledStudyRow.pull_id == pull_id)
            .group_by(PulledStudyRow.state)
        )
        counts = dict.fromkeys(PulledState, 0)
        with self._reading() as connection:
            counts.update((PulledState(state), int(count)) for state, count in connection.execute(query))
        return counts

    def pulled_studies(
        self, pull_id: int, state: PulledState | None = None, *, limit: int | None = None
    ) -> list[PulledStudy]:
        """Studies of a pull in the order in which they were found."""
        query = _studies(pull_id).order_by(PulledStudyRow.position).limit(limit)
        if state is not None:
            query = query.where(PulledStudyRow.state == state.value)
        with self._reading() as connection:
            return [_study(row) for row in connection.execute(query)]

    def study_here(self, study_instance_uid: str) -> StudyHere:
        """What this node has of a study, and of its own results for it."""
        job = select(JobRow.job_id).where(JobRow.study_instance_uid == study_instance_uid)
        with self._reading() as connection:
            stored = connection.execute(
                select(InstanceRow.sop_instance_uid, InstanceRow.series_instance_uid).where(
                    InstanceRow.study_instance_uid == study_instance_uid
                )
            ).all()
            own = connection.execute(
                select(ReportObjectRow.sop_instance_uid).where(ReportObjectRow.job_id.in_(job))
            ).scalars()
            quarantined = connection.execute(
                select(QuarantineRow.sop_instance_uid).where(QuarantineRow.study_instance_uid == study_instance_uid)
            ).scalars()
            removed = connection.execute(
                select(JobRow.job_id).where(
                    JobRow.study_instance_uid == study_instance_uid, JobRow.images_purged_at.is_not(None)
                )
            ).first()
            return StudyHere(
                {row.sop_instance_uid: row.series_instance_uid for row in stored},
                frozenset(own),
                frozenset(quarantined),
                removed is not None,
            )


def _studies(pull_id: int) -> Any:
    return select(PulledStudyRow.__table__).where(PulledStudyRow.pull_id == pull_id)


def _one(pull_id: int, study_instance_uid: str) -> Any:
    return update(PulledStudyRow).where(
        PulledStudyRow.pull_id == pull_id, PulledStudyRow.study_instance_uid == study_instance_uid
    )


def _pull(row: Any) -> Pull:
    return Pull(
        pull_id=row.pull_id,
        archive=row.archive,
        state=PullState(row.state),
        criteria=row.criteria,
        detail=row.detail,
        created_at=row.created_at,
        changed_at=row.changed_at,
    )


def _study(row: Any) -> PulledStudy:
    return PulledStudy(
        study_instance_uid=row.study_instance_uid,
        state=PulledState(row.state),
        attempts=row.attempts,
        not_before=row.not_before,
        instances=row.instances,
        detail=row.detail,
    )
