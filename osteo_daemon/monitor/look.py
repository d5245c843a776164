"""One look at the node: what its store, its disk and its processes say of themselves at one moment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from osteo_daemon.control import Mode, read_wish, screener_statuses
from osteo_daemon.domain.breaker import Breaker
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import Transient
from osteo_daemon.jobs.records import DeliveryState, SchedulerRun
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.roles import roles_of, screeners_of
from osteo_daemon.settings import Settings
from osteo_daemon.vitals import Sign, read_signs

WAITING = (JobState.RECEIVING, JobState.READY, JobState.SCREENING, JobState.REPORTED)
"""States in which something is still to be done by the node."""

FOR_A_PERSON = (JobState.HELD, JobState.FAILED)


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        at: when, in UTC.
        store_answers: whether the job store did; what stands in it is empty otherwise.
        jobs: how many stand in each state.
        oldest: when the oldest job in each state came.
        deliveries: how many of each destination stand in each state.
        breakers: of destinations, by name.
        runs: timed steps.
        drift_alarms: how many stand.
        free_bytes: of the spool's disk.
        size_bytes: of the spool's disk.
        mode: what a person wants of the screeners.
        screeners: what they say of themselves.
        wanted: how many processes the settings want of each role.
        signs: what every process last said.
    """

    at: datetime
    store_answers: bool
    free_bytes: int
    size_bytes: int
    mode: Mode
    screeners: Sequence[Mapping[str, Any]]
    wanted: Mapping[str, int]
    signs: Sequence[Sign]
    jobs: Mapping[JobState, int] = field(default_factory=dict)
    oldest: Mapping[JobState, datetime] = field(default_factory=dict)
    deliveries: Mapping[tuple[str, DeliveryState], int] = field(default_factory=dict)
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    runs: Sequence[SchedulerRun] = ()
    drift_alarms: int = 0

    def well(self, role: str) -> list[Sign]:
        """Processes of a role that run and come round."""
        return [sign for sign in self.signs if sign.role == role and sign.is_well]


def look_at(settings: Settings, store: JobStore) -> Look:
    """Look now."""
    state_dir = settings.state_dir
    room = shutil.disk_usage(next(folder for folder in settings.spool_dir.parents if folder.exists()))
    kept: dict[str, Any] = {"store_answers": True}
    try:
        kept |= {
            "jobs": store.counts_by_state(),
            "oldest": store.oldest_by_state((*WAITING, *FOR_A_PERSON)),
            "deliveries": store.delivery_counts(),
            "breakers": store.breakers(),
            "runs": store.scheduler_runs(),
            "drift_alarms": len(store.drift_alarms()),
        }
    except Transient:
        kept = {"store_answers": False}
    screeners = len(screeners_of(settings))
    return Look(
        at=datetime.now(UTC),
        free_bytes=room.free,
        size_bytes=room.total,
        mode=read_wish(state_dir).mode,
        screeners=screener_statuses(state_dir),
        wanted={role: screeners if role == "screener" else 1 for role in roles_of(settings)},
        signs=read_signs(state_dir),
        **kept,
    )
