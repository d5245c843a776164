"""Statements that a PostgreSQL connection prepares once: asked once a call, bounded in number, errors as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from osteo_daemon.jobs.engines import postgresql_engine
from osteo_daemon.jobs.prepared import PreparingConnection
from tests.postgres import Cluster


@pytest.fixture
def engine(postgres: Cluster) -> Iterator[Engine]:
    made = postgresql_engine(postgres.new(), 5.0)
    yield made
    made.dispose()


def test_a_statement_is_asked_once_and_told_once(engine: Engine) -> None:
    flushes: list[int] = []
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, PreparingConnection)
        original = driver.handle_messages
        driver.handle_messages = lambda context: (flushes.append(1), original(context))[1]
        one_more = text("SELECT CAST(:n AS INTEGER) + 1")
        assert connection.execute(one_more, {"n": 0}).scalar_one() == 1
        for number in range(1, 5):
            before = len(flushes)
            assert connection.execute(one_more, {"n": number}).scalar_one() == number + 1
            assert len(flushes) - before == 1
        (kept,) = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT CAST($1 AS INTEGER) + 1'"
        ).one()
        assert kept == 1


def test_no_connection_remembers_more_than_its_share(engine: Engine) -> None:
    with engine.connect() as connection:
        for number in range(450):
            found = connection.execute(text(f"SELECT {number} + CAST(:n AS INTEGER)"), {"n": 1}).scalar_one()
            assert found == number + 1
        # the first was forgotten long ago and is made again
        assert connection.execute(text("SELECT 0 + CAST(:n AS INTEGER)"), {"n": 1}).scalar_one() == 1
        (kept,) = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").one()
        assert kept == 200


def test_errors_are_told_apart_and_the_next_call_works(engine: Engine) -> None:
    add = text("INSERT INTO sources (source_ae, turn) VALUES (CAST(:name AS VARCHAR), 0)")
    with engine.begin() as connection:
        connection.execute(add, {"name": "CT1"})
    for _ in range(2):
        with pytest.raises(IntegrityError), engine.begin() as connection:
            connection.execute(add, {"name": "CT1"})
        with pytest.raises(ProgrammingError), engine.begin() as connection:
            connection.execute(text("SELECT nothing FROM nowhere WHERE x = :x"), {"x": 1})
    with engine.begin() as connection:
        connection.execute(add, {"name": "CT2"})
        assert connection.exec_driver_sql("SELECT count(*) FROM sources").scalar_one() == 2


def test_plans_are_made_for_the_values_of_each_call(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW plan_cache_mode").scalar_one() == "force_custom_plan"
