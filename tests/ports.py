"""TCP ports for the servers of tests: free, and still free when the server gets there."""

from __future__ import annotations

import os
import random
import socket

LOOPBACK = "127.0.0.1"
_FIRST = 15000
_WIDTH = 1000
_PROCESSES = 16
_given: set[int] = set()


def a_free_port() -> int:
    """A port that is free on loopback, below those that clients get; never one that this process has had before.

    Test processes that run side by side draw from ranges of their own: between this answer and the server's call to
    listen there may be seconds.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    first, width = (_FIRST + int(worker) % _PROCESSES * _WIDTH, _WIDTH) if worker else (_FIRST, _WIDTH * _PROCESSES)
    if len(_given) > _WIDTH // 2:
        _given.clear()
    while True:
        port = first + random.SystemRandom().randrange(width)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
