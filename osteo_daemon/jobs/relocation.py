"""The whole job store from SQLite into PostgreSQL: in one transaction there, all of it or nothing, and compared before.

Values go over as SQLite keeps them, so that a document stays the same text; they are compared as the program reads
them, on both sides, so that what decides is what a role will see.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Integer, Table, inspect, select, text
from sqlalchemy.exc import DBAPIError

from osteo_daemon.errors import ConfigurationError, Damaged, StoreUnavailable
from osteo_daemon.jobs.database import revisions
from osteo_daemon.jobs.engines import postgresql_engine, postgresql_says_no, reason_of, sqlite_engine
from osteo_daemon.jobs.schema import Base, UtcDateTime
from osteo_daemon.jobs.store import JobStore

_LOCK_SECONDS = 10.0  # roles are stopped: whoever still holds a lock is not about to let it go
_BATCH = 5000
_VERSION_TABLE = "alembic_version"
_DATA_EXCEPTION = "22"  # SQLSTATE class: a value that its column can't hold
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class Relocation:
    """What was brought over: rows by table, and one SHA-256 over the contents of all (lower-case hexadecimal)."""

    rows: dict[str, int]
    sha256: str


def relocate(source_url: str, target_url: str) -> Relocation:
    """Copy every row of a job store in SQLite into an empty database in PostgreSQL.

    While it runs nothing can write to the source, and nothing of the source is changed. The target gets all rows in one
    transaction, which ends only when both hold the same: a copy that is interrupted leaves an empty store.

    Args:
        source_url: of the job store in SQLite; no role may run on it, for what one wrote later would stay behind.
        target_url: of a PostgreSQL database without tables, or with the empty tables of a job store.

    Raises:
        ConfigurationError: the source has not this version's schema, or the target holds something else or rows.
        Damaged: a value that PostgreSQL can't hold, or the copy is not the same.
        StoreUnavailable: one of the two does not answer, or somebody writes there.
    """
    source = sqlite_engine(source_url, _LOCK_SECONDS).execution_options(osteo_writes=True)
    try:
        with _asking(), source.connect() as there:
            _refuse_other_schema(there)
            _prepare(target_url)
            target = postgresql_engine(target_url, _LOCK_SECONDS)
            try:
                with target.begin() as here:
                    return _copied(there, here)
            finally:
                target.dispose()
    finally:
        source.dispose()


def _copied(source: Connection, target: Connection) -> Relocation:
    tables = Base.metadata.sorted_tables  # a table after those that it refers to
    names = ", ".join(table.name for table in tables)
    target.exec_driver_sql(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
    for table in tables:
        if target.execute(select(table).limit(1)).first() is not None:
            raise ConfigurationError(f"the target holds rows already ({table.name}); give it an empty database")
    rows: dict[str, int] = {}
    whole = hashlib.sha256()
    for table in tables:
        _copy(source, target, table)
        _set_sequence(target, table)
        before, after = _content(source, table), _content(target, table)
        if before != after:
            raise Damaged(f"the copy of table {table.name} is not the same ({before[0]} rows, {after[0]} came over)")
        rows[table.name] = before[0]
        whole.update(f"{table.name} {before[0]} {before[1]}\n".encode())
    return Relocation(rows, whole.hexdigest())


def _refuse_other_schema(source: Connection) -> None:
    found = None
    if inspect(source).has_table(_VERSION_TABLE):
        found = source.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}")).scalar()  # noqa: S608
    if found != revisions()[-1]:
        raise ConfigurationError(
            f"the job store in SQLite has schema {found}, this version's is {revisions()[-1]}: let this version open "
            "it once (osteo schedule), then migrate"
        )


def _prepare(url: str) -> None:
    """The empty tables of this version in the target, unless it holds something else."""
    engine = postgresql_engine(url, _LOCK_SECONDS)
    try:
        with engine.begin() as connection:
            found = set(inspect(connection).get_table_names())
    finally:
        engine.dispose()
    if found and _VERSION_TABLE not in found:
        raise ConfigurationError(f"the target holds other tables ({min(found)}); give it a database of its own")
    JobStore(url, busy_timeout_seconds=_LOCK_SECONDS).close()


def _copy(source: Connection, target: Connection, table: Table) -> None:
    columns = [f'"{column.name}"' for column in table.columns]
    # driver's own values: a document stays the text that it is
    found = source.exec_driver_sql(f'SELECT {", ".join(columns)} FROM "{table.name}"')  # noqa: S608
    fields = [_field(column) for column in table.columns]
    lines = ("\t".join(write(value) for write, value in zip(fields, row, strict=True)) + "\n" for row in found)
    cursor: Any = target.connection.cursor()  # the driver's: COPY is its own
    from pg8000.exceptions import DatabaseError, InterfaceError

    try:
        while batch := "".join(islice(lines, _BATCH)):
            statement = f'COPY "{table.name}" ({", ".join(columns)}) FROM STDIN'
            cursor.execute(statement, stream=BytesIO(batch.encode()))
    except (DatabaseError, InterfaceError) as error:
        answer = error.args[0] if isinstance(error.args[0], dict) else {}
        reason = str(answer.get("M", "the connection was lost"))
        if str(answer.get("C", "")).startswith(_DATA_EXCEPTION):
            raise Damaged(f"table {table.name} has what PostgreSQL can't hold: {reason}") from None
        raise StoreUnavailable(f"the target: {reason}") from None
    finally:
        cursor.close()


def _field(column: Column[Any]) -> Callable[[Any], str]:
    """How a value of SQLite is written for COPY (PostgreSQL manual, "COPY", text format)."""
    moment = isinstance(column.type, UtcDateTime)

    def write(value: Any) -> str:
        if value is None:
            return "\\N"
        if isinstance(value, bytes):
            return "\\\\x" + value.hex()
        written = repr(value) if isinstance(value, float) else str(value)
        return written.translate(_ESCAPES) + "+00" * moment  # a moment in SQLite is UTC and does not say so

    return write


def _set_sequence(target: Connection, table: Table) -> None:
    """The next row that the program adds gets the number after the last one."""
    keys = list(table.primary_key.columns)
    if len(keys) != 1 or not isinstance(keys[0].type, Integer | BigInteger) or keys[0].foreign_keys:
        return
    key = keys[0].name
    target.execute(
        text(
            f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key}'), coalesce(max({key}), 1), "  # noqa: S608
            f"max({key}) IS NOT NULL) FROM {table.name}"
        )
    )


def _content(connection: Connection, table: Table) -> tuple[int, str]:
    """How many rows, and the sum of their digests: the two databases sort text in different orders."""
    count = total = 0
    for row in _rows(connection, table):
        count += 1
        written = json.dumps(list(row), sort_keys=True, default=_canonical).encode("utf-8", "surrogatepass")
        total += int.from_bytes(hashlib.sha256(written).digest())
    return count, f"{total % (1 << 256):064x}"


def _rows(connection: Connection, table: Table) -> Iterator[Sequence[Any]]:
    yield from connection.execute(select(table), execution_options={"yield_per": _BATCH})


def _canonical(value: Any) -> str:
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    return f"{type(value).__name__} {value.isoformat()}"  # dates and times; nothing else is in a row


@contextmanager
def _asking() -> Iterator[None]:
    """Errors of either database become the store's."""
    try:
        yield
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error):
            if getattr(error.orig, "sqlite_errorcode", None) is None:  # the driver's: text that is no UTF-8
                raise Damaged(f"the job store in SQLite: {reason_of(error)}") from None
            raise StoreUnavailable(f"the job store in SQLite: {reason_of(error)}") from error
        if postgresql_says_no(error):
            raise StoreUnavailable(f"the target: {reason_of(error)}") from error
        raise Damaged(f"the target: {reason_of(error)}") from None
