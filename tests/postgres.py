"""A PostgreSQL server of Debian's package for tests: its own cluster in memory, on loopback, ended with the tests."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine

from osteo_daemon.jobs.store import JobStore

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
USER = "osteo"


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
        """End every other connection, as a restart of the server does."""
        self._execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

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

    def run(*command: str) -> None:
        subprocess.run(
            command,
            check=True,
            cwd=folder,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "TZ": "UTC"},
            stdout=subprocess.DEVNULL,
            timeout=60,
            **as_user,
        )

    data = str(folder / "data")
    run(str(binaries / "initdb"), "-D", data, "-U", USER, "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c max_connections=200"
    try:
        run(str(binaries / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        server = Cluster(port, password)
        try:
            yield server
        finally:
            server.close()
            run(str(binaries / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
