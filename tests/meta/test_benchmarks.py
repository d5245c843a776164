"""Results as data: every benchmark is found, its tables come from its files."""

from __future__ import annotations

import json

from benchmarks.all import SCIENCE, names
from benchmarks.results import RESULTS, differences, hardware
from benchmarks.tables import tables


def test_every_benchmark_runs_as_a_module() -> None:
    for name in names():
        source = (RESULTS.parents[1] / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source, name
        assert "write_result(" in source, name
        assert "--quick" in source, name


def test_figures_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        assert document["schema"] == "osteo-figures/1", path.name
        assert {"date", "commit", "hardware", "command", "figures"} <= document.keys(), path.name
        assert document["quick"] == path.name.endswith(".quick.json"), path.name


def test_the_page_of_results_is_current() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == tables()


def test_a_quick_form_is_held_against_the_committed_figures() -> None:
    committed = {"table": {"full": {"mae": [0.05, 0.04, 0.06], "note": "x"}}, "time_s": 3.0, "runs": [{"a": 1}]}
    assert differences({"table": {"full": {"mae": [0.3, 0.1, 0.5]}}, "runs": [{"a": 2}, {"a": 3}]}, committed) == []
    assert differences({"table": {"full": {"rmse": [0.3]}}}, committed) == ["table/full/rmse"]
    assert differences({"table": {"full": {"mae": ["0.05"]}}}, committed) == ["table/full/mae"]
    assert differences({"table": {"full": {"mae": [None]}}}, committed) == []
    assert differences({"time_s": "slow", "runs": [{"b": 1}]}, committed) == ["time_s", "runs/b"]


def test_what_the_network_s_tables_come_from_can_be_run() -> None:
    assert set(SCIENCE) <= set(names())


def test_hardware_names_no_machine() -> None:
    assert set(hardware()) == {"processor", "cores", "memory_gb", "python"}
