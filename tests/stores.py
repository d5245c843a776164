"""Empty job stores, quickly: the migrations run once in a process, every further store is a copy of that file."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

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
