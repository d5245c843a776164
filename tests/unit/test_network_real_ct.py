"""The shipped network on real vertebrae. They have no DXA: only order, monotony and sane values can be asked for."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from benchmarks.inference import acrin as read_acrin
from benchmarks.inference import torso, values, with_added_hu
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.vertebra_network import VertebraNetwork

pytestmark = pytest.mark.real_ct


@pytest.fixture(scope="module")
def network() -> VertebraNetwork:
    return VertebraNetwork.from_bundle(find_bundle("osteo-moe"))


def test_denser_scan_gets_more_bmd_at_every_level(network: VertebraNetwork, acrin: Path, real_data: Path) -> None:
    """150-178 HU against about 110 HU, centres from the data's own reference."""
    dense = values(network.predict(*read_acrin(acrin)))
    light = values(network.predict(*torso(real_data / "totalsegmentator_example")))
    assert set(dense) == set(light) == {"L1", "L2", "L3", "L4"}
    for level in dense:
        assert dense[level] > light[level] + 0.03, level
    assert all(0.5 < bmd < 1.5 for bmd in (*dense.values(), *light.values()))


def test_added_hu_raise_bmd_at_every_level(network: VertebraNetwork, acrin: Path, real_data: Path) -> None:
    for volume, places in (read_acrin(acrin), torso(real_data / "totalsegmentator_example")):
        steps = [values(network.predict(with_added_hu(volume, places, hu), places)) for hu in (0, 20, 40, 60)]
        for lower, higher in itertools.pairwise(steps):
            assert all(higher[level] > lower[level] for level in lower)
        rise = statistics.mean(steps[-1].values()) - statistics.mean(steps[0].values())
        assert 0.02 < rise < 0.2
