"""The network channel from a bundle on a CT: what comes out, what is withheld, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.preprocess import SUPINE_AXES_LPS, VoiSpec, extract_voi
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, find_bundle, write_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.network.config import BmdScale, Calibration, MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study

CONFIG = MoEConfig(voi_shape=(16, 24, 32), voi_spacing_mm=2.0, stage_channels=(8, 8, 8, 8), feature_width=16)
SCALE = BmdScale("test scale", "test reference", 1.1, 0.1, {"L1": -0.1, "L2": 0.0, "L3": 0.05, "L4": 0.05})


def make_bundle(path: Path, **inference: Any) -> ModelBundle:
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "voi": VoiSpec(CONFIG.voi_shape, CONFIG.voi_spacing_mm).to_json(),
        "calibration": Calibration(
            class_temperature=2.0, bmd_slope=1.1, bmd_intercept_g_cm2=-0.05, bmd_sd_factor=1.5, bmd_interval_90=1.7
        ).to_json(),
        "bmd_scale": SCALE.to_json(),
    }
    return write_bundle(
        path,
        name="toy",
        version="1",
        status="investigational",
        metadata={},
        network=CONFIG.to_json(),
        inference={**values, **inference},
        weights=MultitaskMoE(CONFIG).state_dict(),
        model_card="toy",
        licence="none",
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> VertebraNetwork:
    return VertebraNetwork.from_bundle(make_bundle(tmp_path_factory.mktemp("zoo") / "toy"))


@pytest.fixture(scope="module")
def study() -> PhantomStudy:
    return render_study(VirtualPatient(seed=5, density_mg_cm3=120.0), coarse_scanner(), top="T12", bottom="L5")


@pytest.fixture(scope="module")
def volume(study: PhantomStudy) -> CtVolume:
    return CtVolume(study.voxels.astype(np.float32), study.affine)


def places(study: PhantomStudy) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Level, centre and axes (rows: caudal, posterior, left) from the phantom's own truth."""
    turn = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])
    return [(v.level, v.centre_lps_mm, turn @ v.axes.T) for v in study.vertebrae if v.level != "S1"]


def test_predictions_are_calibrated_and_complete(
    network: VertebraNetwork, volume: CtVolume, study: PhantomStudy
) -> None:
    vertebrae = places(study)
    found = network.predict(volume, vertebrae)
    assert [p.level for p in found] == ["T12", "L1", "L2", "L3", "L4", "L5"]
    for prediction in found:
        assert sum(prediction.level_probabilities.values()) == pytest.approx(1.0)
        assert sum(prediction.expert_weights) == pytest.approx(1.0)
        assert 0.0 <= prediction.gate_entropy <= 1.0
        if prediction.level in ("T12", "L5"):  # DXA does not measure them
            assert prediction.bmd_g_cm2 is prediction.t_score is prediction.class_probabilities is None
            continue
        assert sum(prediction.class_probabilities.values()) == pytest.approx(1.0)
        assert list(prediction.class_probabilities) == ["normal", "osteopenia", "osteoporosis"]
        low, high = prediction.bmd_interval_90_g_cm2
        assert high - low == pytest.approx(2 * 1.7 * prediction.bmd_sd_g_cm2)
        expected_t = (prediction.bmd_g_cm2 - 1.1 - SCALE.level_offset_g_cm2[prediction.level]) / 0.1
        assert prediction.t_score == pytest.approx(expected_t)


def test_calibration_is_applied(network: VertebraNetwork, volume: CtVolume, study: PhantomStudy) -> None:
    level, centre, axes = places(study)[2]
    raw = MultitaskMoE(CONFIG).eval()
    raw.load_state_dict(network.bundle.load_weights())
    voi = extract_voi(volume, centre, axes, network.voi)
    with torch.inference_mode():
        out = raw(torch.from_numpy(voi.hu)[None], torch.tensor([CONFIG.levels.index(level)]))
    prediction = network.predict(volume, [(level, centre, axes)])[0]
    assert prediction.bmd_g_cm2 == pytest.approx(1.1 * float(out.bmd) - 0.05, abs=2e-4)
    worse = torch.sigmoid(out.class_logits / 2.0)[0]
    assert prediction.class_probabilities["normal"] == pytest.approx(1.0 - float(worse[0]), abs=2e-4)
    assert prediction.bmd_sd_g_cm2 == pytest.approx(1.1 * 1.5 * float((0.5 * out.bmd_log_variance).exp()), rel=1e-3)


