"""The ablation's tables: current, honest about a failed run, and readable when a class is missing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.ablation import NAME, QUICK_ROWS, faults
from benchmarks.results import RESULTS, ROOT
from train.ablation import SEEDS, VARIANTS, jobs, network_of
from train.ablation_figures import CONTROLS, markdown, page


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{NAME}.json").read_text())["figures"])


def test_page_shows_the_committed_figures(committed: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "ablation.md").read_text() == page(committed)


def test_committed_cohort_is_the_configured_one(committed: dict[str, Any]) -> None:
    configured = json.loads((ROOT / "train" / "cohort.json").read_text())["sha256"]
    assert committed["cohort_sha256"] == configured


def test_quick_form_accepts_sound_figures_and_refuses_others(committed: dict[str, Any]) -> None:
    assert faults(committed, committed) == []
    blind = copy.deepcopy(committed)
    blind["test"]["variants"]["full"]["pearson"][0] = 0.0
    assert any("follow" in fault for fault in faults(blind, committed))
    leaking = copy.deepcopy(committed)
    leaking["external"]["variants"]["full"]["rmse"][0] = 0.01
    assert any("leak" in fault for fault in faults(leaking, committed))
    poorer = copy.deepcopy(committed)
    del poorer["test"]["variants"]["full"]["class_ece"]
    assert any("shape" in fault for fault in faults(poorer, committed))
    broken = copy.deepcopy(committed)
    broken["test"]["variants"][QUICK_ROWS[1]]["mae"] = [None, None, None]
    assert any("no number" in fault for fault in faults(broken, committed))


def test_missing_classes_leave_cells_empty(committed: dict[str, Any]) -> None:
    without = copy.deepcopy(committed)
    without["test"]["variants"]["full"]["diagnosis_auc"] = [None, None, None]
    assert "None" not in markdown(without)
    assert "nan" not in markdown(without)


def test_every_run_is_done_once_and_the_telling_ones_first() -> None:
    order = list(jobs(None, list(SEEDS)))
    assert len(order) == len(set(order)) == len(VARIANTS) * len(SEEDS)
    assert {name for name, _ in order[:9]} == {"full", "no-experts", "no-pretraining"}


def test_networks_stay_small_and_controls_differ_in_experts_alone() -> None:
    from osteo_daemon.network.multitask import MultitaskMoE

    sizes = {name: sum(p.numel() for p in MultitaskMoE(network_of(v)).parameters()) for name, v in VARIANTS.items()}
    assert max(sizes.values()) < 1_000_000
    assert abs(sizes["no-experts"] - sizes["full"]) < 0.02 * sizes["full"], "as many parameters, or size explains it"
    for name, without in CONTROLS.items():
        assert VARIANTS[name].scheme == VARIANTS[without].scheme != "sites"
        assert VARIANTS[without].network["expert_count"] == 1
