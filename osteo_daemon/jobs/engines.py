"""Engines of the two databases: how a commit is made durable, how long to wait, and which errors may pass."""

from __future__ import annotations

import select
import time
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError, DisconnectionError, InterfaceError
from sqlalchemy.pool import ConnectionPoolEntry

from osteo_daemon.errors import ConfigurationError

_WAL_ATTEMPTS = 50
_TIMESTAMPTZ = 1184  # the type's number in every PostgreSQL; its text is ISO 8601 with an offset

# SQLSTATE classes (PostgreSQL manual, appendix A) after which the same transaction may succeed: connection exceptions,
# rollbacks by deadlock, want of resources, a lock not to be had, an operator's intervention, errors of the system
_MAY_PASS = ("08", "40", "53", "55P03", "57", "58")
_NEVER_PASS = {
    "28": "the PostgreSQL server refuses this user or password; see [store]",
    "3D": "the PostgreSQL database of [store] url does not exist; create it",
    "42501": "the PostgreSQL user of [store] url may not create tables; give it a schema or database of its own",
}


def sqlite_engine(url: str, busy_timeout_seconds: float) -> Engine:
    """SQLite with a write-ahead log that is synced at every commit."""
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


def postgresql_engine(url: str, busy_timeout_seconds: float) -> Engine:
    """PostgreSQL whose commits return when they are on disk, and where no lock is awaited for ever."""
    # parameters hold UIDs and paths: they stay out of the texts of errors
    try:
        engine = create_engine(url, pool_size=8, max_overflow=64, hide_parameters=True)
        from osteo_daemon.jobs.prepared import PreparingConnection
    except ModuleNotFoundError as error:
        raise ConfigurationError("[store] url needs pg8000: pip install osteo-daemon[postgresql]") from error

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: ConnectionPoolEntry, args: Any, kwargs: Any) -> Any:
        return PreparingConnection(*args, **kwargs)

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: ConnectionPoolEntry) -> None:
        # the driver's own reader of times takes a third of what a list takes
        connection.register_in_adapter(_TIMESTAMPTZ, datetime.fromisoformat)
        cursor = connection.cursor()
        cursor.execute(f"SET lock_timeout = {round(busy_timeout_seconds * 1000)}")
        # a stronger setting of the server (remote_apply) stays
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        cursor.execute("SHOW fsync")
        (syncs,) = cursor.fetchone()
        connection.commit()
        if syncs != "on":
            raise ConfigurationError("the PostgreSQL server runs with fsync = off: set it on, or use SQLite")

    @event.listens_for(engine, "checkout")
    def _is_open(connection: Any, _record: ConnectionPoolEntry, _proxy: Any) -> None:
        # nothing was asked: what can be read is the server's farewell. A ping would cost as much as two statements
        waiting = select.poll()
        waiting.register(connection._usock, select.POLLIN)
        if waiting.poll(0):
            raise DisconnectionError("the server has ended the connection")

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


def says_no(error: DBAPIError) -> bool:
    """SQLite cannot, whatever is asked: the file is no database, or malformed (the base class itself)."""
    return type(error) is DatabaseError


def postgresql_says_no(error: DBAPIError) -> bool:
    """PostgreSQL cannot now: gone, busy, full or shutting down; False for errors of what was asked.

    Raises:
        ConfigurationError: it will not until somebody changes something.
    """
    code = _sqlstate(error)
    for prefix, message in _NEVER_PASS.items():
        if code.startswith(prefix):
            raise ConfigurationError(message) from None
    return code.startswith(_MAY_PASS) or isinstance(error, InterfaceError) or error.connection_invalidated


def reason_of(error: Exception) -> str:
    """The driver's own words, without SQLAlchemy's quotation of statement and parameters."""
    if not isinstance(error, DBAPIError):
        return type(error).__name__
    answer = error.orig.args[0] if error.orig is not None and error.orig.args else error.orig
    # pg8000 hands over the fields of the server's answer: M is the message
    return str(answer.get("M", "no reason given")) if isinstance(answer, dict) else str(answer)


def _sqlstate(error: DBAPIError) -> str:
    answer = error.orig.args[0] if error.orig is not None and error.orig.args else None
    return str(answer.get("C", "")) if isinstance(answer, dict) else ""
