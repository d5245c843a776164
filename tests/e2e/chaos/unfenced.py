"""`osteo` with a planted mutant: a claim's outcome is written without a look at its fencing token."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, select

from osteo_daemon.cli import main
from osteo_daemon.domain.job import Job
from osteo_daemon.jobs import outcomes
from osteo_daemon.jobs.schema import JobRow


def careless(connection: Connection, job: Job) -> Row[Any]:
    """The job's row, whoever holds it."""
    return connection.execute(select(JobRow.__table__).where(JobRow.job_id == job.job_id)).one()


if __name__ == "__main__":
    outcomes.claimed_row = careless
    main()
