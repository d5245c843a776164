"""The connection to the job store: engine, migrations, transactions. The only place that knows the dialect."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from osteo_daemon.errors import ConfigurationError, StoreUnavailable

_MIGRATIONS = Path(__file__).parent / "migrations"
_WAL_ATTEMPTS = 50


class Database:
    """One process's connection to the job store.

    Args:
        url: SQLAlchemy URL; a SQLite file's folder is created.
        busy_timeout_seconds: how long a transaction waits for another process's.

    Raises:
        StoreUnavailable: the store does not answer.
        ConfigurationError: the store was written by a newer version.
    """

    def __init__(self, url: str, *, busy_timeout_seconds: float = 30.0) -> None:
        self._sqlite = make_url(url).get_backend_name() == "sqlite"
        if self._sqlite and (path := make_url(url).database):
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(
                    f"state_dir {Path(path).parent} cannot be made ({error.strerror}); set another folder"
                ) from error
        self._engine = _sqlite_engine(url, busy_timeout_seconds) if self._sqlite else create_engine(url)
        # SQLite's writers poll for the lock: threads of one process queue here instead, in order of arrival
        self._write_lock = threading.Lock()
        self._writer = self._engine.execution_options(osteo_writes=True)
        self._migrate()

    def close(self) -> None:
        """Close every connection of this process."""
        self._engine.dispose()

    def check(self) -> None:
        """Prove that the store can be written.

        Raises:
            StoreUnavailable: it cannot.
        """
        with self._writing() as connection:
            connection.exec_driver_sql("CREATE TABLE osteo_check (one INTEGER)")
            connection.exec_driver_sql("DROP TABLE osteo_check")

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its first statement and is durable when the block ends.

        Raises:
            StoreUnavailable: locked for too long, disk full, connection lost: nothing was written.
        """
        lock = self._write_lock if self._sqlite else threading.Lock()
        with lock, self._answering(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and writes nothing."""
        with self._answering(), self._engine.begin() as connection:
            yield connection

    @staticmethod
    @contextmanager
    def _answering() -> Iterator[None]:
        try:
            yield
        except (OperationalError, PoolTimeout) as error:
            raise StoreUnavailable(_reason(error)) from error
        except DatabaseError as error:
            if _is_damage(error):
                raise StoreUnavailable(_reason(error)) from error
            raise

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        script = ScriptDirectory.from_config(config)
        with self._reading() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current == script.get_current_head():
            return
        if current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
            raise ConfigurationError(
                f"the job store has schema {current}, which this version does not know; update first"
            )
        with self._writing() as connection:
            if not self._sqlite:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7237118)")
            # several roles start at once: whoever waited for the lock finds the work done
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _sqlite_engine(url: str, busy_timeout_seconds: float) -> Engine:
    engine = create_engine(url, connect_args={"timeout": busy_timeout_seconds}, pool_size=8, max_overflow=64)

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: ConnectionPoolEntry) -> None:
        # the driver's own transaction control is off: BEGIN is written below
        connection.isolation_level = None
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")  # a commit returns only when the WAL is on disk
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # a deferred transaction that turns into a writer fails at once when another wrote meanwhile
        writes = connection.get_execution_options().get("osteo_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: Any) -> None:
    # changing the journal mode does not wait for the busy timeout when several processes open a new file at once
    for attempt in range(_WAL_ATTEMPTS):
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except connection_error(connection):
            if attempt == _WAL_ATTEMPTS - 1:
                raise
            time.sleep(0.05)
            continue
        if mode == "wal":
            return
        raise ConfigurationError(f"the job store's file system does not support WAL (journal mode {mode})")


def connection_error(connection: Any) -> type[Exception]:
    """The driver's class for "cannot now"."""
    kind: type[Exception] = connection.OperationalError
    return kind


def _is_damage(error: DatabaseError) -> bool:
    # "file is not a database", "database disk image is malformed": the base class itself, not a programming error
    return isinstance(error, DBAPIError) and type(error) is DatabaseError


def _reason(error: Exception) -> str:
    # the driver's own words, without SQLAlchemy's quotation of statement and parameters
    return str(error.orig) if isinstance(error, DBAPIError) else type(error).__name__
