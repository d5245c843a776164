"""``make bench``: every benchmark, one after another; ``--quick`` runs the form that shows they work.

With names only those; ``--science`` names what the model's figures come from, which continuous integration runs.
"""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys
import time

import benchmarks

NOT_BENCHMARKS = frozenset(
    {
        "all",
        "clinical_week",
        "fourth_site",
        "heldout",
        "node_processes",
        "phantom_cache",
        "results",
        "spine_figures",
        "tables",
        "tissue",
        "unpack",
    }
)


def names() -> list[str]:
    """Every benchmark module of this package."""
    return sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in NOT_BENCHMARKS
    )


SCIENCE = ("ablation", "inference", "pretraining", "refit", "texture")
"""What the tables about the network come from."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"only these of {', '.join(names())}")
    parser.add_argument("--science", action="store_true", help=f"only {', '.join(SCIENCE)}")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(names())):
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    chosen = [*given.names, *(SCIENCE if given.science else ())] or names()
    failed = []
    for name in chosen:
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if given.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
