from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osteo_daemon.domain.decision import TABLE, categorise, decide
from osteo_daemon.domain.eligibility import age_years
from osteo_daemon.domain.findings import (
    Attenuation,
    Category,
    CorrectedAttenuation,
    Exclusion,
    Level,
    ModelReference,
    NetworkFinding,
    Outcome,
    QualityFlag,
    ScreeningResult,
    Severity,
    VertebraFinding,
)
from osteo_daemon.domain.job import TRANSITIONS, JobState


def _vertebra(level: Level, hu: float, **changes: object) -> VertebraFinding:
    finding = VertebraFinding(level, (0.0, 0.0, 0.0), 0.9, Attenuation(hu, hu, 30.0, 5000.0))
    return dataclasses.replace(finding, **changes)


@pytest.mark.parametrize(
    ("hu", "category"),
    [
        (40, Category.LOW),
        (60, Category.LOW),
        (80, Category.LOW),
        (109.9, Category.LOW),
        (110, Category.REDUCED),
        (120, Category.REDUCED),
        (159.9, Category.REDUCED),
        (160, Category.NOT_FLAGGED),
        (250, Category.NOT_FLAGGED),
    ],
)
def test_category_of_attenuation(hu: float, category: Category) -> None:
    assert categorise(hu) is category
    decision = decide([_vertebra(level, hu) for level in (Level.L1, Level.L2, Level.L3, Level.L4)], [])
    assert (decision.category, decision.index_hu) == (category, pytest.approx(hu))


def test_table_is_ordered_and_covers_everything() -> None:
    bounds = [bound for bound, _ in TABLE]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")


def test_only_unblocked_l1_to_l4_count() -> None:
    blocking = (QualityFlag("implant", Severity.BLOCKING),)
    vertebrae = [
        _vertebra(Level.T12, 300),
        _vertebra(Level.L1, 100),
        _vertebra(Level.L2, 100),
        _vertebra(Level.L3, 900, quality_flags=blocking),
        _vertebra(Level.L4, 0, attenuation_hu=None),
        _vertebra(Level.L5, 300),
    ]
    decision = decide(vertebrae, [])
    assert decision.levels == (Level.L1, Level.L2)
    assert decision.category is Category.LOW


def test_one_level_or_a_blocking_study_flag_gives_no_category() -> None:
    decision = decide([_vertebra(Level.L1, 50)], [])
    assert decision.category is Category.INDETERMINATE
    assert [flag.code for flag in decision.quality_flags] == ["few_levels"]
    blocked = decide(
        [_vertebra(Level.L1, 50), _vertebra(Level.L2, 50)], [QualityFlag("calibration_out_of_range", Severity.BLOCKING)]
    )
    assert blocked.category is Category.INDETERMINATE


def test_correction_that_changes_the_category_is_said() -> None:
    corrected = CorrectedAttenuation(112.7, {"kvp_140_to_120": 1.073})
    vertebrae = [_vertebra(level, 105, attenuation_hu_corrected=corrected) for level in (Level.L1, Level.L2)]
    decision = decide(vertebrae, [])
    assert decision.category is Category.REDUCED
    assert decision.index_hu == pytest.approx(105 * 1.073)
    assert [flag.code for flag in decision.quality_flags] == ["category_depends_on_correction"]


@pytest.mark.parametrize(
    ("age", "born", "at", "expected"),
    [
        ("", "19560102", "20260101", 69),
        ("", "19560101", "20260101", 70),
        ("049Y", "", "20260101", 49),
        ("049Y", "19000101", "20260101", 49),  # an anonymiser's birth date
        ("018M", "", "", 1),
        ("", "19560101", "", None),
        ("65", "", "20260101", None),
        ("", "not a date", "20260101", None),
        ("", "20270101", "20260101", None),
    ],
)
def test_age(age: str, born: str, at: str, expected: int | None) -> None:
    assert age_years(age, born, at) == expected


_hu = st.floats(-200, 1000)
_flags = st.lists(st.builds(QualityFlag, st.text(min_size=1, max_size=20), st.sampled_from(Severity)), max_size=3).map(
    tuple
)
_network = st.builds(
    NetworkFinding,
    st.sampled_from(["investigational", "clinical"]),
    st.none() | st.floats(0, 2),
    st.none() | st.floats(-8, 8),
    st.none() | st.dictionaries(st.sampled_from(["normal", "osteopenia", "osteoporosis"]), st.floats(0, 1)),
    st.dictionaries(st.sampled_from([level.value for level in Level]), st.floats(0, 1)),
    st.lists(st.floats(0, 1), max_size=4).map(tuple),
)
_vertebrae = st.builds(
    VertebraFinding,
    st.sampled_from(Level),
    st.tuples(_hu, _hu, _hu),
    st.floats(0, 1),
    st.none() | st.builds(Attenuation, _hu, _hu, _hu, _hu),
    st.none() | st.builds(CorrectedAttenuation, _hu, st.dictionaries(st.text(max_size=9), _hu, max_size=2)),
    st.none() | _network,
    _flags,
)


@given(
    st.builds(
        ScreeningResult,
        st.text(max_size=64),
        st.none() | st.text(max_size=64),
        st.sampled_from(Outcome),
        st.none() | st.builds(Exclusion, st.text(max_size=9), st.text(max_size=9)),
        st.none() | st.sampled_from(Category),
        st.lists(_vertebrae, max_size=4).map(tuple),
        _flags,
        st.lists(st.builds(ModelReference, st.text(), st.text(), st.text()), max_size=2).map(tuple),
        st.dictionaries(st.text(max_size=9), st.floats(0, 100), max_size=3),
    )
)
def test_result_round_trip(result: ScreeningResult) -> None:
    assert ScreeningResult.from_json(result.to_json()) == result


def test_a_foreign_document_is_refused() -> None:
    with pytest.raises(ValueError, match="not an osteo-result/1"):
        ScreeningResult.from_json({"schema": "other"})
    with pytest.raises(ValueError, match="not a complete"):
        ScreeningResult.from_json({"schema": "osteo-result/1"})


def test_every_state_can_be_left_and_reached() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert all(TRANSITIONS.values())
    assert set().union(*TRANSITIONS.values()) == set(JobState)
