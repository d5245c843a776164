"""The screening worker's way to the archive: after the answer, in a thread of its own, never in a study's way."""

from __future__ import annotations

import queue
import threading
from datetime import UTC, datetime

from osteo_daemon.archive.capture import capture
from osteo_daemon.archive.key import Identity
from osteo_daemon.archive.record import StudyVois
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.errors import ConfigurationError, OsteoError, Transient
from osteo_daemon.inference.screening import Screening
from osteo_daemon.jobs.archive_rows import ArchiveRows
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings

_WAITING = 16
"""Studies of some megabytes each that may wait for a slow disk; of more the newest are let go."""

_PATIENCE_SECONDS = 10.0


class Archivist:
    """Archives what was screened. Whatever goes wrong is logged and counted, and no study waits for it.

    Args:
        settings: of the node, with the archive enabled.
    """

    def __init__(self, settings: Settings) -> None:
        self._rows = ArchiveRows(settings.database_url, busy_timeout_seconds=_PATIENCE_SECONDS)
        self._archive = VoiArchive(settings, self._rows)
        self._waiting: queue.Queue[tuple[StudyVois, Identity, int]] = queue.Queue(_WAITING)
        self._log = get_logger()
        self._say_if_unusable()
        threading.Thread(target=self._work, name="archivist", daemon=True).start()

    def take(self, screening: Screening, revision: int) -> None:
        """Cut the VOIs out (some tens of milliseconds each) and leave the writing to the thread."""
        try:
            found = capture(screening)
        except ValueError as error:
            self._dropped("not_cut_out", error)
            return
        if found is None:
            return
        try:
            self._waiting.put_nowait((*found, revision))
        except queue.Full as error:
            self._dropped("disk_too_slow", error)

    def wait(self) -> None:
        """Until all that was taken is written or dropped."""
        self._waiting.join()

    def _work(self) -> None:
        while True:
            self._add(*self._waiting.get())
            self._waiting.task_done()

    def _add(self, study: StudyVois, identity: Identity, revision: int) -> None:
        try:
            kept = self._archive.add(study, identity, revision, datetime.now(UTC).date())
        except OsteoError as error:
            self._dropped(type(error).__name__, error)
        except Exception as error:  # noqa: BLE001 - the thread's loop edge: it must outlive a study
            self._dropped("crashed", error)
        else:
            self._log.info("study_archived" if kept else "study_not_archived", count=len(study.vertebrae))

    def _dropped(self, reason: str, error: BaseException) -> None:
        detail = error.detail if isinstance(error, OsteoError) else ""
        self._log.error("study_not_archived", reason=reason, error=type(error).__name__, detail=detail)
        try:
            self._rows.count_not_archived(reason)
        except Transient as failed:
            self._log.warning("drop_not_counted", error=type(failed).__name__)

    def _say_if_unusable(self) -> None:
        try:
            self._archive.key  # noqa: B018 - reading it is the check
        except (ConfigurationError, Transient) as error:
            self._log.error("archive_unusable", error=type(error).__name__, detail=error.detail)
