"""`osteo serve` with short waits before restarts: twenty kills a minute are no failing role here."""

from __future__ import annotations

import functools

from osteo_daemon import supervisor
from osteo_daemon.cli import main

if __name__ == "__main__":
    supervisor.Supervisor = functools.partial(supervisor.Supervisor, backoff_seconds=(0.2, 0.5))  # type: ignore[misc,assignment]
    main()
