"""A wall clock that a test may set: a small library, compiled here and preloaded into the node's processes."""

from __future__ import annotations

import mmap
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import require_command

_SOURCE = Path(__file__).with_name("clock.c")


class ShiftedClock:
    """The clock of every process that runs with `environment`; the monotonic clock stays true."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock.shift"
        compiler = require_command("gcc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, _SOURCE, "-ldl"], check=True)
        self._file.write_bytes(struct.pack("=q", 0))
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self._file)}

    def shift(self, seconds: int) -> None:
        """From now on the clock stands this far from the true time."""
        with self._file.open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
            page[:8] = struct.pack("=q", seconds)
