"""Training: truth and scales, splits, losses, exact resumption, calibration, and a bundle at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from osteo_daemon.inference.bundle import read_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.network.multitask import MultitaskMoE
from tests.easy_vois import LOOP, NETWORK, SHAPE, easy_set
from train import truth
from train.baselines import NAMES, features_of, rows_with_truth, run_baselines
from train.calibrate import fit_calibration
from train.cohort import CohortConfig, draw_patient, make_cohort
from train.data import MARGIN_VOXELS, NO_LABEL, Augmentation, batches, open_set
from train.evaluate import evaluate_run, run_network
from train.export import export_run
from train.loop import load_run
from train.losses import LossWeights, balance_loss, bmd_loss, device_loss, diagnosis_loss
from train.metrics import auc, balanced_accuracy, cluster_bootstrap, expected_calibration_error, regression
from train.multitask import run_training
from train.optim import MovingAverage, learning_rate_at
from train.replay import find_replay
from train.splits import check_disjoint, part_of


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return easy_set(tmp_path_factory.mktemp("easy") / "set")


@pytest.fixture(scope="module")
def finished(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    loop = replace(LOOP, epochs=24)
    # the densitometer of the easy set follows no pixel: supervising the gate with it would only add noise
    run_training(easy, folder, loop, NETWORK, LossWeights(device=0.0, level=2.0), Augmentation(), torch.device("cpu"))
    return folder


# --- truth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", truth.MAKERS)
def test_hui_inverts(maker: truth.Maker) -> None:
    for value in (0.6, 1.0, 1.4):
        assert truth.to_sbmd(truth.from_sbmd(value, maker), maker) == pytest.approx(value)


def test_hui_known_values() -> None:
    # at the centre of each formula the scale is 1.0436; a Hologic 0.800 is about a Lunar 0.913
    assert truth.to_sbmd(0.972, "Hologic") == pytest.approx(1.0436)
    assert truth.from_sbmd(truth.to_sbmd(0.800, "Hologic"), "Lunar") == pytest.approx(0.913, abs=0.001)


def test_diagnosis_cuts() -> None:
    assert [truth.diagnosis(t) for t in (-0.99, -1.0, -2.49, -2.5)] == [0, 1, 1, 2]
    assert truth.t_score(truth.REFERENCE_MEAN_G_CM2 - 2.5 * truth.REFERENCE_SD_G_CM2) == pytest.approx(-2.5)
    offset = truth.LEVEL_OFFSET_G_CM2["L1"]
    assert truth.t_score(truth.REFERENCE_MEAN_G_CM2 + offset, "L1") == pytest.approx(0.0)


def test_drawn_population_meets_the_norms_it_cites() -> None:
    rng = np.random.default_rng(0)
    for age, expected_hologic in ((27, 1.064), (75, 0.902)):
        means = []
        for _ in range(1500):
            density = truth.draw_density_mg_cm3(rng, age)
            levels = truth.draw_truth(
                rng,
                age_years=age,
                sex="F",
                osteophytes=0.2,
                density_mg_cm3=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, density),
                depth_mm=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, 35.0),
            )
            means.append(np.mean([level.sbmd_g_cm2 for level in levels.values()]))
        assert truth.from_sbmd(float(np.mean(means)), "Hologic") == pytest.approx(expected_hologic, abs=0.02)
        assert 0.08 < np.std(means) < 0.14


# --- data and splits --------------------------------------------------------------------------------------------


def test_parts_are_stable_disjoint_and_about_as_large_as_said() -> None:
    parts = [part_of(f"p{n}", False) for n in range(4000)]
    assert parts == [part_of(f"p{n}", False) for n in range(4000)]
    assert 0.66 < parts.count("train") / 4000 < 0.74
    assert part_of("p1", True) == "external"
    with pytest.raises(ValueError, match="p1"):
        check_disjoint(["p1", "p1"], ["train", "test"])


def test_set_refuses_a_patient_in_two_parts(tmp_path: Path) -> None:
    folder = easy_set(tmp_path / "set", patients=6)
    document = json.loads((folder / "table.json").read_text())
    document["rows"][0]["part"] = "external"
    (folder / "table.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="p0"):
        open_set(folder)


def test_batches_depend_on_seed_and_epoch_only(easy: Path) -> None:
    data = open_set(easy)

    def run(seed: int, epoch: int) -> torch.Tensor:
        steps = batches(
            data, data.indices("train"), NETWORK, ["Hologic"], 8, augmentation=Augmentation(), seed=seed, epoch=epoch
        )
        return torch.cat([batch.hu for batch in steps])

    assert torch.equal(run(1, 2), run(1, 2))
    assert not torch.equal(run(1, 2), run(1, 3))
    assert not torch.equal(run(1, 2), run(2, 2))


def test_augmentation_keeps_density_and_never_turns_upside_down() -> None:
    rng = np.random.default_rng(2)
    stored = tuple(n + 2 * MARGIN_VOXELS for n in SHAPE)
    ramp = np.broadcast_to(np.linspace(100, 200, stored[0], dtype=np.float32)[:, None, None], stored)
    for _ in range(50):
        view = Augmentation().apply(ramp, rng)
        assert view.shape == SHAPE
        assert view[-1].mean() > view[0].mean()
        assert abs(view.mean() - 150.0) < 8.0 + 100.0 / stored[0] * MARGIN_VOXELS


# --- losses and optimiser ---------------------------------------------------------------------------------------


def test_losses_ignore_missing_labels_and_fall_for_right_answers() -> None:
    prior = torch.full((3,), 1 / 3)
    right, wrong = torch.tensor([[5.0, 5.0]]), torch.tensor([[-5.0, -5.0]])
    assert diagnosis_loss(right, torch.tensor([2]), prior, 0.0) < diagnosis_loss(wrong, torch.tensor([2]), prior, 0.0)
    assert diagnosis_loss(right, torch.tensor([NO_LABEL]), prior, 0.0) == 0.0
    mean, log_variance = torch.tensor([1.0, 5.0]), torch.log(torch.tensor([0.01, 0.01]))
    target = torch.tensor([1.0, float("nan")])
    close = bmd_loss(mean, log_variance, target, 0.2, 0.5)
    assert torch.isfinite(close)
    assert close < bmd_loss(mean, log_variance, torch.tensor([1.4, float("nan")]), 0.2, 0.5)


def test_logit_adjustment_of_the_ordinal_head_pushes_towards_the_rare_class() -> None:
    prior = torch.tensor([0.8, 0.15, 0.05])
    logits = torch.zeros(1, 2, requires_grad=True)
    diagnosis_loss(logits, torch.tensor([2]), prior, 0.65).backward()
    adjusted = logits.grad.clone()
    logits.grad = None
    diagnosis_loss(logits, torch.tensor([2]), prior, 0.0).backward()
    assert (adjusted < logits.grad).all(), "a rare positive must pull harder"


def test_gate_losses() -> None:
    even = torch.full((6, 1, 3), 1 / 3)
    spread, alone = torch.eye(3)[torch.arange(6) % 3][:, None], torch.eye(3)[torch.zeros(6, dtype=torch.long)][:, None]
    for kind in ("importance", "switch"):
        assert balance_loss(even.log(), even, kind) == pytest.approx(0.0, abs=1e-6)
        assert balance_loss(9 * spread, spread, kind) == pytest.approx(0.0, abs=1e-5)
        assert balance_loss(9 * alone, alone, kind) > 1.0
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 1] = 9.0
    assert device_loss(logits, torch.tensor([1, NO_LABEL]), 3) < 0.01
    assert device_loss(logits, torch.tensor([0, NO_LABEL]), 3) > 5.0
    assert LossWeights(device=0.2, device_epochs=0.5).device_share(0.5) == 0.0


def test_schedule_and_average() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 10) for step in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    network = torch.nn.Linear(2, 1)
    average = MovingAverage(network, 0.5)
    with torch.no_grad():
        network.weight.add_(1.0)
    before = average.state["weight"].clone()
    average.update(network)
    assert ((average.state["weight"] > before) & (average.state["weight"] < network.weight + 1e-6)).all()


# --- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_against_hand_made_values() -> None:
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == pytest.approx(0.75)
    assert auc(np.array([1.0, 1.0]), np.array([True, False])) == pytest.approx(0.5)
    assert np.isnan(auc(np.array([1.0]), np.array([True])))
    assert balanced_accuracy(np.array([0, 0, 1]), np.array([0, 1, 1])) == pytest.approx(0.75)
    errors = regression(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    assert (errors["bias"], errors["mae"]) == (pytest.approx(1.0), pytest.approx(1.0))
    sure_and_wrong = expected_calibration_error(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert sure_and_wrong == pytest.approx(0.5)


def test_bootstrap_resamples_patients() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{n}" for n in range(30)], 4)
    values = np.repeat(rng.normal(0, 1, 30), 4)
    alone = np.array([f"v{n}" for n in range(120)])
    metric = {"mean": lambda k: float(values[k].mean())}
    clustered, naive = cluster_bootstrap(patients, metric)["mean"], cluster_bootstrap(alone, metric)["mean"]
    assert clustered["high"] - clustered["low"] > 1.6 * (naive["high"] - naive["low"])
    assert clustered["low"] < clustered["value"] < clustered["high"]


# --- the whole way ----------------------------------------------------------------------------------------------


def test_training_learns(finished: Path, easy: Path) -> None:
    data = open_set(easy)
    run = load_run(finished)
    raw = run_network(run.network, data, data.indices("test", "external"), run.devices, quiet=True)
    true = np.array([data.rows[i].sbmd_g_cm2 for i in raw.index])
    assert np.corrcoef(raw.bmd, true)[0, 1] > 0.95
    level = np.array([NETWORK.levels.index(data.rows[i].level) for i in raw.index])
    assert (raw.level_logits.argmax(1) == level).mean() > 0.9


def test_resumed_training_equals_unbroken(easy: Path, tmp_path: Path) -> None:
    """Stopped after an epoch and called again, the weights are those of a run without a stop."""

    class Stop(Exception):
        pass

    def go(folder: Path) -> None:
        run_training(easy, folder, LOOP, NETWORK, LossWeights(), Augmentation(), torch.device("cpu"))

    go(tmp_path / "unbroken")
    import train.loop as loop_module

    real = loop_module._save
    saves = 0

    def stop_after_first_epoch(values: dict[str, Any], path: Path) -> None:
        nonlocal saves
        real(values, path)
        saves += path.name == "last.pt"
        if saves == 1 and path.name == "last.pt":
            raise Stop

    loop_module._save = stop_after_first_epoch
    try:
        with pytest.raises(Stop):
            go(tmp_path / "broken")
    finally:
        loop_module._save = real
    go(tmp_path / "broken")
    first, second = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["average"]["state"]
        for name in ("unbroken", "broken")
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    # the curves, too: every epoch once, no gap and no epoch twice where the run was stopped
    assert _curve(tmp_path / "unbroken")[0] == list(range(1, LOOP.epochs + 1))
    assert _curve(tmp_path / "broken")[0] == list(range(1, LOOP.epochs + 1))
    history = json.loads((tmp_path / "broken" / "history.json").read_text())
    assert _curve(tmp_path / "broken")[1] == pytest.approx([entry["loss"] for entry in history])


def _curve(folder: Path) -> tuple[list[int], list[float]]:
    """Epochs and values of the validation loss as TensorBoard reads them."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"bmd/train", "bmd/val", "device/train", "loss"} <= set(found.Tags()["scalars"])
    return [entry.step for entry in found.Scalars("loss")], [entry.value for entry in found.Scalars("loss")]


