"""How long to wait after failures."""

from __future__ import annotations

import random

_JITTER = (0.8, 1.2)
_LONGEST_EXPONENT = 30


def back_off_seconds(base_seconds: float, attempts: int, maximum_seconds: float = float("inf")) -> float:
    """Doubles with each attempt, with jitter: lanes and nodes that failed together do not come back together."""
    exponent = min(max(attempts - 1, 0), _LONGEST_EXPONENT)
    return min(base_seconds * float(2**exponent), maximum_seconds) * random.uniform(*_JITTER)  # noqa: S311
