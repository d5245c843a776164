"""The job store from SQLite to PostgreSQL: every table, all or nothing, and the node goes on."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import JSON, Boolean, Date, Enum, Float, Integer, LargeBinary, Table, create_engine, insert, select

from osteo_daemon.commands.store import store as store_commands
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import ConfigurationError, Damaged, OsteoError, StoreUnavailable
from osteo_daemon.jobs.relocation import relocate
from osteo_daemon.jobs.schema import Base, UtcDateTime
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.vitals import Vitals, running_roles
from tests.conftest import ROOT
from tests.postgres import Cluster
from tests.stores import new_sqlite
from tests.unit.test_jobs_store import instance

TABLES = Base.metadata.sorted_tables
AWKWARD = "\\ \t\r\n'\" ü \u2028 \U0001f9b4 \\N \\."
START = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)


def value_of(table: Table, name: str, number: int) -> Any:
    """A value that its column can hold, other ones in other rows; every second row has NULL where it may."""
    column = table.columns[name]
    for key in column.foreign_keys:
        return value_of(key.column.table, key.column.name, number)
    if column.nullable and number % 2 and not column.primary_key:
        return None
    kind = column.type
    if isinstance(kind, UtcDateTime):
        return START + timedelta(days=number, microseconds=number % 2 * 876544)
    if isinstance(kind, Enum):
        members: list[StrEnum] = list(kind.enum_class or ())
        return members[number % len(members)]
    if isinstance(kind, JSON):
        return {"z": [1.0, 1e-300, None, True], "a": AWKWARD, "n": number}
    if isinstance(kind, Boolean):
        return bool(number % 2)
    if isinstance(kind, Date):
        return date(2026, 1, 1) + timedelta(days=number)
    if isinstance(kind, Float):
        return 0.1 + number
    if isinstance(kind, Integer):
        return number + 7
    if isinstance(kind, LargeBinary):
        return bytes(range(256)) + b"%d" % number
    length = getattr(kind, "length", None)
    text = f"{number}{AWKWARD}"
    return text if length is None else text[:length]


def fill(url: str, rows: int = 3) -> None:
    """Rows in every table of the schema."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for table in TABLES:
            for number in range(rows):
                values = {column.name: value_of(table, column.name, number) for column in table.columns}
                connection.execute(insert(table).values(values))
    engine.dispose()


