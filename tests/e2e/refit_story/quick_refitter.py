"""The refitter's role with fewer and shorter fits: python -m tests.e2e.refit_story.quick_refitter CONFIG"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from osteo_daemon import refitter
from osteo_daemon.settings import load_settings

OPTIONS = ("--steps", "12", "--outer-folds", "2", "--inner-folds", "2", "--repeats", "40")

if __name__ == "__main__":
    refitter.Refitter = functools.partial(refitter.Refitter, options=OPTIONS)  # type: ignore[misc,assignment]
    sys.exit(refitter.run(load_settings(Path(sys.argv[1]))))
