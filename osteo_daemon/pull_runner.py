"""The puller: runs the named pulls (``[[pulls]]``) that the scheduler writes down, each in a thread of its own.

A pull that was in hand when this process ended goes on where it was, as with `osteo pull resume`.
"""

from __future__ import annotations

import threading
from typing import Final

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.discards import Discards
from osteo_daemon.errors import ConfigurationError, IllegalTransition, OsteoError
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.pull_rows import Pull, PulledState
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.pull.archive import open_archive, taken_classes
from osteo_daemon.pull.puller import Puller, Report
from osteo_daemon.pull.schedule import next_open, pace_of
from osteo_daemon.settings import ArchiveSettings, NamedPullSettings, Settings
from osteo_daemon.stopping import at_the_end
from osteo_daemon.vitals import Vitals

_POLL_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 1.0


class _Waits:
    """Says why a pull fetches nothing, once for each wait."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = ""

    def __call__(self, report: Report) -> None:
        if report.waits and report.waits != self._told:
            get_logger().info("pull_waits", kind=self._name, reason=report.waits)
        self._told = report.waits


class _Lane:
    """One named pull: waits until one is written down, runs it, waits again."""

    def __init__(self, settings: Settings, entry: NamedPullSettings, store: JobStore, intake: DurableIntake) -> None:
        self._settings = settings
        self._entry = entry
        self._archive = archive_of(settings, entry)
        self._store = store
        self._intake = intake
        self._room = room_of(settings)
        self._ending = threading.Event()
        self._stopping = threading.Event()  # of the pull in hand: a cancellation by hand sets it too
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._work, name=f"pull-{entry.name}", daemon=True)

    def stop(self) -> None:
        """Cancel what is in hand; nothing is lost."""
        with self._lock:
            self._ending.set()
            self._stopping.set()

    def _work(self) -> None:
        failures = 0
        while not self._ending.is_set():
            try:
                pull = next_open(self._store, self._entry.name)
                if pull is not None:
                    self._run(pull)
                failures, pause = 0, _POLL_SECONDS
            except IllegalTransition:
                pause = _POLL_SECONDS  # a person has it in hand: osteo pull resume
            except OsteoError as error:
                failures += 1
                own = self._settings.pull
                pause = back_off_seconds(own.retry_base_seconds, failures, own.retry_maximum_seconds)
                self._tell(type(error).__name__, error.detail, pause)
            except Exception as error:  # noqa: BLE001 - the thread's loop edge: one pull must not end the others
                failures += 1
                pause = back_off_seconds(_POLL_SECONDS, failures, self._settings.pull.retry_maximum_seconds)
                self._tell(type(error).__name__, where(error.__traceback__), pause)
            self._ending.wait(pause)

    def _tell(self, error: str, detail: str, pause: float) -> None:
        get_logger().warning("pull_interrupted", kind=self._entry.name, error=error, detail=detail, wait_s=round(pause))

    def _run(self, pull: Pull) -> None:
        with self._lock:
            if self._ending.is_set():
                return
            self._stopping = threading.Event()
        log = get_logger().bind(kind=self._entry.name)
        log.info("pull_started", detail=f"pull {pull.pull_id}, {pull.state.value}")
        puller = Puller(
            pace_of(self._entry, self._settings.pull),
            self._store,
            self._room,
            open_archive(self._settings, self._archive, self._stopping),
            self._intake,
            self._archive.maximum_matches,
            taken_classes(self._settings.accompanying),
            self._stopping,
            _Waits(self._entry.name),
        )
        state = puller.run(pull.pull_id)
        counts = self._store.pull_counts(pull.pull_id)
        said = ", ".join(f"{count} {kind.value.lower()}" for kind, count in counts.items() if count) or "no studies"
        tell = log.warning if counts[PulledState.FAILED] else log.info
        tell("pull_ended", outcome=state.value, detail=f"pull {pull.pull_id}: {said}")


class PullRunner:
    """All named pulls of one node.

    Raises:
        ConfigurationError: an archive cannot be used, or the spool.
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._store = JobStore(settings.database_url)
        spool = Spool(settings.spool_dir, minimum_free_bytes=settings.receiver.minimum_free_bytes)
        discards, room = Discards(settings.accompanying), room_of(settings)
        intake = DurableIntake(spool, self._store, discards=discards, room=room)
        self._lanes = [_Lane(settings, entry, self._store, intake) for entry in settings.pulls]
        for entry in settings.pulls:
            open_archive(settings, archive_of(settings, entry), threading.Event())  # what is wrong is said now

    def start(self) -> None:
        """Begin, each in its thread."""
        for lane in self._lanes:
            lane.thread.start()

    @property
    def is_alive(self) -> bool:
        """Every named pull still has its thread."""
        return all(lane.thread.is_alive() for lane in self._lanes)

    def stop(self) -> None:
        """Cancel what is in hand and end; a later start goes on."""
        for lane in self._lanes:
            lane.stop()
        for lane in self._lanes:
            lane.thread.join()
        self._store.close()


def archive_of(settings: Settings, entry: NamedPullSettings) -> ArchiveSettings:
    """The archive that an entry names; settings without it are refused when they are read."""
    return next(archive for archive in settings.archives if archive.name == entry.archive)


def room_of(settings: Settings) -> Room:
    """The room that receiving leaves on the disk."""
    limits = settings.receiver
    return Room(settings.spool_dir, limits.minimum_free_bytes, limits.low_watermark_bytes)


def run(settings: Settings) -> int:
    """Pull until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, "pull")
    if not settings.pulls:
        raise ConfigurationError("there is no [[pulls]] entry: nothing to pull")
    ended = threading.Event()
    at_the_end(ended.set)
    vitals = Vitals(settings.state_dir, "puller")
    runner = PullRunner(settings)
    runner.start()
    get_logger().info("puller_started", count=len(settings.pulls))
    with vitals:
        vitals.ready()
        while not ended.wait(_LOOK_SECONDS):
            if runner.is_alive:
                vitals.alive()
        vitals.stopping()
        runner.stop()
    get_logger().info("stopped")
    return 0
