"""Self-supervision: each mechanism learns, a stop changes nothing, and no augmentation alters texture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_voi
from tests.easy_vois import LOOP, NETWORK, easy_set
from train.data import MARGIN_VOXELS, Augmentation, VoiSet, open_set
from train.loop import load_run
from train.losses import LossWeights
from train.mechanisms import blocks, contrast_loss, local_texture, mask_blocks, reconstruction_loss, unblocks
from train.multitask import run_training
from train.pool import Pool, PoolConfig, build_pool
from train.pretrain import Material, PretrainConfig, draw, pretrain, views
from train.probe import linear_probe, load_encoder
from train.radiomics import BIN_WIDTH_HU, GREY_LEVELS, LOW_HU, Radiomics, core_mask
from train.strata import uncorrelated

CPU = torch.device("cpu")
SHORT = PretrainConfig(epochs=4, batch_size=16, learning_rate=3e-3, neighbours=3)


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return easy_set(tmp_path_factory.mktemp("pretrain") / "set")


@pytest.fixture(scope="module")
def data(easy: Path) -> VoiSet:
    return open_set(easy)


@pytest.fixture(scope="module")
def pool(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return build_pool([easy], tmp_path_factory.mktemp("pool") / "pool", NETWORK)


# --- the mechanisms ---------------------------------------------------------------------------------------------


def test_blocks_are_cut_and_put_back() -> None:
    hu = torch.arange(2 * 16 * 24 * 32, dtype=torch.float32).reshape(2, 16, 24, 32)
    cut = blocks(hu)
    assert cut.shape == (2, 2 * 3 * 4, 8, 8, 8)
    torch.testing.assert_close(cut[0, 0], hu[0, :8, :8, :8])
    torch.testing.assert_close(unblocks(cut, (16, 24, 32)), hu)


def test_masking_blanks_the_share_asked_for_and_nothing_else() -> None:
    hu = 100 + torch.rand(3, 16, 24, 32)
    seen, masked = mask_blocks(hu, 0.5, torch.Generator().manual_seed(0))
    assert (masked.sum(1) == 12).all()
    assert not torch.equal(masked[0], masked[1])
    kept = ~masked[..., None, None, None]
    torch.testing.assert_close(blocks(seen)[kept.expand_as(blocks(seen))], blocks(hu)[kept.expand_as(blocks(hu))])
    assert (blocks(seen)[masked] == 0).all()


def test_texture_consistency_prefers_a_textured_drawing_to_its_mean() -> None:
    """The reason for it: among drawings that miss every voxel the error of voxels alone likes the flat one best."""
    generator = torch.Generator().manual_seed(1)
    original = 0.2 * torch.randn((4, 16, 24, 32), generator=generator)
    masked = torch.ones((4, 24), dtype=torch.bool)
    flat = torch.zeros((4, 24, 8, 8, 8))
    other = blocks(0.2 * torch.randn((4, 16, 24, 32), generator=generator))
    assert reconstruction_loss(flat, original, masked, 0.0) < reconstruction_loss(other, original, masked, 0.0)
    assert reconstruction_loss(flat, original, masked, 0.5) > reconstruction_loss(other, original, masked, 0.5)
    blurred = torch.from_numpy(ndimage.gaussian_filter(original.numpy(), (0, 1, 1, 1)))
    assert (local_texture(blocks(blurred)) < local_texture(blocks(original)) - 0.5).all()


def test_contrast_knows_partners_and_leaves_neighbours_out() -> None:
    first = torch.eye(4)
    nobody = torch.zeros((4, 4), dtype=torch.bool)
    assert contrast_loss(first, first, nobody, 0.1) < 0.01
    assert contrast_loss(first, first.roll(1, 0), nobody, 0.1) > 5.0
    # a row whose other row points the same way: an error as a negative, none as a neighbour
    twin = torch.stack([first[0], first[0], first[2], first[3]])
    alike = nobody.clone()
    alike[0, 1] = alike[1, 0] = True
    assert contrast_loss(twin, twin, nobody, 0.1) > 0.3
    assert contrast_loss(twin, twin, alike, 0.1) < 0.01


def test_positives_are_the_pools_neighbours_of_other_patients(data: VoiSet, pool: Pool) -> None:
    material = Material.of(data, pool, 3)
    config = replace(SHORT, mechanism="b")
    for step in range(4):
        anchors, positives = np.split(draw(material, config, 0, step), 2)
        for anchor, positive in zip(anchors, positives, strict=True):
            assert positive in material.neighbours[anchor]
            assert material.patient[anchor] != material.patient[positive]
        alike = material.alike(anchors, positives)
        assert alike.diagonal().all()  # the positive itself lies within the anchor's reach


def test_the_external_hospital_and_other_parts_never_enter(data: VoiSet, pool: Pool) -> None:
    material = Material.of(data, pool, 3)
    assert {data.rows[i].part for i in material.rows} == {"train"}
    assert len(material.rows) == len(data.indices("train"))
    stolen = replace(data, rows=tuple(replace(row, part="test") for row in data.rows))
    with pytest.raises(ValueError, match="training part"):
        Material.of(stolen, pool, 3)


@pytest.mark.parametrize("mechanism", ["a", "b", "c", "abc"])
def test_each_mechanism_learns_and_its_encoder_can_be_read(
    mechanism: str, data: VoiSet, pool: Pool, easy: Path, tmp_path: Path
) -> None:
    config = replace(SHORT, mechanism=mechanism)
    summary = pretrain(data, tmp_path / "pre", config, NETWORK, CPU, pool, probe=False)
    for letter in mechanism:
        assert summary["history"][-1][letter] < 0.95 * summary["history"][0][letter], letter
    if mechanism != "abc":
        return
    encoder = tmp_path / "pre" / "encoder.pt"
    scores = linear_probe(load_encoder(encoder, NETWORK), data, NETWORK, CPU)
    assert scores["bmd_pearson"] > 0.5
    assert scores["level_accuracy"] > 0.9
    with pytest.raises(ValueError, match="other settings"):
        pretrain(data, tmp_path / "pre", replace(config, seed=1), NETWORK, CPU, pool)
    loop = replace(LOOP, epochs=1, learning_rate=1e-9, ema_decay=0.0)
    run_training(easy, tmp_path / "run", loop, NETWORK, LossWeights(), Augmentation(), CPU, encoder)
    started = torch.load(encoder, weights_only=True)["encoder"]
    kept = load_run(tmp_path / "run").network.encoder.state_dict()
    for name, value in started.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-3, atol=1e-5)


def test_stopped_pretraining_goes_on_as_if_it_had_not(
    data: VoiSet, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, mechanism="abc", epochs=2)
    pretrain(data, tmp_path / "unbroken", config, NETWORK, CPU, pool, probe=False)
    import train.pretrain as module

    class Stop(Exception):
        pass

    real, calls = module.views, 0

    def stop_in_the_second_epoch(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == len(data.indices("train")) // config.batch_size + 2:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(module, "views", stop_in_the_second_epoch)
    with pytest.raises(Stop):
        pretrain(data, tmp_path / "broken", config, NETWORK, CPU, pool, probe=False)
    monkeypatch.undo()
    pretrain(data, tmp_path / "broken", config, NETWORK, CPU, pool, probe=False)
    one, other = (torch.load(tmp_path / name / "encoder.pt", weights_only=True) for name in ("unbroken", "broken"))
    for name, value in one["encoder"].items():
        torch.testing.assert_close(value, other["encoder"][name], rtol=1e-4, atol=1e-5)


def test_mechanism_is_checked() -> None:
    for bad in ("", "d", "aa"):
        with pytest.raises(ValueError, match="mechanism"):
            PretrainConfig(mechanism=bad)
    with pytest.raises(ValueError, match="even"):
        PretrainConfig(mechanism="b", batch_size=7)


# --- texture is kept --------------------------------------------------------------------------------------------

TOLERANCE_SD = 0.3
"""A view keeps texture when the median vertebra's vector moves by less than this: root mean square over the pool's
features, each in standard deviations of the pool. Nine of ten vertebrae have to stay within twice as much."""

VERTEBRAE = 16


class Bench:
    """Rendered vertebrae with the pool's scale, and how far a transform moves their vectors."""

    def __init__(self) -> None:
        self.network = MoEConfig()
        self.radiomics = Radiomics(self.network)
        shape = tuple(n + 2 * MARGIN_VOXELS for n in self.network.voi_shape)
        self.centre = tuple(slice(MARGIN_VOXELS, -MARGIN_VOXELS) for _ in range(3))
        self.vois = []
        for k in range(VERTEBRAE):
            rng = np.random.default_rng([7, k])
            patient = VirtualPatient(seed=k, density_mg_cm3=float(rng.uniform(40, 200)))
            scanner = Scanner(
                seed=k,
                kernel=("soft", "standard")[k % 2],  # type: ignore[arg-type]
                noise_hu=float(rng.uniform(9, 22)),
                slice_thickness_mm=float(rng.uniform(1, 3)),
            )
            voi = render_voi(patient, "L2", scanner, shape, 1.0, np.random.default_rng(k)).voxels[::-1]
            self.vois.append(np.ascontiguousarray(voi, dtype=np.float32))
        core = np.zeros(shape, dtype=np.float32)
        core[self.centre] = core_mask(self.network).numpy()
        self.core = core
        plain = self.vectors([voi[self.centre] for voi in self.vois], [core[self.centre]] * VERTEBRAE)
        sd = np.maximum(plain.std(0), 1e-12)
        kept = uncorrelated((plain - plain.mean(0)) / sd, PoolConfig().maximum_correlation)
        self.kept, self.plain, self.sd = kept, plain[:, kept], sd[kept]

    def vectors(self, views: list[np.ndarray], cores: list[np.ndarray]) -> np.ndarray:
        """All features of views inside cores of one shape that may lie anywhere."""
        values, masks = [], []
        for view, core in zip(views, cores, strict=True):
            inside = np.argwhere(core > 0.5)
            box = tuple(slice(a, b + 1) for a, b in zip(inside.min(0), inside.max(0), strict=True))
            values.append(np.ascontiguousarray(view[box], dtype=np.float32))
            masks.append(np.ascontiguousarray(core[box] > 0.5))
        hu, mask = torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(masks))
        found = texture_features(discretise(hu, mask, LOW_HU, BIN_WIDTH_HU, GREY_LEVELS), GREY_LEVELS)
        return torch.stack([found[name] for name in self.radiomics.names], dim=1).numpy()

    def shift(self, change: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
        """Median and ninth decile over vertebrae; ``change`` gives the view and the core carried along with it."""
        made = [change(voi, k) for k, voi in enumerate(self.vois)]
        found = self.vectors([view for view, _ in made], [core for _, core in made])[:, self.kept]
        moved = (found - self.plain) / self.sd
        each = np.sqrt(np.square(moved).mean(1))
        return float(np.median(each)), float(np.quantile(each, 0.9))

    def keeps(self, change: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]) -> bool:
        median, most = self.shift(change)
        return median <= TOLERANCE_SD and most <= 2 * TOLERANCE_SD

    def intensities(self, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Any:
        """A change that moves nothing: the core stays where it is."""
        return lambda voi, k: (change(voi, np.random.default_rng(k))[self.centre], self.core[self.centre])


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_augmented_views_keep_the_radiomic_vector(bench: Bench) -> None:
    """Of the same tissue: where a view is shifted or flipped, the region is carried along."""
    still = Augmentation(noise_hu=0.0, offset_hu=0.0, cutout=0.0)

    def augmented(voi: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        # shift and flip are drawn first, so the same seed moves the core as it moves the view
        return (
            Augmentation().apply(voi, np.random.default_rng(k)),
            still.apply(bench.core, np.random.default_rng(k)),
        )

    assert bench.keeps(augmented), bench.shift(augmented)


def _unit(voi: np.ndarray) -> np.ndarray:
    return np.clip((voi + 200) / 1000, 0, 1)


def _elastic(voi: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    moves = [ndimage.gaussian_filter(rng.standard_normal(voi.shape), 4) for _ in range(3)]
    grid = np.meshgrid(*(np.arange(n) for n in voi.shape), indexing="ij")
    where = [axis + 3 * move / np.abs(move).max() for axis, move in zip(grid, moves, strict=True)]
    return ndimage.map_coordinates(voi, where, order=1, mode="nearest")


FORBIDDEN: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "blur of half a voxel": lambda voi, rng: ndimage.gaussian_filter(voi, 0.5),
    "blur of one voxel": lambda voi, rng: ndimage.gaussian_filter(voi, 1.0),
    "gamma 0.7": lambda voi, rng: 1000 * _unit(voi) ** 0.7 - 200,
    "gamma 1.5": lambda voi, rng: 1000 * _unit(voi) ** 1.5 - 200,
    "Bezier map": lambda voi, rng: 1000 * (0.3 * (1 - (u := _unit(voi))) ** 2 * u + 2.7 * (1 - u) * u**2 + u**3) - 200,
    "noise above the scan's own": lambda voi, rng: voi + rng.normal(0, 25, voi.shape),
    "elastic warp": _elastic,
    "sharpening": lambda voi, rng: 2 * voi - ndimage.gaussian_filter(voi, 1.0),
    "rotation by resampling": lambda voi, rng: ndimage.rotate(voi, 5, (0, 1), reshape=False, order=1, mode="nearest"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_changes_texture_fails_the_same_test(name: str, bench: Bench) -> None:
    median, _ = bench.shift(bench.intensities(FORBIDDEN[name]))
    assert median > 1.5 * TOLERANCE_SD


def test_views_are_augmented_by_seed_alone(data: VoiSet) -> None:
    rows = data.indices("train")[:3]
    first, again = (views(data, rows, NETWORK, Augmentation(), (0, 1, 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, views(data, rows, NETWORK, Augmentation(), (0, 1, 3)))
