"""``make bench``: every benchmark, one after another; ``--quick`` runs the form that shows they work."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks

NOT_BENCHMARKS = frozenset(
    {
        "all",
        "clinical_week",
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


if __name__ == "__main__":
    failed = [
        name
        for name in names()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
