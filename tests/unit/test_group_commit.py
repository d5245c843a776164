"""Commits shared by threads: everyone's rows are there, one's failure is nobody else's, and few commits are made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from osteo_daemon.errors import OsteoError, StoreUnavailable
from osteo_daemon.jobs.engines import sqlite_engine
from osteo_daemon.jobs.group_commit import GroupCommit


class Store:
    """A real database; the first transaction waits until it is told, so that others gather behind it."""

    def __init__(self, path: Path) -> None:
        self.engine = sqlite_engine(f"sqlite:///{path}", 5)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE one (number INTEGER PRIMARY KEY)"))
        self.transactions = 0
        self.go = threading.Event()
        self.gathered = threading.Event()
        self.commits = GroupCommit(self.writing)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with self.engine.execution_options(osteo_writes=True).begin() as connection:
            self.transactions += 1
            yield connection

    def hold(self, connection: Connection) -> None:
        self.gathered.set()
        assert self.go.wait(60)

    def numbers(self) -> set[int]:
        with self.engine.begin() as connection:
            return set(connection.execute(text("SELECT number FROM one")).scalars())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "x.sqlite")
    yield made
    made.engine.dispose()


def add(number: int) -> Callable[[Connection], int]:
    def work(connection: Connection) -> int:
        connection.execute(text("INSERT INTO one VALUES (:number)"), {"number": number})
        return number

    return work


def together(
    store: Store, works: list[Callable[[Connection], Any]], before: Callable[[Connection], None] | None = None
) -> list[Any]:
    """Run works that gather behind a transaction in progress; their results, or their errors."""
    found: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        try:
            found[place] = store.commits.run(works[place])
        except (OsteoError, SQLAlchemyError, ZeroDivisionError) as error:
            found[place] = error

    first = threading.Thread(target=lambda: store.commits.run(before or store.hold))
    first.start()
    assert store.gathered.wait(60)
    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    while len(store.commits._waiting) < len(works):
        assert not store.go.wait(0.01)
    store.go.set()
    for thread in (first, *threads):
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_all_that_wait_share_one_commit(store: Store) -> None:
    assert together(store, [add(number) for number in range(40)]) == list(range(40))
    assert store.numbers() == set(range(40))
    assert store.transactions == 2  # the one that was held, and one for forty


def test_more_than_a_group_holds(store: Store) -> None:
    assert together(store, [add(number) for number in range(150)]) == list(range(150))
    assert store.numbers() == set(range(150))
    assert store.transactions <= 5


def test_one_failure_is_nobody_elses(store: Store) -> None:
    def refused(connection: Connection) -> None:
        connection.execute(text("INSERT INTO one VALUES (1000)"))
        raise StoreUnavailable("the files of this study are being removed")

    found = together(store, [*(add(number) for number in range(10)), refused, add(3)])
    assert isinstance(found[10], StoreUnavailable)
    twice = [place for place in (3, 11) if isinstance(found[place], IntegrityError)]
    assert len(twice) == 1
    assert [found[place] for place in range(10) if place not in twice] == [n for n in range(10) if n not in twice]
    assert store.numbers() == set(range(10))  # nothing of what failed


def test_an_error_of_another_kind_is_heard_by_the_guilty_alone(store: Store) -> None:
    def broken(connection: Connection) -> None:
        connection.execute(text("INSERT INTO one VALUES (1000)"))
        raise ZeroDivisionError

    for guilty in range(4):  # the one that commits for all is among them
        store.go.clear()
        store.gathered.clear()
        works: list[Callable[[Connection], Any]] = [add(10 * guilty + place) for place in range(4)]
        works[guilty] = broken
        found = together(store, works)
        assert isinstance(found.pop(guilty), ZeroDivisionError)
        assert found == [10 * guilty + place for place in range(4) if place != guilty]
    assert store.numbers() == {10 * guilty + place for guilty in range(4) for place in range(4) if place != guilty}


def test_without_database_everyone_hears_it_at_once(store: Store) -> None:
    attempts = []

    @contextmanager
    def locked() -> Iterator[Connection]:
        attempts.append(1)
        raise StoreUnavailable("database is locked")
        yield

    def last(connection: Connection) -> None:
        store.hold(connection)
        store.commits._writing = locked

    found = together(store, [add(number) for number in range(20)], last)
    assert all(isinstance(entry, StoreUnavailable) for entry in found)
    assert len(attempts) == 1  # each wait for the lock may take half a minute
    assert store.numbers() == set()


def test_many_threads_at_once_lose_nothing(store: Store) -> None:
    def send(begin: int) -> None:
        for number in range(begin, begin + 50):
            assert store.commits.run(add(number)) == number

    threads = [threading.Thread(target=send, args=(1000 * sender,)) for sender in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.numbers() == {1000 * sender + number for sender in range(8) for number in range(50)}
    assert store.transactions <= 400
