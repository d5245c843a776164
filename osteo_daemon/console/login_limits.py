"""How often somebody may try to log in: by address, by user, and by both together.

Every attempt counts from its begin, so that a hundred at one moment are a hundred; a success takes its own back.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

WINDOW_SECONDS: Final = 15 * 60.0
PER_ADDRESS: Final = 20
PER_USER: Final = 50
"""From all addresses together; well above `PER_PAIR`, so that a stranger needs many addresses to lock a person out."""
PER_PAIR: Final = 5
_KEYS = 20_000
_IPV6_NETWORK_BITS: Final = 64
"""One customer has at least so many addresses of IPv6."""

_Key = tuple[str, str]


class LoginLimits:
    """Attempts of the last minutes; several threads may use it at once.

    Args:
        clock: of monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._attempts: OrderedDict[_Key, deque[float]] = OrderedDict()

    def admit(self, address: str, user: str) -> float:
        """Count an attempt; returns 0.0 when it may go on, otherwise the seconds until another one may."""
        now, limits = self._clock(), _limits(address, user)
        with self._lock:
            waits = [0.0]
            for key, most in limits.items():
                times = self._attempts.get(key, deque())
                while times and now - times[0] >= WINDOW_SECONDS:
                    times.popleft()
                if len(times) >= most:
                    waits.append(WINDOW_SECONDS - (now - times[0]))
            if max(waits) > 0.0:
                return max(waits)
            for key in limits:
                self._attempts.setdefault(key, deque()).append(now)
                self._attempts.move_to_end(key)
            while len(self._attempts) > _KEYS:
                self._attempts.popitem(last=False)
        return 0.0

    def succeeded(self, address: str, user: str) -> None:
        """The attempt that was admitted last was the person's: it, and their mistypings here, count no longer."""
        address_key, user_key, pair_key = _limits(address, user)
        with self._lock:
            mistyped = len(self._attempts.pop(pair_key, ()))
            for key in (address_key, user_key):
                times = self._attempts.get(key, deque())
                for _ in range(min(mistyped, len(times))):
                    times.pop()


def _limits(address: str, user: str) -> dict[_Key, int]:
    network = _network(address)
    return {("address", network): PER_ADDRESS, ("user", user): PER_USER, (network, user): PER_PAIR}


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))
    return str(parsed)
