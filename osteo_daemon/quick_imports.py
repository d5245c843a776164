"""Imports without the garbage collector, which looks through what was imported again and again and finds nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import a role in this block: a worker with torch is there after two thirds of the time.

    What was imported stays for good and is not looked at later either (`gc.freeze`).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