def test_a_vertebra_does_not_depend_on_the_others(
    network: VertebraNetwork, volume: CtVolume, study: PhantomStudy
) -> None:
    vertebrae = places(study)
    together = network.predict(volume, vertebrae)
    for index in (0, 3, 5):
        assert network.predict(volume, vertebrae[index : index + 1])[0] == together[index]
    backwards = network.predict(volume, vertebrae[::-1])
    assert backwards[::-1] == together


def test_small_batches_give_the_same(network: VertebraNetwork, volume: CtVolume, study: PhantomStudy) -> None:
    vertebrae = places(study)
    for a, b in zip(network.predict(volume, vertebrae), network.predict(volume, vertebrae, 4), strict=True):
        assert a.expert_weights == pytest.approx(b.expert_weights, abs=1e-4)
        assert a.bmd_g_cm2 == (b.bmd_g_cm2 if b.bmd_g_cm2 is None else pytest.approx(b.bmd_g_cm2, abs=1e-4))


def test_half_cut_vertebra_withholds_values(network: VertebraNetwork, volume: CtVolume, study: PhantomStudy) -> None:
    vertebrae = {level: (level, centre, axes) for level, centre, axes in places(study)}
    row = round(float(volume.to_index(vertebrae["L2"][1])[0]))
    cut = CtVolume(volume.voxels[:row], volume.affine)
    prediction = network.predict(cut, [vertebrae["L2"]])[0]
    assert prediction.coverage < 0.8
    assert prediction.bmd_g_cm2 is prediction.class_probabilities is prediction.t_score is None
    assert network.predict(cut, [vertebrae["L4"]])[0].bmd_g_cm2 is not None


def test_unknown_level_gets_level_probabilities_only(
    network: VertebraNetwork, volume: CtVolume, study: PhantomStudy
) -> None:
    prediction = network.predict(volume, [("T10", places(study)[2][1], SUPINE_AXES_LPS)])[0]
    assert prediction.bmd_g_cm2 is None
    assert sum(prediction.level_probabilities.values()) == pytest.approx(1.0)
    assert network.predict(volume, []) == []


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        ({"voi": VoiSpec((24, 24, 32), 2.0).to_json()}, "disagree"),
        ({"calibration": {"class_temperature": 1.0}}, "calibration"),
        ({"calibration": {**Calibration().to_json(), "bmd_sd_factor": 0.0}}, "calibration"),
        ({"bmd_scale": {"name": "x"}}, "bmd_scale"),
        ({"bmd_scale": None}, "bmd_scale"),
    ],
)
def test_incomplete_bundles_are_refused(tmp_path: Path, inference: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        VertebraNetwork.from_bundle(make_bundle(tmp_path / "toy", **inference))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "toy")
    other = replace(CONFIG, expert_count=3)
    with pytest.raises(BundleError, match="do not fit"):
        VertebraNetwork.from_bundle(replace(bundle, network=other.to_json()))


# --- the shipped bundle -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> VertebraNetwork:
    return VertebraNetwork.from_bundle(find_bundle("osteo-moe"))


def test_the_shipped_bundle_says_what_it_is(shipped: VertebraNetwork) -> None:
    assert shipped.bundle.status == "investigational"
    assert sum(w.numel() for w in shipped.bundle.load_weights().values()) < 1_100_000
    card = (shipped.bundle.path / "docs" / "README.md").read_text()
    assert "No clinical validation was done" in card
    assert "linear in core HU" in card


def test_the_shipped_network_follows_density(shipped: VertebraNetwork) -> None:
    """Denser virtual patients get more BMD and fewer of them osteoporosis; so does HU added to one scan."""
    means, osteoporosis = [], []
    for density in (50.0, 110.0, 180.0):
        patient = VirtualPatient(seed=9, density_mg_cm3=density)
        study = render_study(patient, coarse_scanner(2.0), top="L1", bottom="L4")
        scan = CtVolume(study.voxels.astype(np.float32), study.affine)
        found = [p for p in shipped.predict(scan, places(study)) if p.bmd_g_cm2 is not None]
        means.append(np.mean([p.bmd_g_cm2 for p in found]))
        osteoporosis.append(np.mean([p.class_probabilities["osteoporosis"] for p in found]))
    assert means[0] + 0.08 < means[1] < means[2] - 0.08
    assert osteoporosis[0] > osteoporosis[1] >= osteoporosis[2]
