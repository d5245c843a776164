"""Claims: lease, heartbeat, fencing token, attempts, and what becomes of a claim whose worker is gone."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, or_, select, update

from osteo_daemon.domain.job import Job, JobState
from osteo_daemon.domain.observation import Observation, Scanner
from osteo_daemon.errors import LeaseLost
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.observations import save_observation
from osteo_daemon.jobs.schema import JobRow
from osteo_daemon.jobs.transitions import CLOCK_STEP, NO_CLAIM, change_state, to_job, utc_now
from osteo_daemon.jobs.turns import anything_is_due, next_in_turn, take_turn

ATTEMPTS_SPENT = "attempts_spent"
"""Code of a job that failed as often as it may."""

WORKER_LOST = "worker_lost"
"""Code of a job whose worker went silent."""

WALL_CLOCK_LIMIT = "wall_clock_limit"
"""Code of a job that was not finished by its deadline."""

UNKNOWN_SCANNER = Scanner()
"""Of a study of which nothing could be read."""


class Claims(Database):
    """Who may screen what, and for how long."""

    def claim(
        self,
        worker: str,
        lease_seconds: float,
        maximum_attempts: int = 3,
        *,
        limit_seconds: float | None = None,
        now: datetime | None = None,
    ) -> Job | None:
        """Take the next job for ``lease_seconds``; the attempt counts from here.

        Jobs whose lease ran out are taken back first. Within a priority class the sources take turns. A job that has
        spent its attempts becomes FAILED: a study that kills its worker ends there, not in a loop.

        Args:
            worker: name of the claiming process.
            lease_seconds: until when it is heard of again.
            maximum_attempts: so many claims may end without an outcome.
            limit_seconds: no heartbeat extends the lease beyond this from now (the wall-clock limit); None: no limit.
            now: the present, for tests.

        Returns:
            The job in state SCREENING under a new fencing token, or None when nothing waits.
        """
        now = now or utc_now()
        if self._sqlite and not self._anything_waits(now):
            return None
        with self._writing() as connection:
            _take_back(connection, now)
            while (row := next_in_turn(connection, now)) is not None:
                if row.attempts >= maximum_attempts:
                    _spend(connection, row, worker, maximum_attempts, now)
                    continue
                deadline = None if limit_seconds is None else now + timedelta(seconds=limit_seconds)
                take_turn(connection, row.source_ae)
                claimed = change_state(
                    connection,
                    row,
                    JobState.SCREENING,
                    who=worker,
                    event="job_claimed",
                    reason=f"attempt {row.attempts + 1}",
                    now=now,
                    attempts=row.attempts + 1,
                    fencing_token=row.fencing_token + 1,
                    worker=worker,
                    lease_until=_until(now, lease_seconds, deadline),
                    claimed_at=now,
                    deadline=deadline,
                    not_before=None,
                )
                return to_job(claimed)
        return None

    def next_ready(self, *, now: datetime | None = None) -> Job | None:
        """The job that a claim would take now, or None; nothing is claimed: a hint for reading its files ahead."""
        with self._reading() as connection:
            row = next_in_turn(connection, now or utc_now(), lock=False)
            return None if row is None else to_job(row)

    def take_back_expired(self, *, now: datetime | None = None) -> int:
        """SCREENING to READY for jobs whose lease ran out; returns how many."""
        now = now or utc_now()
        with self._reading() as connection:
            if connection.execute(_expired(now).limit(1)).first() is None:
                return 0
        with self._writing() as connection:
            return _take_back(connection, now)

    def heartbeat(self, job: Job, lease_seconds: float, *, now: datetime | None = None) -> None:
        """Extend the lease from now.

        Raises:
            LeaseLost: the job is no longer this worker's, or its deadline has passed: drop the work.
        """
        now = now or utc_now()
        if job.deadline is not None and job.deadline <= now:
            raise LeaseLost(f"job {job.job_id} was not finished by its deadline")
        with self._writing() as connection:
            changed = connection.execute(
                update(JobRow)
                .where(
                    JobRow.job_id == job.job_id,
                    JobRow.state == JobState.SCREENING,
                    JobRow.fencing_token == job.fencing_token,
                )
                .values(lease_until=_until(now, lease_seconds, job.deadline))
            )
            if changed.rowcount != 1:
                raise LeaseLost(f"job {job.job_id}, fencing token {job.fencing_token}")

    def worker_ended(self, worker: str, reason: str, *, code: str = WORKER_LOST, now: datetime | None = None) -> int:
        """SCREENING to READY at once for what a worker held that is known to be gone; returns how many.

        The attempt stays counted and the reason stays with the job.
        """
        query = select(JobRow.__table__).where(JobRow.state == JobState.SCREENING, JobRow.worker == worker)
        with self._writing() as connection:
            rows = connection.execute(query.with_for_update()).all()
            for row in rows:
                end_claim(connection, row, JobState.READY, "worker_ended", code, reason, now or utc_now(), who="store")
        return len(rows)

    def _anything_waits(self, now: datetime) -> bool:
        # an idle worker polls: it must not take the one write lock for that
        with self._reading() as connection:
            return anything_is_due(connection, now) or connection.execute(_expired(now).limit(1)).first() is not None


def _until(now: datetime, lease_seconds: float, deadline: datetime | None) -> datetime:
    until = now + timedelta(seconds=lease_seconds)
    return until if deadline is None else min(until, deadline)


def _expired(now: datetime) -> Any:
    # a claim in the future was made by a clock that has been set back since: its lease would last for as long
    ended = or_(JobRow.lease_until < now, JobRow.claimed_at > now + CLOCK_STEP)
    return select(JobRow.__table__).where(JobRow.state == JobState.SCREENING, ended)


def _take_back(connection: Connection, now: datetime) -> int:
    rows = connection.execute(_expired(now).with_for_update(skip_locked=True)).all()
    for row in rows:
        late = row.deadline is not None and row.deadline <= now
        code, reason = WORKER_LOST, f"no heartbeat from {row.worker}"
        if late:
            code, reason = WALL_CLOCK_LIMIT, f"{row.worker} did not finish by {row.deadline:%Y-%m-%d %H:%M:%S} UTC"
        end_claim(connection, row, JobState.READY, "lease_expired", code, reason, now, who="store")
    return len(rows)


def _spend(connection: Connection, row: Row[Any], worker: str, maximum_attempts: int, now: datetime) -> None:
    last = f"; last: {row.code}: {row.detail}" if row.code else ""
    end_claim(
        connection,
        row,
        JobState.FAILED,
        "job_failed",
        ATTEMPTS_SPENT,
        f"{row.attempts} of {maximum_attempts} attempts{last}",
        now,
        who=worker,
    )


def end_claim(
    connection: Connection,
    row: Row[Any],
    state: JobState,
    event: str,
    code: str,
    reason: str,
    now: datetime,
    *,
    who: str | None = None,
    **values: Any,
) -> Row[Any]:
    """A claimed job leaves its claim, with ``code`` and ``reason`` beside it; returns the job's row as it is now.

    Args:
        connection: an open writing transaction.
        row: the job's row as read and locked in this transaction.
        state: where it goes.
        event: slug of what happened.
        code, reason: why.
        now: the present.
        who: the row's worker when None.
        values: further columns of `JobRow`.
    """
    if state in (JobState.HELD, JobState.FAILED):
        save_observation(connection, row.job_id, row.priority, Observation(now, UNKNOWN_SCANNER, code))
    return change_state(
        connection,
        row,
        state,
        who=who or row.worker,
        event=event,
        reason=f"{code}: {reason}",
        now=now,
        code=code,
        detail=reason,
        **{"not_before": None, **NO_CLAIM, **values},
    )
