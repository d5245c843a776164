"""What one sender may take: associations at a time, and bytes in any sixty minutes, by AE title and by address.

Over it a sender is refused for the time being; what was acknowledged is not touched. Counted in this process alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from osteo_daemon.errors import QuotaExceeded
from osteo_daemon.settings import QuotaSettings, SourceSettings

_BUCKET_SECONDS: Final = 60.0
_BUCKETS: Final = 60
_SWEEP_KEYS: Final = 1024

_Key = tuple[str, str]
_AE_TITLE: Final = "AE title"
_ADDRESS: Final = "address"


@dataclass(frozen=True, slots=True)
class _Holder:
    keys: tuple[_Key, _Key]
    alive: Callable[[], bool]


class Quota:
    """The counts of one receiver process.

    Args:
        settings: general limits; 0: none.
        sources: whose own limits come before the general ones.
        maximum_associations: of all senders together.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: QuotaSettings,
        sources: Sequence[SourceSettings],
        maximum_associations: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._maximum = maximum_associations
        self._associations = {
            _AE_TITLE: settings.associations_per_ae_title,
            _ADDRESS: settings.associations_per_address,
        }
        self._bytes = {
            _AE_TITLE: settings.bytes_per_hour_per_ae_title,
            _ADDRESS: settings.bytes_per_hour_per_address,
        }
        self._own_associations = {
            (_AE_TITLE, entry.ae_title): entry.maximum_associations for entry in sources if entry.maximum_associations
        }
        self._own_bytes = {
            (_AE_TITLE, entry.ae_title): entry.bytes_per_hour for entry in sources if entry.bytes_per_hour
        }
        self._clock = clock
        self._lock = threading.Lock()
        self._holders: dict[Hashable, _Holder] = {}
        self._hours: dict[_Key, _Hour] = {}

    def admit(self, association: Hashable, ae_title: str, address: str, alive: Callable[[], bool]) -> str:
        """Count an association in, until `release` or until it is no longer ``alive``.

        Returns:
            Why it may not be for now; empty when it is counted.
        """
        keys = _keys(ae_title, address)
        with self._lock:
            self._holders = {key: holder for key, holder in self._holders.items() if holder.alive()}
            if len(self._holders) >= self._maximum:
                return "too many associations"
            counts = Counter(key for holder in self._holders.values() for key in holder.keys)
            for key in keys:
                limit = self._own_associations.get(key, self._associations[key[0]])
                if limit and counts[key] >= limit:
                    return f"too many associations of one {key[0]}"
            if over := self._over(keys):
                return over
            self._holders[association] = _Holder(keys, alive)
        return ""

    def release(self, association: Hashable) -> None:
        """An association has ended."""
        with self._lock:
            self._holders.pop(association, None)

    def check(self, ae_title: str, address: str) -> None:
        """Ask before the bytes are taken.

        Raises:
            QuotaExceeded: a limit is reached.
        """
        with self._lock:
            if over := self._over(_keys(ae_title, address)):
                raise QuotaExceeded(over)

    def charge(self, ae_title: str, address: str, count: int) -> None:
        """Count ``count`` bytes before they are stored. The last object that begins below a limit may pass it.

        Raises:
            QuotaExceeded: a limit is reached; nothing is counted.
        """
        keys = _keys(ae_title, address)
        with self._lock:
            if over := self._over(keys):
                raise QuotaExceeded(over)
            self._add(keys, count)

    def refund(self, ae_title: str, address: str, count: int) -> None:
        """The bytes of `charge` were not stored."""
        with self._lock:
            self._add(_keys(ae_title, address), -count)

    def _over(self, keys: tuple[_Key, _Key]) -> str:
        now = self._clock()
        for key in keys:
            limit = self._own_bytes.get(key, self._bytes[key[0]])
            if limit and (hour := self._hours.get(key)) is not None and hour.total(now) >= limit:
                return f"bytes of one {key[0]} in an hour"
        return ""

    def _add(self, keys: tuple[_Key, _Key], count: int) -> None:
        now = self._clock()
        if len(self._hours) > _SWEEP_KEYS:
            self._hours = {key: hour for key, hour in self._hours.items() if hour.total(now)}
        for key in keys:
            self._hours.setdefault(key, _Hour()).add(now, count)


class _Hour:
    """Bytes of the last sixty minutes, in steps of one minute."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, now: float, count: int) -> None:
        minute = int(now // _BUCKET_SECONDS)
        if self._buckets and self._buckets[-1][0] == minute:
            count_before = self._buckets.pop()[1]
        else:
            count_before = 0
        self._buckets.append((minute, count_before + count))
        self._total += count

    def total(self, now: float) -> int:
        oldest = int(now // _BUCKET_SECONDS) - _BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            self._total -= self._buckets.popleft()[1]
        return self._total


def _keys(ae_title: str, address: str) -> tuple[_Key, _Key]:
    return (_AE_TITLE, ae_title), (_ADDRESS, address)
