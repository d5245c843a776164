"""Vertebrae unlike the training set are flagged beside the network's values, and nowhere else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import Level, NetworkFinding, QualityFlag, Severity, VertebraFinding
from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, write_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.network.outlier import OUTLIERS_NAME, OutlierModel
from tests.easy_vois import NETWORK, easy_set
from tests.unit.test_network_inference import CONFIG as TOY
from tests.unit.test_network_inference import make_bundle
from train.data import VoiSet, open_set
from train.outliers import ALTERATIONS, bundle_parts, fit_outliers, measure_outliers


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> VoiSet:
    return open_set(easy_set(tmp_path_factory.mktemp("outliers") / "set", patients=100))


@pytest.fixture(scope="module")
def network(easy: VoiSet) -> MultitaskMoE:
    torch.manual_seed(0)
    made = MultitaskMoE(NETWORK).eval()
    assert made.hu_statistics is not None
    inside = torch.from_numpy(easy.hu[:, 4:-4, 4:-4, 4:-4].astype(np.float32))
    made.hu_statistics.fit(made.hu_statistics.raw(inside))
    return made


@pytest.fixture(scope="module")
def model(network: MultitaskMoE, easy: VoiSet) -> OutlierModel:
    return fit_outliers(network, easy, quantile=0.95)


def test_distance_is_mahalanobis_under_the_shrunk_covariance() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(5, 3)))
    root = np.tril(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    fitted = OutlierModel(torch.ones(3).double(), torch.from_numpy(root), 1.0, 0.5, 0.9, 10, 10)
    centred = x.numpy() - 1.0
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, root @ root.T, centred))
    np.testing.assert_allclose(fitted.distance(x), expected)


def test_limits_hold_on_training_like_vertebrae_and_altered_ones_are_far(
    network: MultitaskMoE, model: OutlierModel, easy: VoiSet
) -> None:
    """The network is untrained: what is tested is the way from features to a flag, not how good features are."""
    figures = measure_outliers(network, easy, model, most=40)
    assert figures["flagged_test"] <= 0.25
    assert set(ALTERATIONS) <= set(figures)
    for name in ("metal", "noise_80_hu"):
        assert figures[name]["flagged"] > 0.9
        assert figures[name]["auroc_distance"] > 0.95


def test_external_rows_and_labels_do_not_enter(network: MultitaskMoE, model: OutlierModel, easy: VoiSet) -> None:
    hu = easy.hu.copy()
    hu[easy.indices("external", "test")] = 3000
    rows = tuple(replace(row, target_sbmd_g_cm2=None, diagnosis=-1) for row in easy.rows)
    again = fit_outliers(network, replace(easy, rows=rows, hu=hu), quantile=0.95)
    assert again.to_json() == model.to_json()
    assert torch.equal(again.mean, model.mean)


def test_values_that_are_no_numbers_are_outliers(model: OutlierModel) -> None:
    assert model.exceeds(float("nan"), 0.0)
    assert model.exceeds(0.0, float("nan"))
    assert not model.exceeds(model.distance_limit, model.entropy_limit)


# --- the bundle -------------------------------------------------------------------------------------------------


def with_outliers(path: Path, width: int | None = None) -> ModelBundle:
    """The toy bundle with limits around what it says of noise at 100 HU."""
    plain = make_bundle(path)
    made = MultitaskMoE(TOY).eval()
    made.load_state_dict(plain.load_weights())
    width = made.encoded_width if width is None else width
    generator = torch.Generator().manual_seed(0)
    hu = 100 + 20 * torch.randn((40, *TOY.voi_shape), generator=generator)
    with torch.inference_mode():
        seen = made(hu, torch.zeros(40, dtype=torch.long)).encoded[:, :width]
    spread = torch.nn.functional.pad(seen.std(0), (0, width - seen.shape[1]), value=1.0)
    mean = torch.nn.functional.pad(seen.mean(0), (0, width - seen.shape[1]))
    fitted = OutlierModel(mean, torch.diag(1 / (spread + 1e-3)), 3.0 * width**0.5, 1.0, 0.99, 40, 40)
    numbers, files = bundle_parts(fitted)
    return write_bundle(
        path,
        name="toy",
        version="2",
        status="investigational",
        metadata={},
        network=dict(plain.network),
        inference={**plain.inference, **numbers},
        weights=plain.load_weights(),
        model_card="toy",
        licence="none",
        extra_files=files,
    )


def predict(bundle: ModelBundle, voxels: np.ndarray) -> tuple[float | None, bool | None]:
    volume = CtVolume(voxels.astype(np.float32), np.diag([-2.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]])
    centre = volume.to_lps((np.array(voxels.shape) - 1) / 2)
    found = VertebraNetwork.from_bundle(bundle).predict(volume, [("L2", centre, [[0, 0, -1], [0, 1, 0], [1, 0, 0]])])
    return found[0].outlier_distance, found[0].out_of_distribution


def test_a_bundle_with_the_numbers_flags_and_one_without_says_nothing(tmp_path: Path) -> None:
    usual = 100 + 20 * np.random.default_rng(1).standard_normal((32, 32, 40))
    assert predict(make_bundle(tmp_path / "plain"), usual) == (None, None)
    bundle = with_outliers(tmp_path / "toy")
    assert OUTLIERS_NAME in bundle.files
    near, flagged = predict(bundle, usual)
    assert flagged is False
    metal = usual.copy()
    metal[12:20, 12:20, 12:28] = 3000
    far, flagged = predict(bundle, metal)
    assert flagged is True
    assert far > 2 * near


def test_numbers_and_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not fit"):
        VertebraNetwork.from_bundle(with_outliers(tmp_path / "wide", width=5))
    bundle = with_outliers(tmp_path / "toy")
    for bad in ({"distance_limit": 1.0}, {**bundle.inference["outliers"], "quantile": 2.0}, 7):
        broken = replace(bundle, inference={**bundle.inference, "outliers": bad})
        with pytest.raises(BundleError, match="outliers"):
            VertebraNetwork.from_bundle(broken)
    files = {name: digest for name, digest in bundle.files.items() if name != OUTLIERS_NAME}
    with pytest.raises(BundleError, match="missing"):
        VertebraNetwork.from_bundle(replace(bundle, files=files))


def test_the_flag_changes_neither_category_nor_the_vertebras_own_flags() -> None:
    from osteo_daemon.domain.findings import Attenuation

    estimate = NetworkFinding("investigational", 0.9, -1.0, None, {"L1": 1.0}, (1.0,))
    flagged = replace(estimate, quality_flags=(QualityFlag("network_out_of_distribution", Severity.BLOCKING),))
    attenuation = Attenuation(mean=90.0, median=90.0, sd=20.0, volume_mm3=4000.0)

    def spine(network: NetworkFinding) -> list[VertebraFinding]:
        return [
            VertebraFinding(level, (0.0, 0.0, 0.0), 1.0, attenuation, network=network)
            for level in (Level.L1, Level.L2, Level.L3)
        ]

    assert decide(spine(estimate), []) == decide(spine(flagged), [])
    assert not any(vertebra.blocked for vertebra in spine(flagged))


# --- bundles of before ------------------------------------------------------------------------------------------

NETWORK_JSON_0_2_0 = json.loads(
    """{"voi_shape": [40, 48, 56], "voi_spacing_mm": 1.0, "window_hu": [-200.0, 800.0],
    "stage_channels": [16, 32, 64, 96], "stage_blocks": [1, 1, 1, 1], "stage_strides": [2, 2, 2, 1], "stem_kernel": 5,
    "norm_groups": 8, "hu_channel": true, "hu_width": 32, "feature_width": 128, "expert_count": 4, "expert_width": 64,
    "top_k": null, "gate_per_task": false, "gate_temperature": 1.0, "class_head": "ordinal",
    "levels": ["T12", "L1", "L2", "L3", "L4", "L5"], "bmd_levels": ["L1", "L2", "L3", "L4"], "level_width": 8,
    "bmd_centre_g_cm2": 1.0, "bmd_scale_g_cm2": 0.2, "device_count": 3, "dropout": 0.1}"""
)
"""configs/network.json of osteo-moe 0.2.0."""
SHAPES_0_2_0 = "f00dc4d6628bf00839aa04b2a0597046644d7f8b8847a743aca2bac4bbfda4f5"
"""sha256 of the names and shapes of its weights."""


def test_the_network_of_bundle_0_2_0_is_still_the_same_function() -> None:
    """Its configuration reads, its parameters keep names and shapes, and every output is bit for bit its formula's."""
    config = MoEConfig.from_json(NETWORK_JSON_0_2_0)
    torch.manual_seed(5)
    made = MultitaskMoE(config).eval()
    shapes = json.dumps({name: list(value.shape) for name, value in sorted(made.state_dict().items())})
    assert hashlib.sha256(shapes.encode()).hexdigest() == SHAPES_0_2_0
    hu = 150 + 60 * torch.randn((2, *config.voi_shape))
    level = torch.tensor([1, -1])
    with torch.inference_mode():
        out = made(hu, level)
        image, statistics = made.encoder(hu), made.hu_statistics(hu)
        features = made.fuse(torch.cat([image, made.hu_projection(statistics)], dim=1))
        router = made.routers[0]
        weights = (router.linear(router.norm(image)) / 1.0).softmax(dim=1)
        normed = made.experts.norm(features)
        residuals = torch.stack([expert(normed) for expert in made.experts.experts], dim=1)
        mixed = features + (weights.unsqueeze(-1) * residuals).sum(1)
        embedded = made.level_embedding(torch.tensor([1, 6]))
        falls = torch.cat([torch.zeros(1), torch.nn.functional.softplus(made.class_head.steps).cumsum(0)])
        score = made.class_head.score(torch.cat([mixed, embedded, statistics], dim=1))
        correction, log_variance = made.bmd_head.hidden(torch.cat([mixed, embedded], dim=1)).unbind(1)
        level_logits = made.level_head(mixed)
        bmd = 1.0 + 0.2 * (correction + made.bmd_head.linear(statistics).squeeze(1))
    assert torch.equal(out.gate_weights[:, 0], weights)
    assert torch.equal(out.class_logits, score + made.class_head.first - falls)
    assert torch.equal(out.bmd, bmd)
    assert torch.equal(out.bmd_log_variance, log_variance.clamp(-7, 3) + 2.0 * torch.log(torch.tensor(0.2)))
    assert torch.equal(out.level_logits, level_logits)
    assert torch.equal(out.encoded, torch.cat([image, statistics], dim=1))
