"""Another thread for the time of one system call: two waits for the disk become one.

An executor's futures cost more than is saved here: a queue of the interpreter's own hands work over and back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

_KEPT = 16


class Beside:
    """Threads that wait for work; several threads may use them at once, and no one waits for another's."""

    def __init__(self) -> None:
        self._idle: list[_Helper] = []
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, work: Callable[[], None]) -> Iterator[None]:
        """Do ``work`` while the block runs; both have ended when this has.

        Raises:
            Exception: what ``work`` raised, when the block raised nothing.
        """
        with self._lock:
            helper = self._idle.pop() if self._idle else _Helper()
        helper.asked.put(work)
        try:
            yield
        finally:
            error = helper.answered.get()
            with self._lock:
                if len(self._idle) < _KEPT:
                    self._idle.append(helper)
                else:
                    helper.asked.put(None)
        if error is not None:
            raise error


class _Helper:
    def __init__(self) -> None:
        self.asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.answered: SimpleQueue[Exception | None] = SimpleQueue()
        # a daemon: while it is idle, nothing is lost with it
        threading.Thread(target=self._run, name="beside", daemon=True).start()

    def _run(self) -> None:
        while (work := self.asked.get()) is not None:
            error: Exception | None = None
            try:
                work()
            except Exception as raised:  # noqa: BLE001
                # not swallowed: the thread that asked for the work raises it
                error = raised
            self.answered.put(error)
