"""The ablation table: ``python -m benchmarks.ablation`` after ``python -m train.ablation``.

``--quick`` makes a tiny cohort of its own, trains two rows for a moment and checks what must hold even then: the table
has the shape of the committed one, a trained network follows the truth and none is better than an ideal reader.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.results import RESULTS, ROOT, write_result
from train.ablation import Budget, run_all
from train.ablation_figures import figures_of, page, plot
from train.cohort import CohortConfig, make_cohort
from train.data import open_set
from train.readings import Densitometry
from train.shrink import shrink_cohort

NAME: Final = "ablation"
QUICK_PATIENTS: Final = 60
QUICK_ROWS: Final = ("full", "no-experts")


def quick_figures(folder: Path, workers: int = 1) -> dict[str, Any]:
    """The whole way from patients to table on a cohort of a minute."""
    config = CohortConfig.read(patients=QUICK_PATIENTS, densitometry=Densitometry(labelled_share=0.8))
    make_cohort(config, folder / "cohort", workers)
    shrink_cohort(folder / "cohort", folder / "small", workers)
    run_all(folder / "small", folder / "runs", list(QUICK_ROWS), [0], workers, Budget(4, 1))
    return figures_of(folder / "runs", open_set(folder / "small"), repeats=20)


def faults(quick: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """What is wrong with a quick table, in words; empty when all is well."""
    found = []
    for part in ("test", "external"):
        row = quick[part]["variants"]["full"]
        if not row["pearson"][0] > 0.2:
            found.append(f"{part}: the trained network doesn't follow the true BMD (r = {row['pearson'][0]})")
        ideal = quick[part]["ceiling"]["rmse"][0]
        if row["rmse"][0] < ideal * 0.8:
            found.append(f"{part}: an RMSE of {row['rmse'][0]} below the ideal reader's {ideal} means a leak")
        for name in QUICK_ROWS:
            if None in quick[part]["variants"][name]["mae"]:
                found.append(f"{part} {name}: an error that is no number")
        if committed is not None:
            cells = set(committed[part]["variants"]["full"]) ^ set(row)
            tables = set(committed[part]) ^ set(quick[part])
            found += [f"{part}: not the committed table's shape: {sorted(odd)}" for odd in (cells, tables) if odd]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny cohort, two rows, checked against the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--data", type=Path, default=Path("runs/cohort-small"))
    parser.add_argument("--repeats", type=int, default=300)
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            figures = quick_figures(Path(folder))
        committed = json.loads(path.read_text())["figures"] if path.exists() else None
        wrong = faults(figures, committed)
        if wrong:
            raise SystemExit("\n".join(wrong))
        print(write_result(NAME, figures, quick=True))
        return
    figures = figures_of(given.runs, open_set(given.data), given.repeats)
    print(write_result(NAME, figures))
    plot(figures, path.with_suffix(".png"))
    (ROOT / "docs" / "ablation.md").write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
