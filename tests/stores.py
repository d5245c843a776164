"""Empty job stores, quickly (migrations run once in a process, others are copies of that file), and studies in them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from osteo_daemon.domain.completeness import Evidence, Outcome, QuietLimits, judge, rhythm_of
from osteo_daemon.domain.job import Job
from osteo_daemon.jobs.store import JobStore
from tests.postgres import SHARED_MEMORY


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="osteo-template-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    JobStore(f"sqlite:///{folder / 'jobs.sqlite'}").close()
    return folder / "jobs.sqlite"


def new_sqlite(folder: Path) -> JobStore:
    """An empty job store in ``folder``, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_template(), folder / "jobs.sqlite")
    return JobStore(f"sqlite:///{folder / 'jobs.sqlite'}")


def complete_quiet(store: JobStore, quiet_seconds: float, *, now: datetime) -> list[Job]:
    """RECEIVING to READY by a fixed quiet time alone, as if nothing else were known of any study."""
    limits = QuietLimits(quiet_seconds, quiet_seconds, quiet_seconds, quiet_seconds, quiet_seconds)
    done = []
    for study in store.receiving_studies(quiet_seconds, now=now):
        evidence = Evidence(study.quiet_seconds(now), study.open_association, study.source_ae)
        verdict = judge(evidence, rhythm_of((), limits), limits)
        if verdict.outcome is Outcome.COMPLETE:
            job = store.complete_study(study, event="study_complete", reason=verdict.reason, now=now)
            done += [] if job is None else [job]
    return done