def contents(url: str) -> dict[str, list[str]]:
    """Every row of every table, as the program reads it."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {table.name: sorted(map(repr, connection.execute(select(table)))) for table in TABLES}
    engine.dispose()
    return found


@pytest.fixture
def source(tmp_path: Path) -> str:
    new_sqlite(tmp_path).close()
    return f"sqlite:///{tmp_path / 'jobs.sqlite'}"


def test_every_table_comes_over_as_it_is_and_the_source_stays(postgres: Cluster, source: str) -> None:
    fill(source)
    before, target = contents(source), postgres.new()
    done = relocate(source, target)
    assert contents(target) == contents(source) == before
    assert done.rows == {table.name: 3 for table in TABLES}
    # the texts of documents are the same ones, not only their meaning
    engine = create_engine(target)
    with engine.connect() as connection, closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as plain:
        there = sorted(connection.exec_driver_sql("SELECT document::text FROM results").scalars())
        assert there == sorted(row[0] for row in plain.execute("SELECT document FROM results"))
    engine.dispose()
    # what it said of the contents is not said of others
    empty = Path(source.removeprefix("sqlite:///")).parent / "empty"
    new_sqlite(empty).close()
    assert relocate(f"sqlite:///{empty / 'jobs.sqlite'}", postgres.new()).sha256 != done.sha256


def test_every_sequence_goes_on_after_the_last_number(postgres: Cluster, source: str) -> None:
    fill(source)
    target = postgres.new(migrated=False)  # the tables are made, too
    relocate(source, target)
    engine = create_engine(target)
    numbered = 0
    with engine.connect() as connection:
        for table in TABLES:
            keys = list(table.primary_key.columns)
            if len(keys) == 1 and isinstance(keys[0].type, Integer) and not keys[0].foreign_keys:
                sequence = f"SELECT nextval(pg_get_serial_sequence('{table.name}', '{keys[0].name}'))"
                assert connection.exec_driver_sql(sequence).scalar_one() == 10, table.name
                numbered += 1
    engine.dispose()
    assert numbered >= 8


def test_a_node_goes_on_where_it_was(postgres: Cluster, source: str) -> None:
    with closing(JobStore(source)) as before:
        before.record_instance(instance(1), "CT1")
    target = postgres.new()
    relocate(source, target)
    with closing(JobStore(target)) as after:
        study = instance(1).study_instance_uid
        after.record_instance(instance(2), "CT1")
        assert after.counts_by_state()[JobState.RECEIVING] == 1
        job = after.job(study)
        assert job is not None
        assert len(after.instances(job)) == 2


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("INSERT INTO sources (source_ae, turn) VALUES ('CT1', 0)", "holds rows already"),
        ("UPDATE alembic_version SET version_num = '9999'", "does not know"),
        ("DROP TABLE alembic_version", "holds other tables"),
    ],
)
def test_a_target_that_is_in_use_is_refused(postgres: Cluster, source: str, statement: str, message: str) -> None:
    fill(source)
    target = postgres.new()
    engine = create_engine(target)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    before = contents(target)
    with pytest.raises(ConfigurationError, match=message):
        relocate(source, target)
    assert contents(target) == before
    engine.dispose()


def test_a_target_that_is_none_is_refused(postgres: Cluster, source: str) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        relocate(source, postgres.url("nowhere"))


def test_a_source_of_another_version_or_with_a_writer_is_refused(postgres: Cluster, source: str) -> None:
    target = postgres.new(migrated=False)
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"), isolation_level=None)) as plain:
        plain.execute("UPDATE alembic_version SET version_num = '0001'")
        with pytest.raises(ConfigurationError, match="schema 0001"):
            relocate(source, target)
    engine = create_engine(target)
    with engine.connect() as connection:
        assert not list(connection.exec_driver_sql("SELECT 1 FROM pg_tables WHERE schemaname = 'public'"))
    engine.dispose()


@pytest.mark.parametrize(
    ("value", "message"),
    [("x" * 65, "value too long"), ("a\0b", "invalid byte sequence"), (b"\xff\xfe", "UTF-8")],
)
def test_a_value_that_cannot_be_held_is_told_and_nothing_stays(
    postgres: Cluster, source: str, value: str | bytes, message: str
) -> None:
    fill(source)
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as plain, plain:
        change = "UPDATE instances SET transfer_syntax_uid = CAST(? AS TEXT) WHERE rowid = 2"
        plain.execute(change, (value,))
    target = postgres.new()
    with pytest.raises(Damaged, match=message):
        relocate(source, target)
    assert not any(contents(target).values())


def test_killed_in_the_middle_nothing_is_there_and_the_next_one_brings_all(postgres: Cluster, source: str) -> None:
    fill(source)
    target = postgres.new()
    engine = create_engine(target, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3600); RETURN NEW; END'"
        )
        last = TABLES[-1].name
        connection.exec_driver_sql(f"CREATE TRIGGER wait BEFORE INSERT ON {last} FOR EACH ROW EXECUTE FUNCTION wait()")
        program = "import sys; from osteo_daemon.jobs.relocation import relocate; relocate(*sys.argv[1:])"
        copying = subprocess.Popen([sys.executable, "-c", program, source, target], cwd=ROOT)
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        deadline = time.monotonic() + 120
        while connection.exec_driver_sql(sleeping).scalar_one() == 0:
            assert copying.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # the source is held still meanwhile
        with (
            closing(sqlite3.connect(source.removeprefix("sqlite:///"), timeout=0)) as plain,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            plain.execute("DELETE FROM events")
        copying.kill()
        assert copying.wait() == -signal.SIGKILL
        # a server that is busy with a statement learns later that its client is gone
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        connection.exec_driver_sql(end + " AND datname = current_database()")
        connection.exec_driver_sql(f"DROP TRIGGER wait ON {last}")  # waits for the lock of the one that ends
    engine.dispose()
    assert not any(contents(target).values())
    relocate(source, target)
    assert contents(target) == contents(source)


def command(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    """Run the command with the target's password where it belongs."""
    (folder / "osteo.toml").write_text(f'state_dir = "{folder}"\n')
    place, _, rest = url.rpartition("@")
    monkeypatch.setenv("OSTEO_STORE__PASSWORD", place.rpartition(":")[2])
    arguments = ["migrate", "--config", str(folder / "osteo.toml"), "--to", f"postgresql://osteo@{rest}", "--json"]
    result = CliRunner().invoke(store_commands, arguments)
    return result.exit_code, result.exception or json.loads(result.stdout)


def test_the_command_waits_for_a_node_that_has_stopped(
    postgres: Cluster, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source)
    target = postgres.new()
    with Vitals(tmp_path, "receiver"):
        assert running_roles(tmp_path) == ["receiver"]
        status, said = command(tmp_path, target, monkeypatch)
        assert status == 1
        assert isinstance(said, ConfigurationError)
        assert "receiver" in str(said)
    assert running_roles(tmp_path) == []
    status, said = command(tmp_path, target, monkeypatch)
    assert status == 0, said
    assert said["rows"]["studies"] == 3
    status, said = command(tmp_path, target, monkeypatch)
    assert isinstance(said, ConfigurationError)
    assert "holds rows" in str(said)


def test_a_password_in_the_url_is_refused_and_not_quoted(source: str, tmp_path: Path) -> None:
    arguments = ["migrate", "--to", "postgresql://osteo:geheim@db/osteo"]
    result = CliRunner(env={"OSTEO_STATE_DIR": str(tmp_path)}).invoke(store_commands, arguments)
    assert isinstance(result.exception, ConfigurationError)
    assert "no password" in str(result.exception)
    assert "geheim" not in str(result.exception)


def test_a_server_that_is_away_may_come_back(source: str, free_port: Any) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        relocate(source, f"postgresql+pg8000://osteo:secret@127.0.0.1:{free_port()}/osteo")
    assert isinstance(caught.value, OsteoError)
    assert "secret" not in str(caught.value)