def test_a_run_is_never_continued_with_other_settings(finished: Path, easy: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        run_training(easy, finished, LOOP, NETWORK, LossWeights(bmd=2.0), Augmentation(), torch.device("cpu"))


def test_calibration_and_baseline(finished: Path, easy: Path) -> None:
    data = open_set(easy)
    run = load_run(finished)
    raw = run_network(run.network, data, data.indices("train", "val", "test"), run.devices, quiet=True)
    calibration = fit_calibration(raw.class_logits, raw.level_logits, raw.bmd, raw.bmd_sd, raw.index, data)
    target = np.array([data.rows[i].target_sbmd_g_cm2 for i in raw.index])
    inside = np.abs(raw.bmd - target) <= calibration.bmd_interval_90 * calibration.bmd_sd_factor * raw.bmd_sd
    assert 0.9 <= inside.mean() <= 0.9 + 3.0 / len(target)
    features = features_of(data, NETWORK, easy)
    test = rows_with_truth(data, data.indices("test"))
    plain = run_baselines(data, features, {"test": test})
    assert set(plain) == set(NAMES)
    true = np.array([data.rows[i].sbmd_g_cm2 for i in test])
    assert np.corrcoef(plain["core_hu_linear"]["test"].bmd, true)[0, 1] > 0.99
    for name in NAMES:
        judged = plain[name]["test"]
        assert np.allclose(judged.probability.sum(1), 1.0)
        assert auc(judged.score("diagnosis"), np.array([data.rows[i].true_diagnosis == 2 for i in test])) > 0.9


def test_export_gives_a_bundle_that_predicts_what_training_saw(finished: Path, tmp_path: Path, easy: Path) -> None:
    result = evaluate_run(finished, repeats=20)
    assert result["test"]["network"]["mae"]["low"] <= result["test"]["network"]["mae"]["value"]
    bundle = export_run(finished, tmp_path / "osteo-moe", "9.9.9", "licence text")
    assert read_bundle(tmp_path / "osteo-moe").sha256 == bundle.sha256
    assert bundle.status == "investigational"
    card = (tmp_path / "osteo-moe" / "docs" / "README.md").read_text()
    assert "No clinical validation" in card
    assert f"{result['test']['network']['mae']['value']:.3f}" in card
    assert bundle.inference["calibration"] == result["calibration"]
    network = VertebraNetwork.from_bundle(bundle)
    data = open_set(easy)
    hu = torch.from_numpy(data.hu[:1].astype(np.float32)[:, 4:-4, 4:-4, 4:-4].copy())
    direct = load_run(finished).network(hu, torch.tensor([0])).bmd
    loaded = MultitaskMoE(NETWORK).eval()
    loaded.load_state_dict(bundle.load_weights())
    torch.testing.assert_close(loaded(hu, torch.tensor([0])).bmd, direct)
    assert network.scale.t_score(truth.REFERENCE_MEAN_G_CM2 + truth.LEVEL_OFFSET_G_CM2["L1"], "L1") == pytest.approx(
        0.0, abs=1e-3
    )
    # what a refit rehearses travels along: vertebrae of patients that nobody trained on
    rehearsal = find_replay(bundle, loaded, None)
    tested = data.indices("test")
    assert len(rehearsal) == len(tested) > 0
    assert {data.rows[i].patient for i in tested}.isdisjoint(data.rows[i].patient for i in data.indices("train", "val"))
    assert rehearsal.sbmd.tolist() == pytest.approx([data.rows[i].sbmd_g_cm2 for i in tested])
    first, second = rehearsal.halves()
    assert min(len(first), len(second)) > 0


# --- the cohort -------------------------------------------------------------------------------------------------


def test_cohort_is_deterministic_resumes_and_hides_the_external_hospital(tmp_path: Path) -> None:
    config = CohortConfig(
        patients=6, levels=("L1", "T12"), voi_shape=SHAPE, voi_spacing_mm=2.0, external_share=0.4, seed=5
    )
    make_cohort(config, tmp_path / "a", workers=2)
    first = open_set(tmp_path / "a")
    (tmp_path / "a" / "table.json").unlink()  # stopped before the end: one patient is missing
    (tmp_path / "a" / "rows" / "3.json").unlink()
    kept = np.array(first.hu)
    np.lib.format.open_memmap(tmp_path / "a" / "voi.npy", mode="r+")[6:8] = 0
    make_cohort(config, tmp_path / "a", workers=1)
    second = open_set(tmp_path / "a")
    assert second.rows == first.rows
    np.testing.assert_array_equal(second.hu, kept)

    external = [row for row in first.rows if row.part == "external"]
    assert external
    assert all(
        row.target_sbmd_g_cm2 is None and row.diagnosis == NO_LABEL and row.reading_g_cm2 is None for row in external
    )
    for index, row in enumerate(first.rows):
        assert (row.sbmd_g_cm2 is None) == (row.level == "T12")
        centre = tuple(slice(n // 2 - 2, n // 2 + 2) for n in first.hu.shape[1:])
        assert abs(first.hu[index][centre].mean() - 1.25 * row.density_mg_cm3) < 80
    with pytest.raises(ValueError, match="another cohort"):
        make_cohort(replace(config, seed=6), tmp_path / "a")


def test_a_patient_does_not_depend_on_the_size_of_the_cohort() -> None:
    assert draw_patient(CohortConfig(patients=10), 7) == draw_patient(CohortConfig(patients=1000), 7)


def test_sites_differ_and_the_external_one_is_drawn_at_its_share() -> None:
    config = CohortConfig()
    drawn = [draw_patient(config, n) for n in range(600)]
    share = np.mean([site.maker is None for _, _, site in drawn])
    assert abs(share - config.external_share) < 0.05
    inside = {scanner.kvp for _, scanner, site in drawn if site.maker}
    outside = {scanner.kvp for _, scanner, site in drawn if not site.maker}
    assert not inside & outside, "the external scanner must be unseen"
