"""Two anchors: the rules alone, and the shipped weights on anatomy with another number of vertebrae."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from osteo_daemon.domain.findings import Attenuation, Level, QualityFlag, Severity, VertebraFinding
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.decode import coronal_angle
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.naming import Naming, fused_vertebrae, last_rib, name_column
from osteo_daemon.inference.ribs import Bearing, RibEvidence
from osteo_daemon.inference.transitional import settled_flags
from osteo_daemon.inference.vertebra import Localization
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import render_study
from train.recounted import fused, recounted
from train.torso import Torso, load_torso

RIB, NONE, UNCLEAR, UNSEEN = Bearing.RIB, Bearing.NONE, Bearing.UNCLEAR, Bearing.NOT_SEEN
BLOCKING, CAUTION = Severity.BLOCKING, Severity.CAUTION
TRANSITIONAL = "possible_transitional_anatomy"


def evidence(*bearings: Bearing) -> list[RibEvidence]:
    return [RibEvidence(bearing, None, None) for bearing in bearings]


def named(*bearings: Bearing, on_s1: bool = True, agreement: Sequence[float] | None = None) -> Naming:
    n = len(bearings)
    gaps, contrast = np.full(n, 35.0), np.full(n + 1, 120.0)
    agreed = np.array(agreement) if agreement else np.full(n, 0.95)
    return name_column(gaps, agreed, contrast, evidence(*bearings), on_s1=on_s1)


@pytest.mark.parametrize(
    ("bearings", "expected"),
    [
        ((NONE, NONE, RIB, RIB), (2, 2)),
        ((NONE, UNCLEAR, RIB), (1, 2)),
        ((NONE, NONE, UNSEEN), (2, None)),
        ((RIB, RIB), (0, 0)),
        ((UNCLEAR,), (0, None)),
        ((NONE, RIB, NONE), None),  # contradicts itself
        ((), (0, None)),
    ],
)
def test_the_last_rib_lies_between_two_numbers(
    bearings: tuple[Bearing, ...], expected: tuple[int, int | None] | None
) -> None:
    assert last_rib(evidence(*bearings)) == expected


def flags(naming: Naming) -> dict[str, Severity]:
    return {flag.code: flag.severity for flag in naming.flags}


FIVE = (NONE,) * 5


@pytest.mark.parametrize(
    ("bearings", "anchor", "alternative", "expected"),
    [
        ((*FIVE, RIB, RIB), "s1+rib", 0, {}),
        (FIVE, "s1", 0, {"last_rib_not_seen": CAUTION}),
        ((*FIVE, UNCLEAR, RIB), "s1", 0, {"last_rib_not_seen": CAUTION}),
        ((NONE, NONE, NONE, NONE, RIB, RIB), "s1+rib", 1, {TRANSITIONAL: BLOCKING}),
        ((*FIVE, NONE, RIB), "s1+rib", -1, {TRANSITIONAL: BLOCKING}),
        ((*FIVE, NONE), "s1+rib", -1, {TRANSITIONAL: BLOCKING}),
        ((NONE, NONE, NONE, RIB, RIB), "s1", 0, {"level_uncertain": BLOCKING}),  # no one has three lumbar vertebrae
        ((*FIVE, NONE, NONE, NONE), "s1", 0, {"level_uncertain": BLOCKING}),
        ((NONE, NONE, RIB, NONE, NONE, RIB), "s1", 0, {"last_rib_not_seen": CAUTION}),  # ribs that tell nothing
    ],
)
def test_rules_above_a_sacrum(
    bearings: tuple[Bearing, ...], anchor: str, alternative: int, expected: dict[str, Severity]
) -> None:
    naming = named(*bearings)
    assert (naming.anchor, naming.alternative, flags(naming)) == (anchor, alternative, expected)
    assert naming.offset == 0
    assert all(naming.certain) == (alternative == 0 and "level_uncertain" not in expected)


def test_doubt_at_a_vertebra_reaches_upwards_unless_the_ribs_confirm_the_count() -> None:
    poor = (0.9, 0.9, 0.3, 0.9, 0.9, 0.9, 0.9)
    alone = named(*FIVE, UNSEEN, UNSEEN, agreement=poor)
    assert alone.certain == (True, True, False, False, False, False, False)
    assert flags(alone) == {"level_uncertain": BLOCKING}
    both = named(*FIVE, RIB, RIB, agreement=poor)
    assert both.certain == (True, True, False, True, True, True, True)


def test_names_from_the_last_rib_alone() -> None:
    naming = named(NONE, NONE, NONE, RIB, RIB, on_s1=False)
    assert [naming.level(k) for k in range(5)] == ["L3", "L2", "L1", "T12", "T11"]
    assert (naming.anchor, flags(naming)) == ("rib", {"level_uncertain": CAUTION})
    assert all(naming.certain)
    doubtful = named(NONE, NONE, NONE, RIB, RIB, on_s1=False, agreement=(0.9, 0.9, 0.3, 0.9, 0.9))
    assert doubtful.certain == (False, False, False, True, True)  # downwards from the rib
    assert flags(doubtful) == {"level_uncertain": BLOCKING}


@pytest.mark.parametrize("bearings", [(NONE, NONE, NONE), (UNCLEAR, NONE, NONE, UNSEEN), (NONE, NONE, UNCLEAR, RIB)])
def test_without_an_anchor_every_name_is_a_guess(bearings: tuple[Bearing, ...]) -> None:
    naming = named(*bearings, on_s1=False)
    assert (naming.anchor, flags(naming)) == ("none", {"level_uncertain": BLOCKING})
    assert not any(naming.certain)
    assert all((naming.level(k) or "").startswith("L") for k, b in enumerate(bearings) if b is NONE)


@pytest.mark.parametrize("bearings", [(RIB, RIB, RIB), (NONE,), (UNCLEAR, UNCLEAR, UNCLEAR), (UNSEEN, UNSEEN)])
def test_without_an_anchor_and_lumbar_vertebrae_the_study_is_refused(bearings: tuple[Bearing, ...]) -> None:
    with pytest.raises(NotEligible) as refusal:
        named(*bearings, on_s1=False)
    assert refusal.value.code == "insufficient_coverage"


def test_fusion_is_a_missing_disc_or_a_double_height() -> None:
    gaps, contrast = np.full(6, 35.0), np.array([np.nan, 120, 15, 110, 130, 120, np.nan])
    assert fused_vertebrae(gaps, contrast) == {1: CAUTION, 2: CAUTION}
    assert fused_vertebrae(gaps, contrast / 10) == {}  # a scan that shows no disc at all
    double = np.array([25.0, 25, 48, 25, 25, 25])
    assert fused_vertebrae(double, np.array([np.nan, 120, 120, 110, 130, 120, np.nan])) == {2: BLOCKING}


def findings(**medians: float) -> list[VertebraFinding]:
    return [
        VertebraFinding(Level(level), (0.0, 0.0, 0.0), 0.5, Attenuation(hu, hu, 30.0, 5000.0))
        for level, hu in medians.items()
    ]


@pytest.mark.parametrize(
    ("medians", "alternative", "expected"),
    [
        # L1-L4 or T12-L3: 100 or 95
        ({"T12": 80, "L1": 100, "L2": 100, "L3": 100, "L4": 100, "L5": 100}, -1, CAUTION),
        # L1-L4 is 106, but L2-L5 is 123
        ({"T12": 60, "L1": 60, "L2": 100, "L3": 120, "L4": 145, "L5": 127}, 1, BLOCKING),
        # the same the other way about: T12-L3 is 100
        ({"T12": 120, "L1": 60, "L2": 100, "L3": 120, "L4": 145, "L5": 127}, -1, CAUTION),
        ({"L4": 100, "L5": 100}, -1, BLOCKING),  # no category either way
    ],
)
def test_the_category_stands_where_both_counts_give_it(
    medians: dict[str, float], alternative: int, expected: Severity
) -> None:
    others = (QualityFlag("scoliosis", CAUTION), QualityFlag("level_uncertain", BLOCKING))
    found = Localization((), (QualityFlag(TRANSITIONAL, BLOCKING), *others), "s1+rib", alternative=alternative)
    assert settled_flags(found, findings(**medians)) == (QualityFlag(TRANSITIONAL, expected), *others)


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ({"T12": 80, "L1": 90, "L2": 100, "L3": 100}, CAUTION),
        ({"T12": 200, "L1": 190, "L2": 165, "L3": 164}, CAUTION),
        # L1-L3 is 173, but L2-L3 alone 159
        ({"T12": 200, "L1": 200, "L2": 159, "L3": 159}, BLOCKING),
        # were L1 the twelfth thoracic vertebra, one lumbar level would be left
        ({"T12": 90, "L1": 90, "L2": 90}, BLOCKING),
    ],
)
def test_a_lone_last_rib_may_be_one_off_either_way(medians: dict[str, float], expected: Severity) -> None:
    found = Localization((), (QualityFlag("level_uncertain", CAUTION),), "rib")
    assert settled_flags(found, findings(**medians)) == (QualityFlag("level_uncertain", expected),)


def test_flags_without_another_count_stay() -> None:
    for found in (
        Localization((), (QualityFlag(TRANSITIONAL, BLOCKING),), "rib"),
        Localization((), (QualityFlag("level_uncertain", BLOCKING),), "rib"),
        Localization((), (QualityFlag("level_uncertain", CAUTION),), "s1+rib"),
    ):
        assert settled_flags(found, findings(L1=200, L2=200, L3=200)) == found.flags


@pytest.fixture(scope="module")
def localizer() -> SpineLocalizer:
    return SpineLocalizer.from_bundle(find_bundle("spine-localizer", None))


@pytest.fixture(scope="module")
def torso(real_data: Path) -> Torso:
    return load_torso(real_data / "totalsegmentator_example")


@pytest.mark.slow
@pytest.mark.real_ct
@pytest.mark.parametrize(("by", "alternative"), [(1, 1), (-1, -1)])
def test_a_torso_with_four_or_six_lumbar_vertebrae_is_not_trusted(
    localizer: SpineLocalizer, torso: Torso, by: int, alternative: int
) -> None:
    made = recounted(torso, 2, by)
    assert made.bears_rib.index(True) == 5 - alternative
    found = localizer(made.volume)
    assert found.alternative == alternative
    assert QualityFlag(TRANSITIONAL, BLOCKING) in found.flags
    above_s1 = found.vertebrae[::-1][1:]
    for vertebra, centre in zip(above_s1, made.centres_lps_mm, strict=False):
        assert np.linalg.norm(vertebra.centre_lps_mm - centre) < 8
        assert not vertebra.level_certain
        assert vertebra.confidence < 0.6


@pytest.mark.slow
@pytest.mark.real_ct
def test_a_torso_with_a_block_vertebra_keeps_its_names_and_says_so(localizer: SpineLocalizer, torso: Torso) -> None:
    found = localizer(fused(torso, 3))
    said = {v.level for v in found.vertebrae if "fused_vertebra" in {flag.code for flag in v.flags}}
    assert said == {"L3", "L2"}
    assert found.anchor == "s1+rib"
    assert all(v.level_certain for v in found.vertebrae)


@pytest.mark.slow
def test_virtual_patients_with_six_lumbar_vertebrae_or_a_curve(localizer: SpineLocalizer) -> None:
    scanner = coarse_scanner(3.0, noise_hu=15.0, seed=3)
    six = render_study(VirtualPatient(seed=8_100_001, lumbar_count=6), scanner, top="T11")
    found = localizer(CtVolume(six.voxels.astype(np.float32), six.affine))
    assert QualityFlag(TRANSITIONAL, BLOCKING) in found.flags
    curve = render_study(VirtualPatient(seed=8_100_002, scoliosis_deg=24.0, scoliosis_apex="L2"), scanner, top="T11")
    found = localizer(CtVolume(curve.voxels.astype(np.float32), curve.affine))
    lean = [np.degrees(np.arctan2(v.axes[0, 2], v.axes[2, 2])) for v in curve.vertebrae if v.level in
            ("T12", "L1", "L2", "L3", "L4", "L5")]  # fmt: skip
    assert coronal_angle(list(found.vertebrae)) == pytest.approx(max(lean) - min(lean), abs=4.0)
    assert max(lean) - min(lean) > 12
    assert QualityFlag("scoliosis", CAUTION) in found.flags
    assert found.anchor == "s1+rib"
