"""Training: truth and scales, splits, losses, exact resumption, calibration, and a bundle at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osteo_daemon.inference.bundle import read_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from train import truth
from train.cohort import CohortConfig, draw_patient, make_cohort
from train.data import MARGIN_VOXELS, NO_LABEL, Augmentation, VoiRow, batches, digest_of, open_set, write_table
from train.evaluate import HuModel, evaluate_run, fit_calibration, run_network
from train.export import export_run
from train.loop import LoopConfig, load_run
from train.losses import LossWeights, balance_loss, bmd_loss, device_loss, diagnosis_loss
from train.metrics import auc, balanced_accuracy, cluster_bootstrap, expected_calibration_error, regression
from train.multitask import run_training
from train.optim import MovingAverage, learning_rate_at
from train.pretrain import PretrainConfig, core_mask, pretrain, standardise
from train.splits import check_disjoint, part_of

SHAPE = (16, 24, 32)
NETWORK = MoEConfig(
    voi_shape=SHAPE,
    voi_spacing_mm=2.0,
    stage_channels=(8, 8, 8, 8),
    feature_width=16,
    hu_width=8,
    expert_width=8,
    levels=("L1", "L2"),
    bmd_levels=("L1", "L2"),
)
LOOP = LoopConfig(epochs=3, batch_size=16, patience=99, ema_decay=0.9, learning_rate=3e-3)


def easy_set(folder: Path, patients: int = 80) -> Path:
    """VOIs whose HU give the BMD away: what any sound training must learn."""
    rng = np.random.default_rng(4)
    stored = tuple(n + 2 * MARGIN_VOXELS for n in SHAPE)
    rows, vois = [], []
    for number in range(patients):
        external = number % 5 == 4
        sbmd = float(rng.uniform(0.6, 1.3))
        for level in ("L1", "L2"):
            density = 250.0 * (sbmd - 0.5)
            hu = rng.normal(density, 20.0, stored)
            hu[:, :, : stored[2] // 3] = -100.0 if level == "L1" else 300.0
            vois.append(hu.astype(np.int16))
            value = diag = None
            if not external:
                value, diag = sbmd, truth.diagnosis(truth.t_score(sbmd, level))
            rows.append(
                VoiRow(
                    patient=f"p{number}",
                    part=part_of(f"p{number}", external),
                    site="s",
                    device="Unseen" if external else truth.MAKERS[number % 3],
                    level=level,
                    age_years=60,
                    sex="F",
                    kvp=120.0,
                    thickness_mm=1.0,
                    kernel="soft",
                    phase="native",
                    density_mg_cm3=density,
                    sbmd_g_cm2=sbmd,
                    reading_g_cm2=value,
                    target_sbmd_g_cm2=value,
                    diagnosis=NO_LABEL if diag is None else diag,
                    true_diagnosis=truth.diagnosis(truth.t_score(sbmd, level)),
                )
            )
    folder.mkdir(parents=True)
    np.save(folder / "voi.npy", np.stack(vois))
    config: dict[str, Any] = {
        **json.loads(json.dumps(CohortConfig(patients=patients, levels=("L1", "L2")).to_json())),
    }
    write_table(folder, rows, {**config, "sha256": digest_of(config)})
    return folder


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
            levels = truth.draw_levels(
                rng,
                age_years=age,
                sex="F",
                osteophytes=0.2,
                density_mg_cm3=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, density),
                depth_mm=dict.fromkeys(truth.LEVEL_OFFSET_G_CM2, 35.0),
                maker="Hologic",
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


def test_a_run_is_never_continued_with_other_settings(finished: Path, easy: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        run_training(easy, finished, LOOP, NETWORK, LossWeights(bmd=2.0), Augmentation(), torch.device("cpu"))


def test_calibration_and_baseline(finished: Path, easy: Path) -> None:
    data = open_set(easy)
    run = load_run(finished)
    raw = run_network(run.network, data, data.indices("train", "val", "test"), run.devices, quiet=True)
    calibration = fit_calibration(raw, data)
    target = np.array([data.rows[i].target_sbmd_g_cm2 for i in raw.index])
    inside = np.abs(raw.bmd - target) <= calibration.bmd_interval_90 * calibration.bmd_sd_factor * raw.bmd_sd
    assert 0.9 <= inside.mean() <= 0.9 + 3.0 / len(target)
    plain = HuModel.fit(raw, data)
    assert np.corrcoef(plain.predict(raw, data), target)[0, 1] > 0.99
    assert plain.slope > 0


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


def test_pretraining_reads_texture_and_hands_its_encoder_on(easy: Path, tmp_path: Path) -> None:
    data = open_set(easy)
    config = PretrainConfig(epochs=4, batch_size=16, learning_rate=3e-3)
    summary = pretrain(data, tmp_path / "pre", config, NETWORK, torch.device("cpu"))
    assert summary["losses"][-1] < 0.9 * summary["losses"][0]
    assert summary["probe_pearson"] > 0.5
    again = pretrain(data, tmp_path / "pre", config, NETWORK, torch.device("cpu"))  # finished: nothing to train
    assert again["losses"] == summary["losses"]
    with pytest.raises(ValueError, match="other settings"):
        pretrain(data, tmp_path / "pre", replace(config, seed=1), NETWORK, torch.device("cpu"))
    encoder = tmp_path / "pre" / "encoder.pt"
    loop = replace(LOOP, epochs=1, learning_rate=1e-9, ema_decay=0.0)
    run_training(easy, tmp_path / "run", loop, NETWORK, LossWeights(), Augmentation(), torch.device("cpu"), encoder)
    started = torch.load(encoder, weights_only=True)["encoder"]
    kept = load_run(tmp_path / "run").network.encoder.state_dict()
    for name, value in started.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-3, atol=1e-5)


def test_strata_are_standardised_on_training_rows_only() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 2, (60, 3)), rng.normal(50, 9, (60, 3))])
    fit = np.concatenate([np.arange(40), np.arange(60, 100)])
    scaled = standardise(values, ["a"] * 60 + ["b"] * 60, fit)
    for rows in (slice(0, 40), slice(60, 100)):
        np.testing.assert_allclose(scaled[rows].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(scaled[rows].std(0), 1, atol=1e-4)
    changed = values.copy()
    changed[40:60] += 1000  # rows outside the fit
    np.testing.assert_array_equal(standardise(changed, ["a"] * 60 + ["b"] * 60, fit)[:40], scaled[:40])


def test_augmented_views_keep_the_radiomic_vector_and_blur_does_not() -> None:
    """Texture-preserving is tested: shifts, flips, small noise and offset pass, blur and gamma fail."""
    from scipy import ndimage

    from osteo_daemon.imaging.texture import discretise, texture_features

    rng = np.random.default_rng(3)
    config = MoEConfig()
    shape = tuple(n + 2 * MARGIN_VOXELS for n in config.voi_shape)
    hu = (150 + 45 * ndimage.gaussian_filter(rng.standard_normal(shape), 0.8) / 0.2).astype(np.float32)
    mask = core_mask(config)

    def vector(view: np.ndarray) -> np.ndarray:
        grey = discretise(torch.from_numpy(view.copy())[None], mask[None], -200.0, 25.0, 32)
        found = texture_features(grey, 32)
        names = (
            "glcm_contrast",
            "glcm_joint_entropy",
            "glrlm_small_emphasis",
            "gldm_large_emphasis",
            "histogram_entropy",
        )
        return np.array([float(found[name]) for name in names])

    plain = vector(hu[tuple(slice(4, -4) for _ in range(3))])
    for _ in range(5):
        view = vector(Augmentation().apply(hu, rng))
        np.testing.assert_allclose(view, plain, rtol=0.12)
    blurred = vector(ndimage.gaussian_filter(hu, 1.0)[tuple(slice(4, -4) for _ in range(3))])
    gamma = vector((np.clip(hu / 400, 0, 1) ** 0.5 * 400)[tuple(slice(4, -4) for _ in range(3))])
    assert np.abs(blurred / plain - 1).max() > 0.3
    assert np.abs(gamma / plain - 1).max() > 0.3


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
    assert 0.11 < share < 0.19
    inside = {scanner.kvp for _, scanner, site in drawn if site.maker}
    outside = {scanner.kvp for _, scanner, site in drawn if not site.maker}
    assert not inside & outside, "the external scanner must be unseen"
