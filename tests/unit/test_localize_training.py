"""What the localizer learns from: random anatomy keeps its labels and its count true."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from osteo_daemon.network.localizer import N_CLASSES, SpineClass
from train.localizer import CLASS_WEIGHTS, learning_rate, localizer_loss
from train.synthesis import scan, synthesise
from train.torso import N_LEVELS, N_TISSUES, SPACING_MM, Plane, Tissue, Torso, level_coordinate
from train.warp import random_level_edits, recount, resize_zone

UP = np.array([1.0, 0.0, 0.0])
GAP_MM = 36.0
FIRST_DISC_MM = 90.0
SHAPE = (105, 60, 60)
COLUMN_MM = (100.0, 90.0)  # y, x


@pytest.fixture(scope="module")
def torso() -> Torso:
    """A straight column with level planes in a cylinder of muscle."""
    discs = tuple(Plane(np.array([FIRST_DISC_MM + k * GAP_MM, *COLUMN_MM]), UP) for k in range(N_LEVELS))
    bodies = tuple(Plane(d.centre + GAP_MM / 2 * UP, UP) for d in discs)
    fine = [np.arange(2 * n) * SPACING_MM / 2 for n in SHAPE]
    z, y, x = np.meshgrid(*fine, indexing="ij")
    tissue = np.zeros(z.shape)
    tissue[np.hypot(y - 90, x - 90) < 85] = Tissue.MUSCLE
    column = np.hypot(y - COLUMN_MM[0], x - COLUMN_MM[1]) < 20
    u = (z - FIRST_DISC_MM) / GAP_MM
    disc = column & (np.abs(u - np.round(u)) * GAP_MM < 4) & (u > -0.2) & (u < N_LEVELS - 0.5)
    tissue[column & (u > 0)] = Tissue.BODY
    tissue[column & (u <= 0) & (u > -1)] = Tissue.S1_BODY
    tissue[disc] = Tissue.DISC
    hu = np.array([-1000.0 if t == 0 else 150.0 if t in (1, 3) else 50.0 for t in range(N_TISSUES)])
    coarse = tissue[::2, ::2, ::2].astype(int)
    points = torch.from_numpy(np.stack(np.meshgrid(*[np.arange(n) * SPACING_MM for n in SHAPE], indexing="ij")))
    knots = [plane for pair in zip(discs, bodies, strict=True) for plane in pair]
    channels = np.stack([hu[coarse], level_coordinate(knots, points).numpy(), np.where(coarse > 0, 6.0, 0.0)])
    return Torso(
        channels=torch.from_numpy(channels.astype(np.float32))[None],
        tissues=torch.from_numpy(tissue.astype(np.float32))[None, None],
        tissue_mean_hu=torch.from_numpy(hu.astype(np.float32)),
        discs=discs,
        bodies=bodies,
        column=np.stack([discs[0].centre - 20 * UP, *[plane.centre for plane in knots]]),
    )


def axis_points(low_mm: float, high_mm: float) -> torch.Tensor:
    """(3, n) points on the axis of the column, one a millimetre."""
    z = torch.arange(low_mm, high_mm)
    return torch.stack([z, torch.full_like(z, COLUMN_MM[0]), torch.full_like(z, COLUMN_MM[1])])


def test_the_level_coordinate_counts_discs(torso: Torso) -> None:
    knots = [plane for pair in zip(torso.discs, torso.bodies, strict=True) for plane in pair]
    u = level_coordinate(knots, axis_points(60, 320))
    assert u.numpy() == pytest.approx((np.arange(60, 320) - FIRST_DISC_MM) / GAP_MM, abs=0.35)
    assert u[int(FIRST_DISC_MM + 2 * GAP_MM) - 60].item() == pytest.approx(2.0, abs=1e-4)
    assert (u.diff() > 0).all()


@pytest.mark.parametrize("by", [-1, 1])
def test_recounting_moves_the_column_above_by_one_vertebra_and_says_so(torso: Torso, by: int) -> None:
    edit = recount(torso, 3, by)
    plane_mm = FIRST_DISC_MM + 3 * GAP_MM
    p = axis_points(100, 280)
    q = edit(p)
    below, above = p[0] < plane_mm - 1.5, p[0] > plane_mm + 1.5
    assert torch.equal(q[:, below], p[:, below])
    assert (q[0] - p[0])[above].numpy() == pytest.approx(by * GAP_MM, abs=1e-3)
    assert edit.levels == -by


def test_a_wedge_takes_height_from_the_front_only(torso: Torso) -> None:
    lower, upper = torso.discs[1], torso.discs[2]
    edit = resize_zone(1.5, lower, upper, front=8.0, back=0.0, half_depth_mm=17.0)
    top = torch.tensor(
        [[upper.centre[0] - 8, COLUMN_MM[0] - 17, 90.0], [upper.centre[0], COLUMN_MM[0] + 17, 90.0]]
    ).T.float()
    assert edit(top)[0].numpy() == pytest.approx([upper.centre[0]] * 2, abs=0.6)


def test_random_edits_keep_the_order_of_the_column(torso: Torso) -> None:
    for seed in range(60):
        q = axis_points(60, 260)
        for edit in random_level_edits(torso, np.random.default_rng(seed)):
            q = edit(q)
        steps = q[0].diff()
        # a vertebra that is put in sends the points back by one level once; nothing else may run backwards
        assert (steps < 0).sum() <= 3


def test_patches_are_reproducible_and_their_count_grows_along_the_column(torso: Torso) -> None:
    seen = set()
    for seed in range(12):
        first, again = synthesise(torso, (48, 32, 32), seed), synthesise(torso, (48, 32, 32), seed)
        assert torch.equal(first.hu, again.hu)
        assert torch.equal(first.labels, again.labels)
        assert first.hu.shape == (1, 48, 32, 32)
        assert first.hu.min() >= -1024
        assert first.hu.max() <= 3071
        seen |= set(first.labels.unique().tolist())
        disc = first.labels == SpineClass.DISC
        if disc.sum() > 100:
            turns = first.level_coordinate[disc]
            # the middle of a disc is a whole number of levels; its rims lie within a quarter
            assert ((turns - turns.round()).abs() < 0.3).float().mean() > 0.9
    assert {SpineClass.BODY, SpineClass.DISC, SpineClass.S1_BODY} <= seen
    assert not torch.equal(synthesise(torso, (48, 32, 32), 1).hu, synthesise(torso, (48, 32, 32), 2).hu)


def test_a_scan_keeps_the_mean_of_a_uniform_body() -> None:
    hu = torch.full((24, 24, 24), 100.0)
    means = [
        float(scan(hu, np.random.default_rng(s), torch.Generator().manual_seed(s))[6:-6, 6:-6, 6:-6].mean())
        for s in range(20)
    ]
    # the scanner's scale is off by 3 % and its zero by 6 HU, one standard deviation each
    assert np.mean(means) == pytest.approx(100, abs=25)
    assert np.std(means) > 5


def test_the_loss_is_weighted_cross_entropy_dice_and_phase() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, N_CLASSES, 8, 8, 8, generator=generator)
    labels = torch.randint(0, N_CLASSES, (1, 8, 8, 8), generator=generator)
    u = torch.rand(1, 8, 8, 8, generator=generator)
    region, phase = localizer_loss(logits, torch.zeros(1, 2, 8, 8, 8), labels, u)
    p = logits.softmax(dim=1)
    truth = F.one_hot(labels, N_CLASSES).movedim(-1, 1).float()
    axes = (0, 2, 3, 4)
    dice = (2 * (p * truth).sum(axes) + 1) / (p.sum(axes) + truth.sum(axes) + 1)
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(CLASS_WEIGHTS)) + (1 - dice[1:]).mean()
    assert region.item() == pytest.approx(expected.item(), rel=1e-5)
    assert phase.item() == pytest.approx(1.0, rel=1e-5)  # a silent phase is wrong by one everywhere
    angle = 2 * torch.pi * u
    _, exact = localizer_loss(logits, torch.stack([angle.cos(), angle.sin()], dim=1), labels, u)
    assert exact.item() == pytest.approx(0.0, abs=1e-6)


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    rates = [learning_rate(s, 10_000, 1e-3, 0.5) for s in range(10_000)]
    assert rates[0] < 1e-5
    assert rates[150:5000] == [1e-3] * 4850
    assert all(b <= a for a, b in pairwise(rates[5000:]))
    assert rates[-1] == pytest.approx(1e-5, rel=0.05)
