"""The connection to the job store: engine, migrations, transactions.

SQLite is the default: one machine, one file. PostgreSQL serves roles on several machines, through pg8000.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import PoolProxiedConnection

from osteo_daemon.errors import ConfigurationError, StoreUnavailable
from osteo_daemon.jobs.engines import postgresql_engine, postgresql_says_no, reason_of, says_no, sqlite_engine
from osteo_daemon.jobs.group_commit import GroupCommit

T = TypeVar("T")

_MIGRATIONS = Path(__file__).parent / "migrations"
_VERSION_TABLE = "alembic_version"
_SNAPSHOT = {"isolation_level": "REPEATABLE READ"}
_LOCK_STUDY = text("SELECT pg_advisory_xact_lock(hashtextextended(:uid, 0))")


def revisions() -> list[str]:
    """Every schema that this version knows, the oldest first; the last one is its own."""
    return sorted(path.name[:4] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


class Database:
    """One process's connection to the job store.

    Args:
        url: SQLAlchemy URL of SQLite (its file's folder is created) or of PostgreSQL over pg8000.
        busy_timeout_seconds: how long a transaction waits for another process's.

    Raises:
        StoreUnavailable: the store does not answer.
        ConfigurationError: the store was written by a newer version, the server refuses the user or the database, or it
            doesn't write to disk.
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
        self._engine = (sqlite_engine if self._sqlite else postgresql_engine)(url, busy_timeout_seconds)
        # SQLite's writers poll for the lock: threads of one process queue here instead, in order of arrival
        self._write_lock = threading.Lock()
        self._writer = self._engine.execution_options(osteo_writes=True)
        self._kept: PoolProxiedConnection | None = None
        self._commits = GroupCommit(self._writing)
        self._plain_commits = GroupCommit(self._writing_plainly)
        self._reader = self._engine if self._sqlite else self._engine.execution_options(**_SNAPSHOT)
        self._migrate()

    def close(self) -> None:
        """Close every connection of this process."""
        with self._write_lock:
            if self._kept is not None:
                self._kept.close()
                self._kept = None
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
    def _writing_plainly(self) -> Iterator[sqlite3.Connection]:
        """`_writing` of SQLite for statements that are text, over a driver's connection that is kept.

        SQLAlchemy's transaction and its pool cost several times what SQLite does in a small transaction.

        Raises:
            StoreUnavailable: as there.
        """
        with self._write_lock, self._answering():
            kept, self._kept = self._kept or self._engine.raw_connection(), None
            connection = cast(sqlite3.Connection, kept.driver_connection)
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                self._kept = kept
            finally:
                if self._kept is None:  # whatever it was: the pool rolls back, and the next one begins afresh
                    kept.close()

    def _together(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction as `_writing` gives it, on SQLite one with that of other threads.

        Raises:
            StoreUnavailable: nothing of it was written.
        """
        if self._sqlite:
            return self._commits.run(work)
        with self._writing() as connection:  # PostgreSQL commits those that wait with one sync itself
            return work(connection)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and writes nothing."""
        with self._answering(), self._reader.begin() as connection:
            yield connection

    def _alone(self, connection: Connection, study_instance_uid: str) -> None:
        """Until this transaction ends, no other that asks the same of this study runs beside it.

        SQLite has one writer anyway. On PostgreSQL two objects of a new study may arrive at one moment: neither
        transaction sees the other's rows, and there's no row yet to lock.
        """
        if not self._sqlite:
            connection.execute(_LOCK_STUDY, {"uid": study_instance_uid})

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, PoolTimeout) as error:
            raise StoreUnavailable(reason_of(error)) from error
        except DBAPIError as error:
            if (says_no if self._sqlite else postgresql_says_no)(error):
                raise StoreUnavailable(reason_of(error)) from error
            raise
        except sqlite3.DatabaseError as error:  # the driver's own, of `_writing_plainly`
            if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
                raise StoreUnavailable(str(error)) from error
            raise

    def _migrate(self) -> None:
        known = revisions()
        with self._reading() as connection:
            current = None
            if inspect(connection).has_table(_VERSION_TABLE):
                current = connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}")).scalar()  # noqa: S608
        if current == known[-1]:
            return
        if current is not None and current not in known:
            raise ConfigurationError(
                f"the job store has schema {current}, which this version does not know; update first"
            )
        # hardly ever needed, and a fifth of what a role imports otherwise
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._writing() as connection:
            if not self._sqlite:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7237118)")
            # several roles start at once: whoever waited for the lock finds the work done
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
