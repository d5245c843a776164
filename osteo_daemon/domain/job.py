"""The life of a study's job: states, legal transitions, claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from types import MappingProxyType

from osteo_daemon.domain.completeness import Lacks


class JobState(StrEnum):
    """Where a study stands."""

    RECEIVING = "RECEIVING"  # instances still arrive
    READY = "READY"  # complete; waits for a screener (a retry waits here with not_before)
    SCREENING = "SCREENING"  # claimed under a lease
    REPORTED = "REPORTED"  # report objects and delivery rows are committed
    DELIVERED = "DELIVERED"  # every destination has them
    EXCLUDED = "EXCLUDED"  # not eligible, with a reason; no error
    HELD = "HELD"  # damaged, or held by hand
    FAILED = "FAILED"  # attempts spent


class JobKind(StrEnum):
    """What a job does; the kinds share one queue, one claim and one table of transitions."""

    SCREEN = "screen"


class Priority(IntEnum):
    """Which jobs go first; within one class the sources take turns. Gaps leave room for further classes."""

    STAT = 10  # somebody waits for the answer
    ROUTINE = 100  # a study that nobody hurries
    BACKFILL = 200  # archived studies, when nothing new waits
    REFIT = 300  # work on models, when nothing else waits


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.RECEIVING: frozenset({JobState.READY, JobState.HELD}),
        # late instances return a job to RECEIVING under a higher revision
        JobState.READY: frozenset({JobState.SCREENING, JobState.RECEIVING, JobState.HELD, JobState.FAILED}),
        JobState.SCREENING: frozenset(
            {
                JobState.REPORTED,
                JobState.EXCLUDED,
                JobState.READY,
                JobState.RECEIVING,
                JobState.HELD,
                JobState.FAILED,
            }
        ),
        JobState.REPORTED: frozenset({JobState.DELIVERED, JobState.RECEIVING, JobState.READY, JobState.FAILED}),
        JobState.DELIVERED: frozenset({JobState.RECEIVING, JobState.READY}),
        JobState.EXCLUDED: frozenset({JobState.RECEIVING, JobState.READY, JobState.REPORTED}),
        JobState.HELD: frozenset({JobState.READY, JobState.RECEIVING}),
        JobState.FAILED: frozenset({JobState.READY, JobState.RECEIVING}),
    }
)
"""Every legal transition; the store refuses all others."""

FINISHED = frozenset({JobState.DELIVERED, JobState.EXCLUDED})
"""States in which nothing more will happen by itself: only here may retention remove files."""


@dataclass(frozen=True, slots=True)
class Job:
    """One claimed or listed job.

    ``fencing_token`` grows with every claim and is checked at commit. No heartbeat extends a lease beyond
    ``deadline``. ``localizer_bundle`` and ``network_bundle`` name the bundles of this revision when a person asked for
    others than the settings name. ``lacks`` is what the study was known to lack when its arrival ended.
    """

    job_id: int
    kind: JobKind
    study_instance_uid: str
    state: JobState
    revision: int
    attempts: int
    fencing_token: int
    lease_until: datetime | None
    not_before: datetime | None
    priority: Priority = Priority.ROUTINE
    claimed_at: datetime | None = None
    deadline: datetime | None = None
    localizer_bundle: str | None = None
    network_bundle: str | None = None
    lacks: Lacks | None = None
