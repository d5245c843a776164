"""One commit for all who wait: the disk is synced once, and each hears only after it.

Who comes while nobody commits does it for everyone who waits, at once and in its own thread: a lone sender pays for no
other thread. Who comes during a commit waits for the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

C = TypeVar("C")
"""What a transaction gives to those who write in it."""

T = TypeVar("T")

_LARGEST_GROUP = 64


class _Waiting(Generic[C]):
    """One piece of work, and what became of it."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[C], Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None


class GroupCommit(Generic[C]):
    """Runs pieces of work of many threads in few transactions.

    Args:
        writing: a transaction, durable when its block ends.
    """

    def __init__(self, writing: Callable[[], AbstractContextManager[C]]) -> None:
        self._writing = writing
        self._condition = threading.Condition()
        self._waiting: list[_Waiting[C]] = []
        self._committing = False

    def run(self, work: Callable[[C], T]) -> T:
        """Run ``work`` in a transaction, maybe with that of others; returns when it is committed.

        When a group fails, each piece of work runs again in a transaction of its own: nobody fails for another's,
        whatever the error is.

        Raises:
            StoreUnavailable: nothing of this work was written.
            Exception: what ``work`` raised; nothing of it was written.
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
                # this thread was interrupted: the others commit for themselves
                self._waiting[:0] = [entry for entry in group if not entry.done and entry is not own]
                self._condition.notify_all()
        return cast(T, self._outcome(own))

    def _commit(self, group: list[_Waiting[C]]) -> None:
        if len(group) > 1 and self._commit_together(group):
            return
        for entry in group:
            try:
                with self._writing() as connection:
                    entry.result = entry.work(connection)
            except Exception as error:  # noqa: BLE001
                # not swallowed: the thread whose work it is raises it
                entry.error = error
            entry.done = True

    def _commit_together(self, group: list[_Waiting[C]]) -> bool:
        """False when one of them failed: nothing was written, and all of them are still to be done."""
        working = False
        try:
            with self._writing() as connection:
                working = True
                for entry in group:
                    entry.result = entry.work(connection)
                working = False
        except Exception as error:  # noqa: BLE001
            if working:
                return False
            for entry in group:  # no begin or no commit: alone it would go no better
                entry.error = error
        for entry in group:
            entry.done = True
        return True

    @staticmethod
    def _outcome(entry: _Waiting[C]) -> Any:
        if entry.error is not None:
            raise entry.error
        return entry.result
