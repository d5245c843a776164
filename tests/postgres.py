"""A PostgreSQL server of Debian's package for tests: its own cluster in memory, on loopback, ended with the tests."""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from osteo_daemon.jobs.store import JobStore

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
USER = "osteo"
_ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/bin:/bin", "TZ": "UTC"}


def programs() -> Path | None:
    """The folder of initdb and pg_ctl of the newest version installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Cluster:
    """A running server. ``new()`` gives the URL of an empty job store in a database of its own."""

    def __init__(self, port: int, password: str) -> None:
        self.port = port
        self.password = password
        self._serial = 0
        self._admin: Engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        self._execute("CREATE DATABASE template_osteo")
        JobStore(self.url("template_osteo")).close()

    def url(self, database: str) -> str:
        """SQLAlchemy URL of one database."""
        return f"postgresql+pg8000://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def new(self, *, migrated: bool = True) -> str:
        """A fresh database, with the tables of the job store unless ``migrated`` is False."""
        self._serial += 1
        name = f"osteo_{self._serial}"
        self._execute(f"CREATE DATABASE {name}" + (" TEMPLATE template_osteo" if migrated else ""))
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected."""
        self._execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def end_connections(self) -> None:
        """End every other connection, as a restart of the server does; returns when they are gone.

        The server only sends a signal to each: on a busy machine a connection may serve one more statement.
        """
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        deadline = time.monotonic() + 60
        with self._admin.connect() as connection:
            ended = set(connection.exec_driver_sql(f"SELECT pid, pg_terminate_backend(pid) {others}").scalars())
            while ended & set(connection.exec_driver_sql(f"SELECT pid {others}").scalars()):
                assert time.monotonic() < deadline, "connections that the server ended are still there"
                time.sleep(0.01)

    def close(self) -> None:
        """Close the administrator's connection."""
        self._admin.dispose()

    def _execute(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def cluster(port: int, parent: Path | None = None) -> Iterator[Cluster]:
    """Start a server on a loopback port; the caller has made sure that `programs` finds one.

    Its files lie in memory, or below ``parent``.
    """
    binaries = programs()
    assert binaries is not None
    folder = Path(
        tempfile.mkdtemp(prefix="osteo-pg-", dir=parent or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    )
    # initdb refuses root; Debian's package has made a user for it
    account = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    os.chown(folder, account.pw_uid, account.pw_gid)
    password = secrets.token_hex(8)
    (folder / "password").write_text(password)
    os.chown(folder / "password", account.pw_uid, account.pw_gid)
    as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}

    data = str(folder / "data")
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8"],
        check=True,
        cwd=folder,
        env=_ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        timeout=120,
        **as_user,
    )
    server = subprocess.Popen(
        [
            str(binaries / "postgres"),
            *("-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"),
            *("-c", f"unix_socket_directories={folder}"),
        ],
        cwd=folder,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at the tests is not for it
        preexec_fn=_die_with_the_tests,
        **as_user,
    )
    try:
        _await(port, password, server)
        databases = Cluster(port, password)
        try:
            yield databases
        finally:
            databases.close()
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_the_tests() -> None:
    # PR_SET_PDEATHSIG: tests that are killed leave no server behind
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT, 0, 0, 0)


def _await(port: int, password: str, server: subprocess.Popen[bytes]) -> None:
    """Until it lets somebody in: it listens a moment earlier."""
    engine = create_engine(f"postgresql+pg8000://{USER}:{password}@127.0.0.1:{port}/postgres", poolclass=NullPool)
    deadline = time.monotonic() + 60
    while True:
        try:
            engine.connect().close()
        except DBAPIError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the PostgreSQL server did not start") from None
            time.sleep(0.05)
        else:
            return
