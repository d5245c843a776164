"""Objects that only accompany a CT: dose reports, key images, segmentations of others. Nothing screens them.

A study of which nothing else came is EXCLUDED from the start, so that lists show it and retention removes it; the
first CT image takes it up as if it were new.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, insert, update

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.job import JobKind, JobState, Priority
from osteo_daemon.jobs.counts import count_jobs
from osteo_daemon.jobs.schema import JobRow
from osteo_daemon.jobs.transitions import add_event, screening_job
from osteo_daemon.jobs.turns import know_source

REASON = "only objects that accompany a CT have come"


def is_unscreened(job: Any) -> bool:
    """True for a study of which only such objects have come: it was excluded without a claim."""
    return job.state is JobState.EXCLUDED and job.attempts == 0


def unscreened() -> ColumnElement[bool]:
    """As `is_unscreened`, for a query."""
    return and_(JobRow.state == JobState.EXCLUDED, JobRow.attempts == 0)


def note_accompanying(
    connection: Connection, study_instance_uid: str, source_ae: str, priority: Priority, now: datetime
) -> None:
    """An accompanying object was recorded: retention will find it."""
    job = connection.execute(screening_job(study_instance_uid)).one_or_none()
    if job is not None:
        if job.images_purged_at is not None:
            # it came after the study's images went, and goes at its own time
            again = update(JobRow).where(JobRow.job_id == job.job_id)
            connection.execute(again.values(images_purged_at=None, changed_at=now))
        return
    know_source(connection, source_ae)
    code = ExclusionCode.NO_CT_SERIES.value
    job_id = connection.execute(
        insert(JobRow)
        .values(
            kind=JobKind.SCREEN,
            study_instance_uid=study_instance_uid,
            source_ae=source_ae,
            state=JobState.EXCLUDED,
            priority=priority.value,
            revision=1,
            attempts=0,
            fencing_token=0,
            code=code,
            detail=REASON,
            created_at=now,
            changed_at=now,
        )
        .returning(JobRow.job_id)
    ).scalar_one()
    count_jobs(connection, {JobState.EXCLUDED: 1})
    add_event(
        connection,
        study_instance_uid=study_instance_uid,
        job_id=job_id,
        now=now,
        who=source_ae,
        event="study_excluded",
        reason=f"{code}: {REASON}",
        revision=1,
        to_state=JobState.EXCLUDED,
    )
