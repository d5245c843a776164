"""The virtual cohort's parts: its committed configuration, readings, coarser series, changed densities, judging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osteo_daemon.inference.level_sequence import REACH, names_confirmed, read_sequence
from osteo_daemon.inference.vertebra_network import Prediction
from osteo_daemon.network.heads import class_probabilities
from train import truth
from train.cohort import CONFIGURATION, CohortConfig
from train.counterfactual import DensityChange
from train.data import NO_LABEL, VoiRow, digest_of
from train.judging import Judged, ceiling, difference, mean_of, metrics_of, net_benefit, youden
from train.losses import TaskVariances
from train.readings import Densitometry, measure
from train.rescan import draw_lattice, rescan
from train.shrink import shrink
from train.sites import makers_of_sites
from train.splits import part_of

LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")


def truth_rows(patients: int) -> list[VoiRow]:
    """Rows of whole patients with truth and no reading."""
    rng = np.random.default_rng(0)
    sites = [*makers_of_sites()]
    rows = []
    for number in range(patients):
        site = sites[number % len(sites)]
        found = truth.draw_truth(
            rng,
            age_years=60,
            sex="F",
            osteophytes=0.2,
            density_mg_cm3=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, float(rng.uniform(40, 180))),
            depth_mm=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, 34.0),
        )
        name = f"p{number}"
        for level in LEVELS:
            own = found.get(level)
            rows.append(
                VoiRow(
                    patient=name,
                    part=part_of(name, makers_of_sites()[site] is None),
                    site=site,
                    device=makers_of_sites()[site] or "Unseen",
                    level=level,
                    age_years=60,
                    sex="F",
                    kvp=120.0,
                    thickness_mm=2.0,
                    kernel="soft",
                    phase="native",
                    density_mg_cm3=100.0,
                    sbmd_g_cm2=None if own is None else own.sbmd_g_cm2,
                    reading_g_cm2=None,
                    target_sbmd_g_cm2=None,
                    diagnosis=NO_LABEL,
                    true_diagnosis=NO_LABEL if own is None else truth.diagnosis(truth.t_score(own.sbmd_g_cm2, level)),
                    visible_g_cm2=None if own is None else own.visible_g_cm2,
                )
            )
    return rows


# --- the committed configuration --------------------------------------------------------------------------------


def test_committed_cohort_is_what_the_code_draws() -> None:
    document = json.loads(CONFIGURATION.read_text())
    assert digest_of(document["cohort"]) == document["sha256"]
    now = CohortConfig.read().to_json()
    # the phantom's source may be edited; a cohort made then has another digest, and says so
    drifting = "phantom_sha256"
    assert {k: v for k, v in now.items() if k != drifting} == {
        k: v for k, v in document["cohort"].items() if k != drifting
    }


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    document = json.loads(CONFIGURATION.read_text())
    document["cohort"]["seed"] += 1
    (tmp_path / "cohort.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="digest"):
        CohortConfig.read(tmp_path / "cohort.json")


# --- readings ---------------------------------------------------------------------------------------------------


def test_unlabelled_scans_outnumber_labelled_ones_and_nobody_outside_is_labelled() -> None:
    rows = measure(truth_rows(800), Densitometry(), makers_of_sites())
    patients = {row.patient: row for row in rows if row.level == "L1"}.values()
    labelled = [row for row in patients if row.target_sbmd_g_cm2 is not None]
    assert len(labelled) < len(patients) / 2
    training = [row for row in patients if row.part == "train"]
    assert 0.25 < sum(row.target_sbmd_g_cm2 is not None for row in training) / len(training) < 0.35
    assert all(row.target_sbmd_g_cm2 is not None for row in patients if row.part in ("val", "test"))
    outside = [row for row in rows if row.site == "outside"]
    assert outside
    assert all(row.reading_g_cm2 is None and row.machine_sbmd_g_cm2 is None for row in outside)


def test_machines_differ_by_their_own_error_and_chance_averages_out() -> None:
    rows = measure(truth_rows(3000), Densitometry(labelled_share=1.0), makers_of_sites())
    for maker, error in truth.MACHINE_ERROR.items():
        own = [row for row in rows if row.device == maker and row.target_sbmd_g_cm2 is not None]
        chance = np.mean([row.target_sbmd_g_cm2 - row.machine_sbmd_g_cm2 for row in own])  # type: ignore[operator]
        assert abs(chance) < 0.006
        shift = np.mean([row.machine_sbmd_g_cm2 - row.sbmd_g_cm2 for row in own])  # type: ignore[operator]
        assert np.sign(round(float(shift), 6)) == np.sign(error)


@pytest.mark.parametrize("scheme", ["one-device", "shuffled"])
def test_controls_change_readings_and_nothing_else(scheme: Any) -> None:
    rows = truth_rows(600)
    control = measure(rows, Densitometry(scheme=scheme), makers_of_sites())
    for before, after in zip(rows, control, strict=True):
        assert replace(
            after,
            device=before.device,
            reading_g_cm2=None,
            target_sbmd_g_cm2=None,
            machine_sbmd_g_cm2=None,
            diagnosis=NO_LABEL,
        ) == replace(before, machine_sbmd_g_cm2=None)
    inside = [row for row in control if row.site != "outside" and row.level == "L1"]
    if scheme == "one-device":
        assert {row.device for row in inside} == {truth.MAKERS[0]}
    else:
        table = [[sum(r.site == s and r.device == m for r in inside) for m in truth.MAKERS] for s in makers_of_sites()]
        assert min(table[0]) > 30, "a site's patients must be spread over all machines"


def test_measuring_twice_gives_the_same() -> None:
    rows = truth_rows(40)
    once = measure(rows, Densitometry(), makers_of_sites())
    assert measure(once, Densitometry(), makers_of_sites()) == once


# --- changed densities and coarser series -----------------------------------------------------------------------


def sphere(shape: tuple[int, int, int], radius: float) -> npt.NDArray[np.float32]:
    grid = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return np.asarray(sum(axis**2 for axis in grid) <= radius**2, dtype=np.float32)


@pytest.mark.parametrize(("kvp", "hu_per_mg"), [(120.0, 1.25), (100.0, 1.25 / 0.951), (140.0, 1.25 / 1.073)])
def test_density_changes_the_core_alone_at_the_voltage_s_slope(kvp: float, hu_per_mg: float) -> None:
    core = sphere((24, 24, 24), 8.0)
    hu = np.where(core > 0, 120.0, 600.0).astype(np.float32)
    change = DensityChange(30.0)
    moved = change.apply(hu, core, kvp, 1.0) - hu
    assert np.allclose(moved[core > 0], 30.0 * hu_per_mg, atol=0.01)
    assert not moved[core == 0].any()
    assert change.sbmd_g_cm2 == pytest.approx(30.0 * truth.SBMD_PER_MG)


def test_texture_scales_around_the_core_s_mean() -> None:
    rng = np.random.default_rng(1)
    core = sphere((24, 24, 24), 9.0)
    hu = (150.0 + 30.0 * rng.standard_normal(core.shape)).astype(np.float32)
    moved = DensityChange(0.0, texture_scale=1.5).apply(hu, core, 120.0, 1.0)
    assert moved[core > 0].mean() == pytest.approx(hu[core > 0].mean(), abs=0.1)
    assert moved[core > 0].std() == pytest.approx(1.5 * hu[core > 0].std(), rel=0.01)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(12.0, 300.0))
def test_no_drawn_change_makes_a_vertebra_empty(seed: int, density: float) -> None:
    assert density + DensityChange.draw(np.random.default_rng(seed), density).mg_cm3 >= 11.9


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_coarser_series_keeps_flat_regions_and_blurs_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside = sphere((32, 32, 32), 13.0)
    hu = np.where(inside > 0, 200.0, 0.0).astype(np.float32)
    lattice = draw_lattice(rng, 1.0)
    seen = rescan(hu, lattice, 1.0)
    assert seen.shape == hu.shape
    assert seen[14:18, 14:18, 14:18].mean() == pytest.approx(200.0, abs=12.0)
    assert np.abs(np.diff(seen, axis=0)).max() < 200.0
    # nothing moves: the middle of the bright ball stays where it was
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in hu.shape), indexing="ij"), axis=-1)
    middle = (grid * seen[..., None]).sum(axis=(0, 1, 2)) / seen.sum()
    assert np.abs(middle - 15.5).max() < 0.6


def test_a_coarser_grid_keeps_the_centre() -> None:
    hu = sphere((48, 56, 64), 12.0) * np.float32(100)
    small = shrink(hu, 1.5, (28, 36, 42))
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in small.shape), indexing="ij"), axis=-1)
    middle = (grid * small[..., None]).sum(axis=(0, 1, 2)) / small.sum()
    assert np.abs(middle).max() < 0.05
    assert small.sum() * 1.5**3 == pytest.approx(hu.sum(), rel=0.02)


# --- vertebrae read together ------------------------------------------------------------------------------------


def looks(true: int, sharpness: float, rng: np.random.Generator) -> dict[str, float]:
    score = -sharpness * np.abs(np.arange(len(LEVELS)) - true) + rng.normal(0, 0.5, len(LEVELS))
    weights = np.exp(score)
    return dict(zip(LEVELS, (weights / weights.sum()).tolist(), strict=True))


def test_a_sequence_is_right_where_single_vertebrae_err() -> None:
    rng = np.random.default_rng(3)
    single = together = 0
    for _ in range(60):
        seen = [looks(true, 0.7, rng) for true in range(6)]
        single += sum(max(p, key=p.__getitem__) == LEVELS[k] for k, p in enumerate(seen))
        reading = read_sequence(LEVELS, seen, LEVELS)
        assert reading is not None
        together += reading.shift == 0
    assert together / 60 > 0.95
    assert together / 60 > single / 360 + 0.1


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_a_shifted_count_is_found(shift: int) -> None:
    rng = np.random.default_rng(5)
    names = ("L1", "L2", "L3", "L4")
    seen = [looks(int(np.clip(LEVELS.index(name) + shift, 0, 5)), 2.0, rng) for name in names]
    reading = read_sequence(names, seen, LEVELS)
    assert reading is not None
    assert reading.shift == shift
    assert reading.margin > 0
    assert abs(shift) <= REACH


def test_one_vertebra_or_unknown_names_say_nothing() -> None:
    seen = [looks(1, 2.0, np.random.default_rng(0))] * 3
    assert read_sequence(("L1", "T5", "S1"), seen, LEVELS) is None


def test_names_are_confirmed_by_all_vertebrae_together_only() -> None:
    rng = np.random.default_rng(7)

    def prediction(name: str, true: int) -> Prediction:
        return Prediction(name, None, None, None, None, None, looks(true, 1.5, rng), (1.0,), 0.0, 1.0)

    counted = ("T12", "L1", "L2", "L3", "L4")
    assert names_confirmed(counted, [prediction(name, k) for k, name in enumerate(counted)])
    assert not names_confirmed(counted, [prediction(name, k + 1) for k, name in enumerate(counted)])
    odd_one = [prediction(name, 3 if k == 1 else k) for k, name in enumerate(counted)]
    assert names_confirmed(counted, odd_one), "one vertebra that looks like another says nothing about the count"
    assert not names_confirmed(counted, [None] * 5), "without a network nothing is confirmed"


# --- judging ----------------------------------------------------------------------------------------------------


def test_youden_and_net_benefit_by_hand() -> None:
    score = np.array([0.1, 0.2, 0.6, 0.9])
    positive = np.array([False, False, True, True])
    assert youden(score, positive) == 0.6
    assert net_benefit(score, positive, 0.5) == pytest.approx(0.5)
    assert net_benefit(np.ones(4), positive, 0.5) == pytest.approx(0.0)


def test_an_ideal_reader_is_better_than_a_noisy_one_and_differences_are_paired() -> None:
    rows = [row for row in measure(truth_rows(400), Densitometry(), makers_of_sites()) if row.sbmd_g_cm2 is not None]
    rows = [row for row in rows if row.machine_sbmd_g_cm2 is not None]
    rng = np.random.default_rng(2)
    true = np.array([row.sbmd_g_cm2 for row in rows], dtype=np.float64)
    t = np.array([truth.t_score(b, row.level) for b, row in zip(true, rows, strict=True)])

    def judged(noise: float) -> Judged:
        seen = t + rng.normal(0, noise, len(t))
        low, worst = 1 / (1 + np.exp(4 * (seen + 1))), 1 / (1 + np.exp(4 * (seen + 2.5)))
        probability = np.stack([1 - low, low - worst, worst], axis=1)
        nothing = np.zeros((len(t), 0))
        bmd = true + noise * rng.normal(0, 0.1, len(t))
        return Judged(np.arange(len(t)), probability, bmd, np.full(len(t), 0.1), nothing, np.array([0.5, 0.5]))

    good, bad = metrics_of(judged(0.1), rows), metrics_of(judged(2.0), rows)
    everything = np.arange(len(rows))
    apart = difference(good, bad, ("mae", "diagnosis_auc", "cross_device_mae"))
    assert apart["mae"](everything) < 0 < apart["diagnosis_auc"](everything)
    assert mean_of([good, bad])["mae"](everything) == pytest.approx(
        (good["mae"](everything) + bad["mae"](everything)) / 2
    )
    assert ceiling(rows)["rmse"](everything) == pytest.approx(
        np.hypot(truth.PATIENT_RESIDUAL_G_CM2, truth.LEVEL_RESIDUAL_G_CM2), rel=0.1
    )
    # every device counts the same, however many patients it has
    device = np.array([row.device for row in rows])
    machine = np.array([row.machine_sbmd_g_cm2 for row in rows], dtype=np.float64)
    by_hand = np.mean([np.abs(true - machine)[device == name].mean() for name in np.unique(device)])
    perfect = replace(judged(0.1), bmd=true)
    assert metrics_of(perfect, rows)["cross_device_mae"](everything) == pytest.approx(by_hand)


def test_predictions_survive_the_disk(tmp_path: Path) -> None:
    kept = Judged(np.arange(2), np.full((2, 3), 1 / 3), np.ones(2), np.ones(2), np.zeros((2, 0)), np.array([0.5, 0.4]))
    kept.save(tmp_path / "a.npz")
    read = Judged.load(tmp_path / "a.npz")
    assert all(np.array_equal(getattr(kept, n), getattr(read, n)) for n in Judged.__dataclass_fields__)


# --- network side -----------------------------------------------------------------------------------------------


def test_class_shifts_move_thresholds_and_never_cross() -> None:
    logits = torch.tensor([[0.0, -2.0]])
    moved = class_probabilities(logits, 3, 1.0, (-1.0, -1.0))
    assert moved[0, 0] > class_probabilities(logits, 3)[0, 0]
    crossed = class_probabilities(logits, 3, 1.0, (0.0, 9.0))
    assert (crossed >= 0).all()
    assert float(crossed.sum()) == pytest.approx(1.0)


def test_learnt_variances_weigh_a_noisy_task_less() -> None:
    variances = TaskVariances()
    optimiser = torch.optim.SGD(variances.parameters(), lr=0.2)
    for _ in range(400):
        optimiser.zero_grad()
        variances(torch.tensor([4.0, 1.0, 0.25])).backward()
        optimiser.step()
    first, second, third = (-variances.log_variance).exp().tolist()
    assert first < second < third
    assert second == pytest.approx(0.5, rel=0.05)
