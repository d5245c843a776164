"""The role ``console``: the web console's port, its certificate, and what pages work with."""

from __future__ import annotations

import secrets
import ssl
from pathlib import Path

from starlette.types import ASGIApp

from osteo_daemon.console.explanations import read_explanations
from osteo_daemon.console.gate import Gate, cookie_name
from osteo_daemon.console.login_limits import LoginLimits
from osteo_daemon.console.pages import Node, build
from osteo_daemon.console.sessions import Sessions
from osteo_daemon.console.table import TABLE
from osteo_daemon.console.users import users_file
from osteo_daemon.dicomweb.server import HttpServer
from osteo_daemon.domain.wording import load_wording
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import ConsoleSettings, Settings
from osteo_daemon.stopping import at_the_end
from osteo_daemon.tls import browser_context
from osteo_daemon.vitals import Vitals

_KEY_BYTES = 32


class Console:
    """The port with its pages.

    Args:
        settings: of the node, with a ``console.port``.

    Raises:
        ConfigurationError: port, certificate, users or texts cannot be used.
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        wanted = settings.console
        users = users_file(settings)
        users.users()  # a node whose users cannot be read refuses to start
        context = _Certificate(wanted).context
        self._jobs = JobStore(settings.database_url)
        sessions = Sessions(wanted.session_idle_seconds, wanted.session_maximum_seconds)
        passive = [page.path for page in TABLE if page.passive]
        uploads = [page.path for page in TABLE if page.upload]

        def gate(pages: ASGIApp) -> Gate:
            return Gate(pages, wanted, users, sessions, passive=passive, uploads=uploads)

        node = Node(
            settings=settings,
            store=self._jobs,
            registry=Registry(settings, self._jobs),
            users=users,
            sessions=sessions,
            limits=LoginLimits(),
            explanations=read_explanations(),
            wording=load_wording(settings.site.language, settings.site.templates_dir),
            gate_cookie=cookie_name(wanted),
            secure=context is not None,
            login_key=secrets.token_bytes(_KEY_BYTES),
        )
        self._server = HttpServer(
            build(TABLE, node, gate),
            wanted.address,
            wanted.port,
            idle_seconds=wanted.idle_timeout_seconds,
            maximum_requests=wanted.maximum_requests,
            context=context,
            refused=lambda address, reason: get_logger().info("connection_refused", address=address, reason=reason),
            section="console",
        )

    @property
    def port(self) -> int:
        """The port listened on."""
        return self._server.port

    def run(self, vitals: Vitals | None = None) -> None:
        """Serve until `stop`, and say so."""
        try:
            if vitals is None:
                self._server.run()
            else:
                self._server.run(vitals.ready, vitals.alive)
        finally:
            self._jobs.close()

    def stop(self) -> None:
        """Finish what is under way and end; from any thread."""
        self._server.stop()


def run(settings: Settings) -> int:
    """Serve the console until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: it is off, or port, certificate, users or texts cannot be used.
    """
    configure_logging(settings.log, "console")
    if not settings.console.port:
        raise ConfigurationError("console.port is 0: nothing to listen on")
    vitals = Vitals(settings.state_dir, "console")
    console = Console(settings)
    at_the_end(console.stop)
    get_logger().info("console_listening", address=settings.console.address, port=console.port)
    with vitals:
        console.run(vitals)
    get_logger().info("stopped")
    return 0


class _Certificate:
    """The console's own certificate; a renewed one is shown from the next handshake on."""

    def __init__(self, settings: ConsoleSettings) -> None:
        self._settings = settings
        self._read_at: tuple[int, int] = (0, 0)
        self.context: ssl.SSLContext | None = None
        if settings.certificate_file is not None and settings.key_file is not None:
            self._read_at = self._written_at()
            self.context = browser_context(settings.certificate_file, settings.key_file)
            self.context.sni_callback = self._present

    def _present(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            written_at = self._written_at()
            if written_at != self._read_at and self._settings.certificate_file and self._settings.key_file:
                fresh = browser_context(self._settings.certificate_file, self._settings.key_file)
                fresh.sni_callback = self._present
                self.context, self._read_at = fresh, written_at
        except (ConfigurationError, OSError) as error:
            # in the middle of a renewal: the old one serves on
            get_logger().warning("certificate_unusable", error=type(error).__name__)
        if self.context is not None:
            connection.context = self.context

    def _written_at(self) -> tuple[int, int]:
        files = self._settings.certificate_file, self._settings.key_file
        first, second = (0 if file is None else _written(file) for file in files)
        return first, second


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
