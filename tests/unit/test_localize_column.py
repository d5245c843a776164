"""Counting from ideal network output: a bent column of known planes, and what must not be named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import NotEligible
from osteo_daemon.inference.canonical import CanonicalVolume
from osteo_daemon.inference.decode import decode
from osteo_daemon.inference.naming import LEVELS_FROM_SACRUM
from osteo_daemon.inference.tiling import SpineMaps
from osteo_daemon.inference.vertebra import Localization
from osteo_daemon.network.localizer import SpineClass

SPACING_MM = 3.0
SHAPE = (110, 70, 70)  # 330 x 210 x 210 mm
EQUAL = (36.0,) * 7


def build(
    gaps_mm: Sequence[float] = EQUAL,
    *,
    sacrum: bool = True,
    bend_mm: float = 0.0,
    lean_mm: float = 0.0,
    phase_gaps_mm: Sequence[float] | None = None,
    last_rib: int | None = None,
    without_disc: int | None = None,
) -> tuple[SpineMaps, CanonicalVolume, list[np.ndarray]]:
    """Perfect maps of a column of 42 x 34 mm bodies with discs of 8 mm; returns true body centres in index mm too.

    With ``last_rib`` every vertebra from that number up bears ribs and those below have transverse processes. A lean
    tilts the discs with the line. ``without_disc`` fills one disc with bone.
    """
    z, y, x = np.meshgrid(*[np.arange(n) * SPACING_MM for n in SHAPE], indexing="ij")
    base = 60.0
    planes = base + np.concatenate([[0.0], np.cumsum(gaps_mm)])
    phase_planes = base + np.concatenate([[0.0], np.cumsum(phase_gaps_mm or gaps_mm)])

    def line(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = (height - base) / 250.0
        return 105 - bend_mm * np.sin(np.pi * t), 105 + lean_mm * np.sin(np.pi * t)

    cy, cx = line(z)
    column = ((y - cy) / 17) ** 2 + ((x - cx) / 21) ** 2 < 1
    p = np.zeros((len(SpineClass), *SHAPE), dtype=np.float32)
    step = (line(z + 1)[1] - line(z - 1)[1]) / 2
    along = z + step * (x - cx)
    nearest = np.abs(along[..., None] - planes).min(axis=-1)
    inside = column & (along > planes[0] - 4) & (along < planes[-1] + 4)
    disc = inside & (nearest <= 4)
    if without_disc is not None:
        disc &= np.abs(along - planes[without_disc]) > 4
    p[SpineClass.DISC][disc] = 1
    p[SpineClass.BODY][inside & ~disc] = 1
    if sacrum:
        p[SpineClass.S1_BODY][column & (along <= planes[0] - 4) & (along > planes[0] - 34)] = 1
    if last_rib is not None:
        for k, middle in enumerate((planes[:-1] + planes[1:]) / 2):
            aside = np.abs(x - cx)
            fall = 0.4 * np.maximum(aside - 28, 0) if k >= last_rib else 0.0
            bar = (np.abs(z - middle - 4 + fall) < 6) & (np.abs(y - cy - 28) < 6) & (aside > 12)
            p[SpineClass.POSTERIOR][bar & (aside < (28 if k >= last_rib else 40))] = 1
            if k >= last_rib:
                p[SpineClass.RIB][bar & (aside >= 28) & (aside < 95)] = 1
    canal = (y - cy - 26) ** 2 + (x - cx) ** 2 < 7**2
    p[SpineClass.CANAL][canal] = 1
    p[SpineClass.BACKGROUND] = 1 - p[1:].sum(axis=0).clip(max=1)
    u = np.interp(along, phase_planes, np.arange(len(phase_planes)))
    phase = np.stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)]).astype(np.float32) * inside
    hu = np.where(column, 150.0, 0.0).astype(np.float32)
    hu[disc] = 70.0
    canonical = CanonicalVolume(hu, np.ones(SHAPE, bool), SPACING_MM, np.array([-100.0, -80.0, 400.0]))
    middles = (planes[:-1] + planes[1:]) / 2
    centres = [np.array([m, *(float(v) for v in line(np.array(m)))]) for m in middles]
    return SpineMaps(p, phase), canonical, centres


def check_names(found: Localization, centres: list[np.ndarray], canonical: CanonicalVolume, within_mm: float) -> None:
    by_level = {v.level: v for v in found.vertebrae}
    for level, centre in zip(LEVELS_FROM_SACRUM[:6], centres, strict=False):
        assert by_level[level].centre_lps_mm == pytest.approx(centre[::-1] + canonical.origin_lps_mm, abs=within_mm)


@pytest.mark.parametrize("gap", [26.0, 31.0, 36.0, 40.0])
def test_names_are_counted_from_s1_for_small_and_large_spines(gap: float) -> None:
    maps, canonical, centres = build([gap] * 6)
    found = decode(maps, canonical)
    check_names(found, centres, canonical, 2.5)
    assert [v.level for v in found.vertebrae] == ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert found.anchor == "s1"
    assert not [f for f in found.flags if f.code == "level_uncertain"]
    assert all(v.level_certain and v.confidence > 0.8 for v in found.vertebrae)


@pytest.mark.parametrize(("bend", "lean"), [(25.0, 0.0), (-15.0, 0.0), (10.0, 14.0), (0.0, -14.0)])
def test_a_bent_column_keeps_its_names(bend: float, lean: float) -> None:
    maps, canonical, centres = build(bend_mm=bend, lean_mm=lean)
    check_names(decode(maps, canonical), centres, canonical, 4.0)


def test_scoliosis_is_said() -> None:
    straight = decode(*build()[:2])
    curved = decode(*build(lean_mm=22.0)[:2])
    assert "scoliosis" not in {f.code for f in straight.flags}
    assert "scoliosis" in {f.code for f in curved.flags}


def test_growing_gaps_are_fine_and_a_double_gap_is_not_trusted() -> None:
    maps, canonical, centres = build([38, 37, 36, 34.5, 33, 31, 29])
    found = decode(maps, canonical)
    check_names(found, centres, canonical, 2.5)
    assert not [f for f in found.flags if f.code == "level_uncertain"]

    doubled = [24.0, 24.0, 48.0, 24.0, 24.0, 24.0]  # the network missed a disc
    flags = {f.code for f in decode(*build(doubled)[:2]).flags}
    assert "level_uncertain" in flags


def test_image_and_phase_that_disagree_are_not_trusted() -> None:
    maps, canonical, _ = build(phase_gaps_mm=[27.0] * 9)
    found = decode(maps, canonical)
    assert "level_uncertain" in {f.code for f in found.flags}
    named = {v.level: v for v in found.vertebrae}
    assert not named["L3"].level_certain
    assert "level_uncertain" in {f.code for f in named["L3"].flags}


def test_two_anchors_that_agree_make_names_certain() -> None:
    maps, canonical, centres = build(last_rib=5)
    found = decode(maps, canonical)
    check_names(found, centres, canonical, 2.5)
    assert (found.anchor, found.flags, found.alternative) == ("s1+rib", (), 0)
    assert all(v.level_certain for v in found.vertebrae)


def test_a_last_rib_out_of_view_is_said() -> None:
    found = decode(*build()[:2])
    assert found.anchor == "s1"
    assert found.flags == (QualityFlag("last_rib_not_seen", Severity.CAUTION),)


@pytest.mark.parametrize(("last_rib", "alternative"), [(4, 1), (6, -1)])
def test_anchors_that_disagree_make_every_name_uncertain(last_rib: int, alternative: int) -> None:
    found = decode(*build([34.0] * 7, last_rib=last_rib)[:2])
    assert QualityFlag("possible_transitional_anatomy", Severity.BLOCKING) in found.flags
    assert found.alternative == alternative
    for vertebra in found.vertebrae[:-1]:
        assert not vertebra.level_certain
        assert vertebra.confidence < 0.6
        assert QualityFlag("level_uncertain", Severity.CAUTION) in vertebra.flags


def test_without_s1_names_are_counted_down_from_the_last_rib() -> None:
    maps, canonical, centres = build(sacrum=False, last_rib=4)  # its lowest vertebra is L4
    found = decode(maps, canonical)
    named = {v.level: v for v in found.vertebrae}
    assert found.anchor == "rib"
    assert found.flags == (QualityFlag("level_uncertain", Severity.CAUTION),)
    assert "L5" not in named
    for level, centre in zip(("L4", "L3", "L2", "L1", "T12"), centres, strict=False):
        assert named[level].centre_lps_mm == pytest.approx(centre[::-1] + canonical.origin_lps_mm, abs=2.5)
        assert named[level].level_certain


def test_six_vertebrae_above_which_ribs_begin_need_no_sacrum_to_be_unusual() -> None:
    found = decode(*build([34.0] * 7, sacrum=False, last_rib=6)[:2])
    assert QualityFlag("possible_transitional_anatomy", Severity.BLOCKING) in found.flags


def test_without_any_anchor_levels_are_guesses_and_the_study_is_blocked() -> None:
    maps, canonical, _ = build([36.0] * 4, sacrum=False, last_rib=9)
    found = decode(maps, canonical)
    assert found.anchor == "none"
    assert found.flags == (QualityFlag("level_uncertain", Severity.BLOCKING),)
    for vertebra in found.vertebrae:
        assert QualityFlag("level_uncertain", Severity.BLOCKING) in vertebra.flags
        assert vertebra.confidence < 0.6


@pytest.mark.parametrize("last_rib", [0, 1, None])
def test_a_chest_has_no_lumbar_vertebrae(last_rib: int | None) -> None:
    """All vertebrae bear ribs, all but one do, or nothing beside them tells."""
    with pytest.raises(NotEligible) as refusal:
        decode(*build(sacrum=False, last_rib=last_rib)[:2])
    assert refusal.value.code == "insufficient_coverage"


def test_ribs_right_above_a_sacrum_make_it_none() -> None:
    with pytest.raises(NotEligible) as refusal:
        decode(*build(last_rib=1)[:2])
    assert refusal.value.code == "insufficient_coverage"


def test_vertebrae_without_a_disc_between_them_are_said_to_be_fused() -> None:
    found = {v.level: v for v in decode(*build(last_rib=5, without_disc=3)[:2]).vertebrae}
    fused = {level for level, v in found.items() if "fused_vertebra" in {f.code for f in v.flags}}
    assert fused == {"L3", "L2"}
    assert found["L4"].level_certain
    assert found["T12"].level_certain


def test_a_missing_level_is_said() -> None:
    gaps = [26.0, 26.0, 52.0, 26.0, 26.0, 26.0]
    found = decode(*build(gaps, last_rib=4)[:2])
    assert QualityFlag("possible_transitional_anatomy", Severity.BLOCKING) in found.flags
    assert QualityFlag("level_uncertain", Severity.BLOCKING) in found.flags
    assert QualityFlag("fused_vertebra", Severity.BLOCKING) in {v.level: v for v in found.vertebrae}["L3"].flags


def test_without_any_column_there_is_no_lumbar_vertebra() -> None:
    maps, canonical, _ = build()
    empty = np.zeros_like(maps.probabilities)
    empty[SpineClass.BACKGROUND] = 1
    with pytest.raises(NotEligible) as refusal:
        decode(SpineMaps(empty, maps.phase), canonical)
    assert refusal.value.code == "no_lumbar_vertebra"


def test_one_lumbar_vertebra_is_too_few() -> None:
    with pytest.raises(NotEligible) as refusal:
        decode(*build([36.0])[:2])
    assert refusal.value.code == "insufficient_coverage"


def test_axes_heights_and_mask_describe_the_body() -> None:
    maps, canonical, _ = build(bend_mm=20.0)
    for vertebra in decode(maps, canonical).vertebrae:
        down, back, left = vertebra.axes_lps
        assert vertebra.axes_lps @ vertebra.axes_lps.T == pytest.approx(np.eye(3), abs=1e-6)
        assert np.linalg.det(vertebra.axes_lps) == pytest.approx(1.0)
        assert down[2] < -0.85
        assert back[1] > 0.85
        assert left[0] > 0.85
        if vertebra.level == "S1":
            continue
        assert vertebra.heights is not None
        assert 24 < vertebra.heights.middle_mm < 31
        assert 24 < vertebra.height_mm < 32
        # 28 mm of an ellipse of 42 x 34 mm
        assert vertebra.body_region.volume_mm3 == pytest.approx(28 * np.pi * 21 * 17, rel=0.22)
        assert vertebra.body_region.centre_lps_mm == pytest.approx(vertebra.centre_lps_mm, abs=0.5)
        upper, lower = vertebra.superior_lps_mm, vertebra.inferior_lps_mm
        assert upper[2] > vertebra.centre_lps_mm[2] > lower[2]


def test_a_body_cut_by_the_edge_of_the_scan_is_blocked() -> None:
    maps, canonical, _ = build()
    seen = canonical.seen.copy()
    top = int((60 + 5.3 * 36) / SPACING_MM)  # within the sixth vertebra, T12
    seen[top:] = False
    p = maps.probabilities.copy()
    p[:, top:] = 0
    p[SpineClass.BACKGROUND, top:] = 1
    cut = CanonicalVolume(canonical.hu, seen, SPACING_MM, canonical.origin_lps_mm)
    found = {v.level: v for v in decode(SpineMaps(p, maps.phase), cut).vertebrae}
    assert "T12" not in found or "vertebra_truncated" in {f.code for f in found["T12"].flags}
    assert not found["L1"].flags


def test_the_uppermost_vertebra_needs_no_disc_above_it_where_the_scan_ends() -> None:
    maps, canonical, centres = build([36.0] * 6)
    top = int((60 + 5.9 * 36 - 4) / SPACING_MM)  # just below the disc above T12
    p = maps.probabilities.copy()
    p[:, top:] = 0
    p[SpineClass.BACKGROUND, top:] = 1
    seen = canonical.seen.copy()
    seen[top:] = False
    cut = CanonicalVolume(canonical.hu, seen, SPACING_MM, canonical.origin_lps_mm)
    found = decode(SpineMaps(p, maps.phase), cut)
    check_names(found, centres, cut, 4.0)
    assert not [f for f in found.flags if f.code == "level_uncertain"]
    truncated = [f for f in found.vertebrae[0].flags if f.code == "vertebra_truncated"]
    assert [f.severity for f in truncated] == [Severity.BLOCKING]  # 20 of its 28 mm were seen


def test_metal_blocks_the_vertebra_that_holds_it() -> None:
    maps, canonical, centres = build()
    hu = canonical.hu.copy()
    z, y, x = (round(float(v) / SPACING_MM) for v in centres[1])
    hu[z - 1 : z + 2, y - 2 : y + 12, x - 6 : x - 4] = 2800
    metal = CanonicalVolume(hu, canonical.seen, SPACING_MM, canonical.origin_lps_mm)
    flags = {v.level: {f.code for f in v.flags} for v in decode(maps, metal).vertebrae}
    assert "implant" in flags["L4"]
    assert "implant" not in flags["L2"]
