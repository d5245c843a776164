"""Rounds of SIGKILL against a node under load: python -m tests.e2e.chaos [--rounds 200] [--seed 1] [--keep FOLDER]

Prints rounds, kills by role, studies and losses; exit status 1 when anything was lost, doubled or left unexplained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.chaos.storm import DISTURBANCES, Storm

ROUNDS_PER_BATCH = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="work here and leave everything for a look afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="osteo-chaos-") as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder, arguments.rounds, arguments.seed)


def run(folder: Path, rounds: int, seed: int) -> int:
    """Batches until ``rounds`` are done; returns the exit status."""
    start = time.monotonic()
    storm = Storm(folder, seed, lambda line: print(line, flush=True))
    try:
        batch = 0
        while storm.rounds < rounds:
            verdict = storm.batch(min(ROUNDS_PER_BATCH, rounds - storm.rounds), DISTURBANCES[batch % len(DISTURBANCES)])
            for fault in verdict.faults:
                print(f"  fault: {fault}")
            batch += 1
        kills = ", ".join(f"{count} {role}" for role, count in storm.kills.most_common())
        print(f"rounds {storm.rounds}, seed {seed}, SIGKILLs {sum(storm.kills.values())} ({kills})")
        print(
            f"studies {verdict.reported + verdict.excluded}: reported {verdict.reported}, excluded {verdict.excluded}; "
            f"objects acknowledged {verdict.acknowledged}, sent again to the archive {verdict.resent}; "
            f"losses {len(verdict.faults)}; {time.monotonic() - start:.0f} s"
        )
        return 1 if verdict.faults else 0
    finally:
        storm.close()


if __name__ == "__main__":
    sys.exit(main())
