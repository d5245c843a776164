"""The localizer's network and its configuration."""

from __future__ import annotations

import json

import pytest
import torch

from osteo_daemon.network.localizer import N_CLASSES, LocalizerConfig, SpineClass, SpineLocalizerNet, window_input


def small() -> LocalizerConfig:
    return LocalizerConfig(channels=(4, 8, 8), strides=(2, 2), residual_units=1, patch_voxels=(16, 16, 16))


def test_configuration_survives_json() -> None:
    config = LocalizerConfig()
    stored = json.loads(json.dumps(config.to_dict()))
    assert LocalizerConfig.from_dict(stored) == config
    assert stored["outputs"][:N_CLASSES] == [c.name.lower() for c in SpineClass]


def test_unknown_or_impossible_values_are_refused() -> None:
    stored = LocalizerConfig().to_dict()
    with pytest.raises(ValueError, match="dropout"):
        LocalizerConfig.from_dict({**stored, "dropout": 0.1})
    with pytest.raises(ValueError, match="strides"):
        LocalizerConfig.from_dict({**stored, "strides": [2, 2]})
    with pytest.raises(ValueError, match="windows"):
        LocalizerConfig.from_dict({**stored, "windows_hu": [[100, -100]]})


def test_output_shapes_and_that_every_configured_value_reaches_the_network() -> None:
    net = SpineLocalizerNet(small()).eval()
    logits, phase = net(torch.zeros(2, 2, 16, 16, 16))
    assert logits.shape == (2, N_CLASSES, 16, 16, 16)
    assert phase.shape == (2, 2, 16, 16, 16)
    wider = SpineLocalizerNet(LocalizerConfig(channels=(8, 8, 8), strides=(2, 2), residual_units=1))
    assert sum(p.numel() for p in wider.parameters()) > sum(p.numel() for p in net.parameters())


def test_windows_map_their_limits_to_one_and_clip() -> None:
    hu = torch.tensor([-2000.0, -160.0, 90.0, 340.0, 3000.0]).view(1, 1, 5, 1, 1)
    x = window_input(hu, ((-160.0, 340.0), (-1024.0, 1200.0)))
    assert x.shape == (1, 2, 5, 1, 1)
    assert x[0, 0].flatten().tolist() == pytest.approx([-1, -1, 0, 1, 1])
    assert x[0, 1, 0].item() == -1
    assert -1 < x[0, 1, 2].item() < 1
