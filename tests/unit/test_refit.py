"""Refits: the grown network says what its parent says, labels are judged, the rule holds, a killed refit ends alike."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import osteo_daemon.refitter
import train.candidate
import train.refit
import train.replay
from osteo_daemon.errors import ConfigurationError, RefitRefused
from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.network.encoder import GrainStatistics
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.registry.version import VERDICT_NAME, version_of
from tests.easy_vois import NETWORK
from tests.refits import OFFSET_G_CM2, make_parts, site_rows, write_site
from train.data import VoiRow, VoiSet
from train.features import Features
from train.refit import refit
from train.refit_progress import Progress
from train.replay import Replay, load_network
from train.site_config import FitConfig
from train.site_data import accept, deal
from train.site_experts import grown
from train.site_fit import FitStore, choose_strength
from train.verdict import MARGIN_G_CM2, auc_within, decide

CPU = torch.device("cpu")
QUICK = FitConfig(strengths=(math.inf, 0.03), steps=40, batch_size=48, outer_folds=2, inner_folds=2, repeats=60, seed=3)

Parts = tuple[ModelBundle, Path, Path, VoiSet]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    torch.set_num_threads(1)
    return make_parts(tmp_path_factory.mktemp("refit"))


@pytest.fixture(scope="module")
def done(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    bundle, replay, site, _ = parts
    out = tmp_path_factory.mktemp("out") / "refit"
    return out, refit(site, bundle, "fourth", out, QUICK, CPU, replay)


@pytest.mark.parametrize("copied", [(1,), (1, 1), (0, 2)])
def test_a_grown_network_with_warm_experts_says_what_its_parent_says(copied: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    parent = MultitaskMoE(replace(NETWORK, grain_channel="gates")).eval()
    for router in parent.routers:
        torch.nn.init.normal_(router.linear.weight)  # type: ignore[union-attr,arg-type]
    network = grown(parent, copied)
    hu, level = 200 * torch.randn(5, *NETWORK.voi_shape), torch.tensor([0, 1, 0, 1, -1])
    before, after = parent(hu, level), network(hu, level)
    for name in ("class_logits", "bmd", "bmd_log_variance", "level_logits"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-4, atol=1e-5)
    assert network.config.expert_count == parent.config.expert_count + len(copied)


def test_gates_that_begin_to_see_noise_say_at_first_what_they_said() -> None:
    torch.manual_seed(2)
    parent = MultitaskMoE(NETWORK).eval()
    hu, level = 200 * torch.randn(5, *NETWORK.voi_shape), torch.tensor([0, 1, 0, 1, -1])
    network = grown(parent, (1,), GrainStatistics().raw(hu))
    assert network.config.grain_channel == "gates"
    torch.testing.assert_close(network(hu, level).bmd, parent(hu, level).bmd, rtol=1e-4, atol=1e-5)
    features = Features(*(parent.encode(hu)[:2]), GrainStatistics().raw(hu), level)
    torch.testing.assert_close(network.decide(features.encoded(network), level).bmd, network(hu, level).bmd)


def test_a_new_expert_adds_nothing_of_its_own() -> None:
    torch.manual_seed(2)
    parent = MultitaskMoE(NETWORK).eval()
    network = grown(parent, (None,))
    features = torch.randn(4, NETWORK.feature_width)
    assert torch.equal(network.experts.experts[-1](features), torch.zeros_like(features))
    weights = network(200 * torch.randn(4, *NETWORK.voi_shape), torch.tensor([0, 0, 1, 1])).gate_weights
    assert float(weights[:, 0, -1].detach().max()) < 0.03


def altered(rows: list[VoiRow], change: Callable[[int, VoiRow], VoiRow]) -> tuple[VoiRow, ...]:
    return tuple(change(number, row) for number, row in enumerate(rows))


def test_labels_that_allow_no_refit_are_refused_with_the_reason(parts: Parts) -> None:
    data = parts[3]
    rows = site_rows(data)

    def refusal(changed: tuple[VoiRow, ...]) -> str:
        with pytest.raises(RefitRefused) as caught:
            accept(replace(data, rows=changed), "0", ("L1", "L2"))
        return caught.value.detail

    assert "10 labelled vertebrae of 5 patients" in refusal(tuple(rows[:10]))
    t_scores = altered(rows, lambda _, r: replace(r, target_sbmd_g_cm2=-1.7))
    assert "T-scores or another unit" in refusal(t_scores)
    mixed = altered(
        rows, lambda n, r: replace(r, target_sbmd_g_cm2=1000 * (r.target_sbmd_g_cm2 or 0)) if n % 7 == 0 else r
    )
    assert "lie outside" in refusal(mixed)
    assert "one class (normal)" in refusal(altered(rows, lambda _, r: replace(r, diagnosis=0)))
    assert "no densitometer has" in refusal(altered(rows, lambda n, r: replace(r, device=f"d{n // 2}")))


def test_few_of_a_class_or_device_are_told(parts: Parts) -> None:
    data = parts[3]
    rows = altered(
        site_rows(data),
        lambda n, r: replace(r, diagnosis=min(1, r.diagnosis), device="Rare" if n < 4 else r.device),
    )
    site = accept(replace(data, rows=rows), "0", ("L1", "L2"))
    assert site.devices == ("Fourth",)
    assert site.fits_classes
    assert any("Rare has 2 patients" in note for note in site.notes)
    assert any("osteoporosis" in note for note in site.notes)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("shuffled", lambda target: np.random.default_rng(3).permutation(target), "mixed up"),
        ("scale", lambda target: 1.3 + 0.2 * (target - 1.0), "another scale"),
    ],
)
def test_readings_that_do_not_go_with_the_images_are_refused_and_leave_a_verdict(
    parts: Parts, tmp_path: Path, name: str, change: Callable[[Any], Any], reason: str
) -> None:
    bundle, replay, _, data = parts
    rows = site_rows(data)
    patients = np.array([row.target_sbmd_g_cm2 for row in rows[::2]])
    moved = change(patients)
    wrong = [replace(row, target_sbmd_g_cm2=float(moved[n // 2])) for n, row in enumerate(rows)]
    out = tmp_path / "out"
    with pytest.raises(RefitRefused, match=reason):
        refit(write_site(tmp_path / name, data, wrong), bundle, "fourth", out, QUICK, CPU, replay)
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["verdict"] == "not_enough_data"
    assert verdict["recommended"] == "parent"
    assert verdict["candidate"] is None
    assert reason in verdict["reasons"][0]
    assert not (out / "refit").exists()


def test_patients_are_dealt_whole_and_by_class() -> None:
    patients = np.repeat([f"p{n}" for n in range(30)], 4)
    classes = np.repeat([2] * 6 + [0] * 24, 4)
    folds = deal(patients, classes, 3, 7)
    assert all(len(set(folds[patients == name])) == 1 for name in set(patients))
    assert [len(set(patients[(folds == fold) & (classes == 2)])) for fold in range(3)] == [2, 2, 2]
    assert (deal(patients, classes, 3, 7) == folds).all()
    assert (deal(patients, classes, 3, 8) != folds).any()


def test_the_parent_stays_unless_another_is_better_beyond_chance() -> None:
    rng = np.random.default_rng(1)
    patients = np.repeat([f"p{n}" for n in range(20)], 3)
    base = rng.normal(1.0, 0.3, 60)
    noise = rng.normal(0.0, 0.3, 60)
    assert choose_strength({math.inf: base, 0.1: base - 0.01 + noise}, patients) == math.inf
    assert choose_strength({math.inf: base, 0.1: base - 0.5 + noise, 0.01: base - 0.3}, patients) == 0.1


def interval(value: float, half: float = 0.004) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def compared(mae: dict[str, float], auc: float = 0.0) -> dict[str, Any]:
    differences = {
        name: {"mae": interval(value), "screening_auc": interval(auc), "diagnosis_auc": interval(0.0)}
        for name, value in mae.items()
    }
    return {"differences": differences, "ordered": ["screening", "diagnosis"]}


@pytest.mark.parametrize(
    ("refit_gain", "affine_gain", "harm", "auc", "verdict", "recommended"),
    [
        (-0.05, -0.02, 0.0, 0.0, "better", "refit"),
        (-0.05, -0.05, 0.0, 0.0, "better", "affine"),  # no worse than the refit: the simpler one
        (-0.05, -0.06, 0.0, 0.0, "better", "affine"),
        (-0.05, 0.0, 0.0, 0.0, "better", "refit"),
        (-0.05, -0.02, 0.05, 0.0, "worse", "affine"),  # better here, but others are forgotten
        (0.0, 0.0, 0.0, 0.0, "equal", "parent"),
        (0.03, 0.0, 0.0, 0.0, "worse", "parent"),
        (-0.05, 0.0, 0.0, -0.03, "worse", "parent"),  # patients are ordered worse
        (0.008, 0.0, 0.0, 0.0, "worse", "parent"),
        (0.0, 0.0, 0.0, 0.03, "better", "refit"),
    ],
)
def test_the_rule(
    refit_gain: float, affine_gain: float, harm: float, auc: float, verdict: str, recommended: str
) -> None:
    site = compared({"refit minus parent": refit_gain, "affine minus parent": affine_gain}, auc)
    site["differences"]["affine minus parent"]["screening_auc"] = interval(0.0)
    site["differences"]["refit minus affine"] = {
        **site["differences"]["refit minus parent"],
        "mae": interval(refit_gain - affine_gain),
    }
    others = compared({"refit minus parent": harm, "affine minus parent": 0.0})
    found = decide(site, others)
    assert (found.verdicts["refit"], found.recommended) == (verdict, recommended)


def test_an_auc_never_compares_what_two_models_said() -> None:
    score = np.array([0.1, 0.2, 0.3, 0.4, 5.1, 5.2, 5.3, 5.4])
    positive = np.array([False, False, True, True] * 2)
    folds = np.array([0] * 4 + [1] * 4)
    assert auc_within(score, positive, folds) == 1.0
    assert auc_within(score, positive, np.zeros(8, dtype=np.int64)) == 0.75
    assert np.isnan(auc_within(score, np.zeros(8, dtype=bool), folds))


def test_wide_intervals_are_not_enough_data() -> None:
    wide = {"mae": interval(0.0, 3 * MARGIN_G_CM2), "screening_auc": interval(0.0), "diagnosis_auc": interval(0.0)}
    names = ("refit minus parent", "affine minus parent", "refit minus affine")
    site = {"differences": dict.fromkeys(names, wide), "ordered": ["screening"]}
    found = decide(site, compared({"refit minus parent": 0.0, "affine minus parent": 0.0}))
    assert found.verdicts["refit"] == "not_enough_data"
    assert found.recommended == "parent"


def test_a_refit_learns_the_sites_offset_and_keeps_the_others(done: tuple[Path, dict[str, Any]], parts: Parts) -> None:
    verdict = done[1]
    models = verdict["figures"]["site"]["models"]
    assert models["parent"]["bias"]["value"] < -0.1
    assert models["parent"]["mae"]["value"] > 0.8 * OFFSET_G_CM2
    assert models["refit"]["mae"]["value"] < 0.5 * models["parent"]["mae"]["value"]
    assert abs(models["affine"]["bias"]["value"]) < 0.02
    others = verdict["figures"]["others"]["models"]
    # the affine recalibration moves everybody, an expert behind a gate need not
    assert others["refit"]["mae"]["value"] < others["affine"]["mae"]["value"]
    assert verdict["verdict"] in ("better", "worse")
    assert verdict["recommended"] in ("refit", "affine")


def test_candidates_are_whole_bundles_with_lineage_and_verdict(done: tuple[Path, dict[str, Any]], parts: Parts) -> None:
    out, verdict = done
    parent = parts[0]
    assert verdict["figures"]["bundles"] == ["affine", "refit"]
    for kind in ("refit", "affine"):
        bundle = read_bundle(out / kind)
        network = VertebraNetwork.from_bundle(bundle)
        version = version_of(bundle)
        assert (version.compared_with, version.data_sha256) == (parent.sha256, verdict["lineage"]["data_sha256"])
        assert version.verdict == json.loads((bundle.path / VERDICT_NAME).read_text())["verdict"]
        assert version.recommended == verdict["recommended"]
        assert bundle.version.startswith(f"1.0.0+fourth.{kind}.")
        assert bundle.status == "investigational"
        assert network.scale.name == parent.inference["bmd_scale"]["name"]
        assert f"**{version.verdict}**".replace("_", " ") in (bundle.path / "docs" / "README.md").read_text()
    refitted, frozen = load_network(read_bundle(out / "refit")), load_network(parent)
    assert refitted.config.expert_count == frozen.config.expert_count + 1
    for name, value in frozen.encoder.state_dict().items():
        assert torch.equal(refitted.encoder.state_dict()[name], value)
    registered = read_bundle(out / "refit").inference["training"]["site_experts"]
    assert registered == [{"expert": frozen.config.expert_count, "site": "fourth", "device": "Fourth"}]
    # features of the frozen encoder stay right: the next generation needs no virtual patient
    carried = read_bundle(out / "refit").load_tensors(train.replay.REPLAY_NAME)
    assert len(Replay.from_tensors(carried, refitted)) == len(parts[3].rows)


def test_progress_tells_the_stage_and_the_time_that_is_left(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    progress = Progress(path)
    told = []
    progress.begin("fits", 4)
    for _ in range(4):
        told.append(json.loads(path.read_text()))
        time.sleep(0.02)
        progress(1)
    told.append(json.loads(path.read_text()))
    progress.begin("verdict", 1)
    told.append(json.loads(path.read_text()))
    progress.close()
    assert [(entry["stage"], entry["done"], entry["total"]) for entry in told] == [
        *(("fits", done, 4) for done in range(5)),
        ("verdict", 0, 1),
    ]
    assert [entry["seconds_left"] is None for entry in told] == [True, False, False, False, False, True]
    assert told[1]["seconds_left"] >= 0.06 - 0.05  # three as long as the first, to a tenth of a second
    assert told[4]["seconds_left"] == 0


class Killed(Exception):
    """Stands for a SIGKILL between two pieces of work."""


def test_a_refit_that_was_killed_ends_with_the_same_bytes(
    done: tuple[Path, dict[str, Any]], parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, replay, site, _ = parts
    out = tmp_path / "out"
    count = 0
    get = FitStore.get

    def dying(self: FitStore, name: str, make: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise Killed
        return get(self, name, make)

    monkeypatch.setattr(FitStore, "get", dying)
    with pytest.raises(Killed):
        refit(site, bundle, "fourth", out, QUICK, CPU, replay)
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "work" / "fits").iterdir()}
    assert len(kept) == 3
    (out / "work" / "fits" / "half.part").write_bytes(b"cut off")
    with pytest.raises(ConfigurationError, match="another refit"):
        refit(site, bundle, "elsewhere", out, QUICK, CPU, replay)
    refit(site, bundle, "fourth", out, QUICK, CPU, replay)
    assert count > 4
    for kind in ("refit", "affine"):
        assert read_bundle(out / kind).sha256 == read_bundle(done[0] / kind).sha256
    assert (out / "verdict.json").read_bytes() == (done[0] / "verdict.json").read_bytes()
    assert not (out / "work").exists()


def test_who_starts_a_refit_and_who_computes_it_agree() -> None:
    assert osteo_daemon.refitter._REPLAY_NAME == train.replay.REPLAY_NAME
    assert osteo_daemon.refitter._EXIT_REFUSED == train.refit.EXIT_REFUSED
    assert train.candidate.VERDICT_NAME == VERDICT_NAME
