"""A site's refit through the daemon: python -m tests.e2e.refit_story [--studies 60] [--shadow 10] [--keep FOLDER]

Every patient is rendered, sent and screened, the replay set is rendered and the refit fits as it comes: about half an
hour of a processor for the default. Exit status 1 and a traceback where the story goes another way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.e2e.refit_story.story import QUICK, Form, Story


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=60)
    parser.add_argument("--shadow", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="as in the tests")
    parser.add_argument("--keep", type=Path, help="work here and leave everything for a look afterwards")
    given = parser.parse_args()
    started = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory(prefix="osteo-refit-story-") as name:
        form = QUICK if given.quick else Form.whole(given.studies, given.shadow)
        Story(given.keep or Path(name), form, tell).run()


if __name__ == "__main__":
    main()
