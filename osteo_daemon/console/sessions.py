"""Sessions of logged-in people, in the memory of the console's one process: a restart logs everybody out."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from osteo_daemon.console.users import User

_PER_USER = 8
_MOST = 1000
_TOKEN_BYTES = 32


@dataclass(slots=True)
class Session:
    """One browser of one person.

    Attributes:
        user: name of the person.
        changed_at: `User.changed_at` at the login.
        csrf: what every form of this session carries.
        began, seen: of the clock: the login, and the last sign of the person.
        notices: lines that the next page shows.
    """

    user: str
    changed_at: str
    csrf: str
    began: float
    seen: float
    notices: list[tuple[str, str]] = field(default_factory=list)


class Sessions:
    """All sessions; several threads may use them at once.

    Args:
        idle_seconds: without a sign of the person, a session ends.
        maximum_seconds: it ends however busy the person is.
        clock: of monotonic seconds.
    """

    def __init__(
        self, idle_seconds: float, maximum_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._idle = idle_seconds
        self._maximum = maximum_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}

    def begin(self, user: User) -> str:
        """A new session for a person who has logged in; returns its token, which is kept nowhere here."""
        token, now = secrets.token_urlsafe(_TOKEN_BYTES), self._clock()
        with self._lock:
            self._open = {key: session for key, session in self._open.items() if self._lives(session, now)}
            own = [key for key, session in self._open.items() if session.user == user.name]
            # oldest first: dictionaries keep their order
            for key in [*_first(own, len(own) - _PER_USER + 1), *_first(list(self._open), len(self._open) - _MOST + 1)]:
                self._open.pop(key, None)
            self._open[_key(token)] = Session(user.name, user.changed_at, secrets.token_urlsafe(_TOKEN_BYTES), now, now)
        return token

    def find(self, token: str, *, by_person: bool) -> Session | None:
        """The session of a token; None when there is none or it has ended.

        Args:
            by_person: False for what a page fetches by itself: it keeps no session alive.
        """
        key, now = _key(token), self._clock()
        with self._lock:
            session = self._open.get(key)
            if session is not None and not self._lives(session, now):
                del self._open[key]
                session = None
            if session is not None and by_person:
                session.seen = now
        return session

    def end(self, token: str) -> None:
        """Log out."""
        with self._lock:
            self._open.pop(_key(token), None)

    def _lives(self, session: Session, now: float) -> bool:
        return now - session.seen <= self._idle and now - session.began <= self._maximum


def _first(keys: list[str], count: int) -> list[str]:
    return keys[: max(count, 0)]


def _key(token: str) -> str:
    # whoever reads this process's memory dump or a heap of it finds no token to use
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
