"""How far a refit is: a bar on the terminal, and a file for who started it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar on the terminal and ``progress.json`` for who started the refit.

    Args:
        path: of that file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stage, self._total, self._done, self._since = "", 1, 0, time.monotonic()
        self._bar: Any = None

    def begin(self, stage: str, total: int) -> None:
        """A new stage of so many steps."""
        self.close()
        self._stage, self._total, self._done, self._since = stage, max(1, total), 0, time.monotonic()
        self._bar = tqdm(total=total, desc=stage, mininterval=1.0)
        self._write()

    def __call__(self, steps: int) -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        self._write()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self) -> None:
        left = None
        if self._done:
            left = round((time.monotonic() - self._since) / self._done * max(0, self._total - self._done), 1)
        values = {"stage": self._stage, "done": self._done, "total": self._total, "seconds_left": left}
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(values))
        temporary.replace(self._path)
