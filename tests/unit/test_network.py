"""The network: shapes, monotony by construction, and results that no batch-mate can change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from osteo_daemon.errors import BundleError
from osteo_daemon.network.config import CLASSES, MoEConfig
from osteo_daemon.network.encoder import HU_STATISTICS, GrainStatistics, HuStatistics
from osteo_daemon.network.heads import OrdinalHead, class_probabilities
from osteo_daemon.network.moe import Experts, Router, gate_entropy
from osteo_daemon.network.multitask import UNKNOWN_LEVEL, MultitaskMoE

SMALL = MoEConfig(
    voi_shape=(16, 24, 32), voi_spacing_mm=2.0, stage_channels=(8, 8, 16, 16), feature_width=32, expert_width=16
)


def vois(count: int, config: MoEConfig = SMALL, seed: int = 0) -> torch.Tensor:
    """(N, D, H, W) noise about a level of its own each."""
    generator = torch.Generator().manual_seed(seed)
    base = 150.0 * torch.rand((count, 1, 1, 1), generator=generator)
    return base + 40.0 * torch.randn((count, *config.voi_shape), generator=generator)


def network(config: MoEConfig = SMALL) -> MultitaskMoE:
    torch.manual_seed(3)
    made = MultitaskMoE(config)
    for router in made.routers:  # gates that differ between samples
        torch.nn.init.normal_(router.linear.weight, std=0.5)
    return made


VARIANTS = {
    "default": SMALL,
    "top-k": replace(SMALL, top_k=2),
    "gate per task": replace(SMALL, gate_per_task=True),
    "softmax": replace(SMALL, class_head="softmax"),
    "no side channel": replace(SMALL, hu_channel=False),
    "one expert": replace(SMALL, expert_count=1, device_count=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_sums(variant: str) -> None:
    config = VARIANTS[variant]
    out = network(config).eval()(vois(3), torch.tensor([0, 2, UNKNOWN_LEVEL]))
    probabilities = class_probabilities(out.class_logits, len(CLASSES))
    assert probabilities.shape == (3, 3)
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    assert out.bmd.shape == out.bmd_log_variance.shape == (3,)
    assert out.level_logits.shape == (3, len(config.levels))
    assert out.gate_weights.shape == (3, 3 if config.gate_per_task else 1, config.expert_count)
    torch.testing.assert_close(out.gate_weights.sum(2), torch.ones(out.gate_weights.shape[:2]))
    if config.top_k:
        assert ((out.gate_weights > 0).sum(2) == config.top_k).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_mates_change_nothing(variant: str, training: bool) -> None:
    """Also in training mode (without dropout): no layer may learn or use statistics of the batch."""
    made = network(replace(VARIANTS[variant], dropout=0.0)).train(training)
    level = torch.tensor([1, 2, 3, UNKNOWN_LEVEL])
    mates = vois(4)
    with torch.no_grad():
        together = made(mates, level)
        wild = mates.clone()
        wild[1:] = 3000.0 * torch.randn(wild[1:].shape)
        beside_wild = made(wild, level)
        alone = made(mates[:1], level[:1])
    for name, a, b, c in zip(together._fields, together, beside_wild, alone, strict=True):
        torch.testing.assert_close(a[:1], b[:1], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        # another batch size may choose another convolution kernel: rounding, magnified by the untrained gate
        torch.testing.assert_close(a[:1], c, rtol=2e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_the_batch_check_can_fail() -> None:
    made = network()
    made.encoder.stem[1] = torch.nn.BatchNorm3d(SMALL.stage_channels[0])
    mates = vois(4)
    wild = mates.clone()
    wild[1:] *= 20
    level = torch.zeros(4, dtype=torch.long)
    assert not torch.allclose(made(mates, level).bmd[0], made(wild, level).bmd[0], atol=1e-4)


def test_level_conditions_bmd_and_class_but_not_level() -> None:
    made, hu = network().eval(), vois(1)
    first, second, unknown = (made(hu, torch.tensor([index])) for index in (1, 4, UNKNOWN_LEVEL))
    assert first.bmd != second.bmd
    assert first.bmd != unknown.bmd
    assert not torch.equal(first.class_logits, second.class_logits)
    assert torch.equal(first.level_logits, second.level_logits)


def test_size_of_the_default_network() -> None:
    assert sum(p.numel() for p in MultitaskMoE(MoEConfig()).parameters()) <= 1_000_000


def test_hu_statistics_measure_the_regions_they_name() -> None:
    config = MoEConfig()
    statistics = HuStatistics(config)
    axes = [(torch.arange(n) - (n - 1) / 2) for n in config.voi_shape]
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    body = (d.abs() < 14) & (h.abs() < 17) & (w.abs() < 23)
    hu = torch.where(body, 150.0 - 2.0 * d, torch.full_like(d, -100.0))
    values = dict(zip(HU_STATISTICS, statistics.raw(hu[None])[0].tolist(), strict=True))
    assert values["core_mean"] == pytest.approx(150, abs=0.5)
    assert values["core_p50"] == pytest.approx(150, abs=2)
    assert values["cranial_mean"] > values["middle_mean"] + 5 > values["caudal_mean"] + 10
    assert values["surround_p10"] == pytest.approx(-100)
    # 34 mm of 150 HU in the line of projection
    assert values["areal_bone"] == pytest.approx(3.4 * 1.5, rel=0.02)
    denser = dict(zip(HU_STATISTICS, statistics.raw(torch.where(body, hu + 20, hu)[None])[0].tolist(), strict=True))
    for name in ("core_mean", "core_p10", "core_p90", "cranial_mean", "middle_mean", "caudal_mean"):
        assert denser[name] - values[name] == pytest.approx(20, abs=0.1)


def test_hu_statistics_standardise() -> None:
    statistics = HuStatistics(SMALL)
    raw = statistics.raw(vois(64))
    statistics.fit(raw)
    standard = statistics(vois(64))
    torch.testing.assert_close(standard.mean(0), torch.zeros(len(HU_STATISTICS)), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(len(HU_STATISTICS)), atol=1e-3, rtol=0)


def test_statistics_of_the_training_set_travel_with_the_weights() -> None:
    made = network()
    made.hu_statistics.fit(made.hu_statistics.raw(vois(32)))
    other = MultitaskMoE(SMALL)
    other.load_state_dict(made.state_dict())
    level = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(made.eval()(vois(2), level).bmd, other.eval()(vois(2), level).bmd)


def test_grain_statistics_tell_noise_and_sharpness_apart() -> None:
    grain = GrainStatistics()
    noise = torch.randn(4, 24, 24, 32, generator=torch.Generator().manual_seed(3))
    quiet, loud = grain.raw(2.0 * noise), grain.raw(4.0 * noise)
    # no difference of 2 HU noise reaches the limit of 50 HU: twice the noise is log 2 more, along every axis
    unclipped = [2, 5, 8, 11, 14, 17]
    torch.testing.assert_close((loud - quiet)[:, unclipped].mean(0), torch.full((6,), 0.6931), atol=1e-3, rtol=0)
    # noise without memory differs from the mean of its neighbours by sqrt(3/2) SD, whatever their distance
    expected = math.log(2.0 * math.sqrt(1.5) * math.sqrt(2 / math.pi))
    torch.testing.assert_close(quiet[:, unclipped].mean(0), torch.full((6,), expected), atol=0.03, rtol=0)
    # smoothed along one axis alone by (1, 2, 1) / 4, which leaves differences of SD 0.306 at one voxel, 0.661 at two
    smooth = 0.25 * noise.roll(1, 1) + 0.5 * noise + 0.25 * noise.roll(-1, 1)
    along = grain.raw(8.0 * smooth).mean(0)
    assert float(along[1 * 3 + 2] - along[2]) == pytest.approx(math.log(0.661 / 0.306), abs=0.03)
    assert abs(along[3 * 3 + 2] - along[2 * 3 + 2]) < 0.05
    # what lies outside the window, air and metal, adds none
    assert torch.equal(grain.raw(noise - 2000.0), grain.raw(torch.full_like(noise, -200.0)))


def test_gates_see_the_grain_and_old_networks_have_none() -> None:
    config = replace(SMALL, grain_channel="gates")
    made = MultitaskMoE(config).eval()
    for router in made.routers:
        torch.nn.init.normal_(router.by_grain[-1].weight)
    still = torch.zeros(1, dtype=torch.long)
    flat = torch.full((1, *SMALL.voi_shape), 40.0)
    rough = flat + 30.0 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
    image = [torch.zeros(1, made.encoder.width)]
    gates = [made.routers[0](image[0], made.grain_statistics(hu)).weights for hu in (flat, rough)]
    assert not torch.allclose(*gates, atol=0.01)
    assert "routers.0.by_grain.0.weight" in made.state_dict()
    assert not any("grain" in name for name in MultitaskMoE(SMALL).state_dict())
    # seen by the gates alone: without experts' differences nothing else may move. Told to all, the features move
    for channel, same in (("gates", True), ("all", False)):
        torch.manual_seed(5)
        told = MultitaskMoE(replace(SMALL, grain_channel=channel)).eval()
        encoded = told.encode(flat)
        other = encoded._replace(grain=encoded.grain + 1.0)
        assert torch.equal(told.decide(encoded, still).features, told.decide(other, still).features) is same
    assert made(flat, still).gate_weights.shape == (1, 1, SMALL.expert_count)
    assert made.grain_statistics(1e3 * rough).abs().max() <= 3.0
    with pytest.raises(ValueError, match="grain_channel"):
        replace(SMALL, hu_channel=False, grain_channel="all")


def test_a_bundle_older_than_the_grain_still_opens() -> None:
    values = SMALL.to_json()
    del values["grain_channel"]
    assert MoEConfig.from_json(values) == SMALL
    del values["dropout"]
    with pytest.raises(BundleError, match="dropout"):
        MoEConfig.from_json(values)


def test_ordinal_probabilities_are_ordered_for_any_weights() -> None:
    head = OrdinalHead(4, 5)
    with torch.no_grad():
        head.steps.copy_(torch.tensor([-30.0, 5.0, -1.0]))
    logits = head(torch.randn(50, 4))
    assert (logits.diff(dim=1) <= 0).all()
    assert (class_probabilities(logits, 5, temperature=1.7) >= 0).all()


def test_temperature_flattens() -> None:
    logits = torch.tensor([[3.0, 1.0]])
    assert class_probabilities(logits, 3, 4.0).max() < class_probabilities(logits, 3).max()


def test_gate_entropy_bounds() -> None:
    assert gate_entropy(torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)
    assert gate_entropy(torch.full((1, 4), 0.25)).item() == pytest.approx(1.0)
    assert gate_entropy(torch.ones(1, 1)).item() == 0.0


def test_top_k_equals_dense_when_all_are_kept_and_gradient_reaches_chosen_experts_only() -> None:
    torch.manual_seed(0)
    dense, sparse = Router(6, 3, None, 1.0), Router(6, 3, 1, 1.0)
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(1, 6)
    experts = Experts(6, 4, 3)
    gate = sparse(x)
    experts(torch.randn(1, 6), gate.weights).sum().backward()
    chosen = int(gate.weights.argmax())
    for index, expert in enumerate(experts.experts):
        used = expert[2].weight.grad.abs().sum() > 0
        assert bool(used) == (index == chosen)
    all_kept = Router(6, 3, 3, 1.0)
    all_kept.load_state_dict(dense.state_dict())
    torch.testing.assert_close(all_kept(x).weights, dense(x).weights)


def test_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="HU"):
        network()(torch.zeros(1, 16, 16, 16), torch.tensor([0]))


def test_config_round_trip_and_refusals() -> None:
    values = replace(MoEConfig(), top_k=2).to_json()
    assert MoEConfig.from_json(values) == replace(MoEConfig(), top_k=2)
    missing = {k: v for k, v in values.items() if k != "levels"}
    for bad in (
        missing,
        {**values, "x": 1},
        {**values, "top_k": 9},
        {**values, "voi_shape": [1, 2]},
        {**values, "dropout": "a"},
    ):
        with pytest.raises(BundleError, match=r"network\.json"):
            MoEConfig.from_json(bad)


def test_image_features_move_bmd_within_the_bound_and_hu_beyond_it() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, bmd_correction_g_cm2=0.06)
    network = MultitaskMoE(config).eval()
    assert network.hu_statistics is not None
    network.bmd_head.hidden[-1].weight.data.mul_(1e4)
    hu = 100.0 + 50.0 * torch.randn(16, *config.voi_shape)
    level = torch.zeros(16, dtype=torch.long)
    with torch.inference_mode():
        encoded = network.encode(hu)
        bmd = network.decide(encoded, level).bmd
        network.bmd_head.limit = 1e-9
        line = network.decide(encoded, level).bmd
        denser = network.decide(network.encode(hu + 1000.0), level).bmd
    assert 0.03 < float((bmd - line).abs().max()) <= 0.06 + 1e-6
    assert float((denser - line).abs().min()) > 0.06, "what the HU say is not bounded"


def test_a_bundle_older_than_the_bound_has_none() -> None:
    values = MoEConfig().to_json()
    del values["bmd_correction_g_cm2"]
    assert MoEConfig.from_json(values).bmd_correction_g_cm2 is None
    with pytest.raises(ValueError, match="bmd_correction_g_cm2"):
        replace(SMALL, bmd_correction_g_cm2=-0.1)
