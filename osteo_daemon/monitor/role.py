"""The role ``monitor``: metrics, health and readiness over HTTP, and messages to those who look after the node.

It alone opens a port for them: the other roles, of which some may not use a network at all, write small files that are
read here. It looks and tells, and nothing of the node waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from osteo_daemon.dicomweb.server import HttpServer
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.monitor.channels import channels_of
from osteo_daemon.monitor.exposition import CONTENT_TYPE, exposition
from osteo_daemon.monitor.look import Look, look_at
from osteo_daemon.monitor.notifier import Notifier
from osteo_daemon.monitor.problems import Problem, is_healthy, is_ready, problems_of
from osteo_daemon.settings import Settings
from osteo_daemon.stopping import at_the_end
from osteo_daemon.vitals import Vitals

_IDLE_SECONDS: Final = 10.0
_SILENCE_SECONDS: Final = 300.0
"""A look, or messages that nobody takes, last no longer."""
_WAIT_SECONDS: Final = 0.5


class Watch:
    """The last look, made anew when it is too old, and every few seconds in a thread of its own.

    Args:
        settings: of the node.
        store: the job store.
        notifier: told of every look.
    """

    def __init__(self, settings: Settings, store: JobStore, notifier: Notifier) -> None:
        self._settings = settings
        self._store = store
        self._notifier = notifier
        self._lock = threading.Lock()
        self._look: Look | None = None
        self._looked_at = -float("inf")
        self._ending = threading.Event()
        self._came_round_at = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)

    @property
    def silent_seconds(self) -> float:
        """How long ago the thread came round."""
        return time.monotonic() - self._came_round_at

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a message under way is sent to its end."""
        self._ending.set()
        self._thread.join()

    def look(self) -> Look:
        """What the node is like, at most ``look_seconds`` ago."""
        with self._lock:
            if self._look is None or time.monotonic() - self._looked_at >= self._settings.monitor.look_seconds:
                self._look = look_at(self._settings, self._store)
                self._looked_at = time.monotonic()
            return self._look

    def problems(self) -> list[Problem]:
        """What is amiss."""
        return problems_of(self.look(), self._settings)

    def _keep(self) -> None:
        while not self._ending.is_set():
            self._came_round_at = time.monotonic()
            try:
                self._notifier.tell(self.problems(), self._ending)
            except Exception as error:  # noqa: BLE001 - the thread's loop edge: the next look is another chance
                get_logger().error("look_failed", error=type(error).__name__, detail=where(error.__traceback__))
            self._ending.wait(self._settings.monitor.look_seconds)


class Monitor:
    """The role with its port, where the settings want one.

    Args:
        settings: of the node.

    Raises:
        ConfigurationError: port, templates or secrets cannot be used.
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        wanted = settings.monitor
        notifier = Notifier(settings.notifications, settings.state_dir, channels_of(settings.notifications))
        self._settings = settings
        self._store = JobStore(settings.database_url)
        self._watch = Watch(settings, self._store, notifier)
        self._stopping = threading.Event()
        self._server: HttpServer | None = None
        if wanted.port:
            self._server = HttpServer(
                self._pages(),
                wanted.address,
                wanted.port,
                idle_seconds=_IDLE_SECONDS,
                maximum_requests=wanted.maximum_requests,
                refused=lambda address, reason: get_logger().info("connection_refused", address=address, reason=reason),
                section="monitor",
            )

    def run(self, ready: Callable[[], None], alive: Callable[[], None]) -> None:
        """Work until `stop`."""

        def came_round() -> None:
            if self._watch.silent_seconds < _SILENCE_SECONDS:
                alive()

        self._watch.start()
        try:
            if self._server is not None:
                self._server.run(ready, came_round)
            else:
                ready()
                while not self._stopping.wait(_WAIT_SECONDS):
                    came_round()
        finally:
            self._watch.stop()
            self._store.close()

    def stop(self) -> None:
        """End; from any thread."""
        self._stopping.set()
        if self._server is not None:
            self._server.stop()

    def _pages(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/healthz", self._healthz, methods=["GET"]),
                Route("/readyz", self._readyz, methods=["GET"]),
            ]
        )

    def _metrics(self, _request: Request) -> Response:
        return Response(exposition(self._watch.look(), self._settings), media_type=None, headers=_text())

    def _healthz(self, _request: Request) -> Response:
        problems = self._watch.problems()
        return _answer(is_healthy(problems), problems)

    def _readyz(self, _request: Request) -> Response:
        problems = self._watch.problems()
        return _answer(is_ready(problems), problems)


def run(settings: Settings) -> int:
    """Watch the node until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: it is off, or port, templates or secrets cannot be used.
    """
    configure_logging(settings.log, "monitor")
    if not (settings.monitor.port or settings.notifications.wanted):
        raise ConfigurationError("monitor.port is 0 and [notifications] names nobody: nothing to do")
    vitals = Vitals(settings.state_dir, "monitor")
    monitor = Monitor(settings)
    at_the_end(monitor.stop)
    get_logger().info("monitor_started", address=settings.monitor.address, port=settings.monitor.port)
    with vitals:
        monitor.run(vitals.ready, vitals.alive)
        vitals.stopping()
    get_logger().info("stopped")
    return 0


def _text() -> dict[str, str]:
    return {"content-type": CONTENT_TYPE, "cache-control": "no-store"}


def _answer(good: bool, problems: list[Problem]) -> Response:
    told = [{"problem": problem.key, "severity": problem.severity.value} for problem in problems]
    document = {"status": "ok" if good else "not ok", "problems": told}
    return JSONResponse(document, 200 if good else 503, headers={"cache-control": "no-store"})
