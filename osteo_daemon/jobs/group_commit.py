"""One commit for all who wait: the disk is synced once, and each hears only after it.

Who comes while nobody commits does it for everyone who waits, at once and in its own thread: a lone sender pays for no
other thread. Who comes during a commit waits for the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from osteo_daemon.errors import OsteoError

T = TypeVar("T")

_LARGEST_GROUP = 64


class _Waiting:
    """One piece of work, and what became of it."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[Connection], Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None


class GroupCommit:
    """Runs pieces of work of many threads in few transactions.

    Args:
        writing: a transaction, durable when its block ends.
    """

    def __init__(self, writing: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._writing = writing
        self._condition = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._committing = False

    def run(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction, maybe with that of others; returns when it is committed.

        When a group fails, each piece of work runs again in a transaction of its own: nobody fails for another's.

        Raises:
            StoreUnavailable: nothing of this work was written.
        """
        own = _Waiting(work)
        with self._condition:
            self._waiting.append(own)
            while self._committing and not own.done:
                self._condition.wait()
            if own.done:
                return cast(T, self._outcome(own))
            self._committing = True
            group, self._waiting = self._waiting[:_LARGEST_GROUP], self._waiting[_LARGEST_GROUP:]
            if own not in group:  # more waited than fit
                self._waiting.remove(own)
                group.append(own)
        try:
            self._commit(group)
        finally:
            with self._condition:
                self._committing = False
                # after an error of another kind the others commit for themselves
                self._waiting[:0] = [entry for entry in group if not entry.done and entry is not own]
                self._condition.notify_all()
        return cast(T, self._outcome(own))

    def _commit(self, group: list[_Waiting]) -> None:
        if len(group) > 1:
            failed: _Waiting | None = None
            try:
                with self._writing() as connection:
                    for entry in group:
                        failed = entry
                        entry.result = entry.work(connection)
                    failed = None
            except (OsteoError, SQLAlchemyError) as error:
                if failed is None:  # no begin or no commit: alone it would go no better
                    for entry in group:
                        entry.error = error
            if failed is None:
                for entry in group:
                    entry.done = True
                return
        for entry in group:
            try:
                with self._writing() as connection:
                    entry.result = entry.work(connection)
            except (OsteoError, SQLAlchemyError) as error:
                entry.error = error
            entry.done = True

    @staticmethod
    def _outcome(entry: _Waiting) -> Any:
        if entry.error is not None:
            raise entry.error
        return entry.result
