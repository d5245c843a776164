"""A refit as a job: asked for by a person or the scheduler, done by the refitter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final


class RefitState(StrEnum):
    """Where a refit stands."""

    QUEUED = "queued"  # waits for a refitter
    RUNNING = "running"  # a refitter holds it under a lease
    DONE = "done"  # ended with a verdict
    REFUSED = "refused"  # the labels allow no refit
    FAILED = "failed"  # attempts or time are spent


SITE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
OPEN: Final = (RefitState.QUEUED, RefitState.RUNNING)
MAXIMUM_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Refit:
    """One refit.

    Attributes:
        refit_id: its number.
        site: the site's name.
        state: see `RefitState`.
        requested_at: when.
        requested_by: a user's name, or ``schedule``.
        reason: why.
        data: folder of a data set; None takes the archive of VOIs.
        labels: in the archive when it was asked for.
        attempts: counted at each claim.
        fencing_token: of the present claim; what another claim commits is refused.
        started_at, ended_at: of the last attempt.
        worker: who holds or held it.
        lease_until: until when the worker is heard of again.
        progress: stage, steps done and to do, seconds left; ``paused`` while screening has the machine.
        verdict, recommended: of the verdict, when it ended.
        versions: candidates that stand in the registry.
        detail: reasons or the error.
    """

    refit_id: int
    site: str
    state: RefitState
    requested_at: datetime
    requested_by: str
    reason: str
    data: str | None
    labels: int
    attempts: int
    fencing_token: int
    started_at: datetime | None
    ended_at: datetime | None
    worker: str | None
    lease_until: datetime | None
    progress: Mapping[str, Any]
    verdict: str | None
    recommended: str | None
    versions: tuple[str, ...]
    detail: str | None
