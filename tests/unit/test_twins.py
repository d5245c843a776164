"""Twins: one vertebra drawn twice, so that only the change of its density may part the two predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.easy_vois import LOOP, NETWORK, SHAPE, easy_set
from train import truth
from train.data import CORE_SCALE, MARGIN_VOXELS, Augmentation, Batch, VoiSet, batches, open_set
from train.distributed import Ranks
from train.losses import LossWeights, twin_loss
from train.multitask import run_training

CHANGED = Augmentation(density=0.7, surround=0.5, size=0.5, rename=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VoiSet:
    folder = easy_set(tmp_path_factory.mktemp("easy") / "data", patients=20)
    found = open_set(folder)
    return replace(found, core=np.full(found.hu.shape, CORE_SCALE, dtype=np.uint8))


def drawn(data: VoiSet) -> list[Batch]:
    rows = data.indices("train")
    return list(batches(data, rows, NETWORK, ["Hologic"], 8, augmentation=CHANGED, twins=True, keep_last=False))


def test_twins_show_the_same_rows_by_other_draws(data: VoiSet) -> None:
    for batch in drawn(data):
        first, second = batch.index.chunk(2)
        assert len(batch.index) == 8
        assert torch.equal(first, second)
        assert len(set(first.tolist())) == 4
        for one, other in zip(*batch.hu.chunk(2), strict=True):
            assert not torch.equal(one, other)
    once = torch.cat([batch.index.chunk(2)[0] for batch in drawn(data)])
    assert len(set(once.tolist())) == len(once) == len(data.indices("train")) // 4 * 4


def test_what_was_added_is_what_the_target_moved_by(data: VoiSet) -> None:
    moved = 0
    for batch in drawn(data):
        own = torch.tensor([data.rows[i].target_sbmd_g_cm2 for i in batch.index.tolist()], dtype=torch.float32)
        torch.testing.assert_close(batch.bmd - own, batch.added, rtol=0, atol=1e-6)
        moved += int((batch.added != 0).sum())
    assert moved > 5


def test_the_loss_forgives_the_patient_and_nothing_else() -> None:
    added = torch.tensor([0.0, 0.05, 0.1, -0.02])
    patient = torch.tensor([0.7, 1.2]).repeat(2)
    assert float(twin_loss(patient + added, added, 0.2)) == pytest.approx(0.0, abs=1e-12)
    # one pair 0.1 apart beyond its change: half a scale, squared, over two pairs
    assert float(twin_loss(patient + added + torch.tensor([0.1, 0, 0, 0]), added, 0.2)) == pytest.approx(0.125)
    assert float(twin_loss(patient, added, 0.2)) > 0


def test_processes_keep_twins_together_or_refuse(data: VoiSet) -> None:
    for rank in (0, 1):
        first, second = Ranks(rank, 2).share(drawn(data)[0]).index.chunk(2)
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match="evenly"):  # four vertebrae of a batch of eight for eight processes
        Ranks(0, 8).check_batch(4)


def test_other_surroundings_leave_body_and_bone(data: VoiSet) -> None:
    stored = tuple(n + 2 * MARGIN_VOXELS for n in SHAPE)
    hu = np.full(stored, 40.0, dtype=np.float32)
    hu[:, -MARGIN_VOXELS - 2 :, :] = 300.0  # bone at the back
    plain = Augmentation(shift_voxels=0, flip=False, noise_hu=0.0, offset_hu=0.0, cutout=0.0)
    around = replace(plain, surround=1.0)
    same = plain.apply(hu, np.random.default_rng(0), SHAPE, NETWORK.voi_spacing_mm)
    views = [around.apply(hu, np.random.default_rng(seed), SHAPE, NETWORK.voi_spacing_mm) for seed in range(5)]
    body = tuple(slice(n // 2 - 4, n // 2 + 4) for n in SHAPE)
    for view in views:
        assert np.array_equal(view[body], same[body])
        assert np.array_equal(view[same == 300.0], same[same == 300.0])
        assert abs(float(view[0, 0, 0]) - 40.0) > 0.1
    assert np.std([view[0, 0, 0] for view in views]) > 1.0


def test_a_larger_person_has_larger_bodies_of_the_same_hu(data: VoiSet) -> None:
    """Seen from the front, a deeper body projects more bone; its density stays."""
    hu = np.zeros(data.hu.shape, dtype=np.int16)
    middle = (slice(n // 2 + MARGIN_VOXELS - 5, n // 2 + MARGIN_VOXELS + 5) for n in SHAPE)
    hu[(slice(None), *middle)] = 200
    bare = Augmentation(shift_voxels=0, flip=False, noise_hu=0.0, offset_hu=0.0, cutout=0.0, size=1.0)
    found = replace(data, hu=hu)
    for batch in batches(found, found.indices("train"), NETWORK, ["Hologic"], 8, augmentation=bare):
        factor = (batch.hu.double().sum(dim=(1, 2, 3)) / (200.0 * 1000)).pow(1 / 3)
        added = torch.tensor([truth.size_adds_g_cm2(float(f)) for f in factor])
        assert float((batch.added - added).abs().max()) < 0.005
        assert float(batch.hu.amax()) == 200.0
        assert float(factor.std()) > 0.02


def test_bmd_follows_the_told_name_and_the_level_head_the_true_one(data: VoiSet) -> None:
    bare = Augmentation(shift_voxels=0, flip=False, noise_hu=0.0, offset_hu=0.0, cutout=0.0, rename=0.6)
    told = 0
    for batch in batches(data, data.indices("train"), NETWORK, ["Hologic"], 8, augmentation=bare):
        for k, i in enumerate(batch.index.tolist()):
            row, name = data.rows[i], NETWORK.levels[int(batch.given_level[k])]
            moved = truth.LEVEL_OFFSET_G_CM2[name] - truth.LEVEL_OFFSET_G_CM2[row.level]
            assert row.target_sbmd_g_cm2 is not None
            assert float(batch.bmd[k]) == pytest.approx(row.target_sbmd_g_cm2 + moved, abs=1e-6)
            assert float(batch.added[k]) == pytest.approx(moved, abs=1e-6)
            assert int(batch.diagnosis[k]) == row.diagnosis
            assert NETWORK.levels[int(batch.level[k])] == row.level
            told += name != row.level
    assert told > 3


def test_a_training_with_twins_reports_their_loss(tmp_path: Path) -> None:
    folder = easy_set(tmp_path / "data", patients=20)
    loop = replace(LOOP, epochs=1)
    run_training(folder, tmp_path / "run", loop, NETWORK, LossWeights(twin=4.0), Augmentation(), torch.device("cpu"))
    assert '"train_twin"' in (tmp_path / "run" / "history.json").read_text()
