from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osteo_daemon.domain.decision import ROWS, TABLE, categorise, decide, outcome_of
from osteo_daemon.domain.eligibility import AgeBand, age_band, age_years
from osteo_daemon.domain.findings import (
    AVERAGED_LEVELS,
    Attenuation,
    AttenuationIndex,
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
from osteo_daemon.errors import NotEligible
from osteo_daemon.inference.patient import Patient
from tests.conftest import ROOT


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
        (110, Category.LOW),
        (110.1, Category.REDUCED),
        (120, Category.REDUCED),
        (160, Category.REDUCED),
        (160.1, Category.NOT_FLAGGED),
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


def _documented_rows() -> list[list[str]]:
    """Cells of the decision table of docs/decision.md."""
    page = (ROOT / "docs" / "decision.md").read_text(encoding="utf-8")
    table = page.partition("| index, HU |")[2].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def _documented(age: AgeBand, levels: int, blocked: bool, hu: float | None) -> str:
    """What the page says, read as a person would: the first row whose cells fit."""
    for index, ages, counting, flag, outcome, _source in _documented_rows():
        bounds = [float(number) for number in re.findall(r"\d+", index)]
        fits_hu = index == "any" or (
            hu is not None
            and (hu <= bounds[-1] if "to" in index.split() else hu > bounds[0])
            and (hu > bounds[0] if index.startswith("above") else True)
        )
        fits_age = {"below 30": age is AgeBand.BELOW_LIMIT, "30 and above, unknown": age is not AgeBand.BELOW_LIMIT}
        fits_levels = {"any": True, "fewer than 2": levels < 2, "2 or more": levels >= 2}
        fits_flag = {"any": True, "yes": blocked, "no": not blocked}
        if fits_hu and fits_age[ages] and fits_levels[counting] and fits_flag[flag]:
            return re.findall(r"`(\w+)`", outcome)[0]
    raise AssertionError(f"the page says nothing of {age} {levels} {blocked} {hu}")


CELLS = list(
    itertools.product(
        AgeBand,
        (0, 1, 2, 3, 4),
        (False, True),
        (-20.0, 40.0, 60.0, 80.0, 109.9, 110.0, 110.1, 120.0, 159.9, 160.0, 160.1, 400.0),
    )
)


def test_every_cell_of_the_documented_table() -> None:
    assert len(_documented_rows()) == len(ROWS)
    reached = set()
    for age, levels, blocked, hu in CELLS:
        expected = _documented(age, levels, blocked, hu if levels >= 2 else None)
        index = hu if levels >= 2 else None
        assert outcome_of(age, levels >= 2, blocked, index).value == expected, (age, levels, blocked, hu)
        reached.add(next(n for n, row in enumerate(ROWS) if row.matches(age, levels >= 2, blocked, index)))
        if age is AgeBand.BELOW_LIMIT:
            continue
        flags = [QualityFlag("calibration_out_of_range", Severity.BLOCKING)] if blocked else []
        decision = decide([_vertebra(level, hu) for level in AVERAGED_LEVELS[:levels]], flags)
        assert decision.category.value == expected
        assert decision.index_hu == (pytest.approx(hu) if levels >= 2 else None)
    assert reached == set(range(len(ROWS)))  # no row is dead


@pytest.mark.parametrize(
    ("years", "band", "screened", "classified"),
    [
        (None, AgeBand.UNKNOWN, True, False),
        (29, AgeBand.BELOW_LIMIT, False, False),
        (30, AgeBand.ATTENUATION_ONLY, True, False),
        (49, AgeBand.ATTENUATION_ONLY, True, False),
        (50, AgeBand.CLASSIFIABLE, True, True),
        (101, AgeBand.CLASSIFIABLE, True, True),
    ],
)
def test_ages(years: int | None, band: AgeBand, screened: bool, classified: bool) -> None:
    assert age_band(years) is band
    patient = Patient(years, "F")
    if screened:
        patient.check_age()
    else:
        with pytest.raises(NotEligible, match="age_below_limit"):
            patient.check_age()
    assert patient.classifiable is classified
    assert not Patient(years, None).classifiable


def test_flags_of_any_severity_but_blocking_change_no_category() -> None:
    flags = [QualityFlag("contrast_enhanced", Severity.CAUTION), QualityFlag("metal_in_view", Severity.INFO)]
    vertebrae = [_vertebra(level, 100) for level in AVERAGED_LEVELS]
    assert decide(vertebrae, flags) == decide(vertebrae, [])


def test_corrections_are_applied_in_order() -> None:
    corrected = CorrectedAttenuation(0.0, {"kvp_140_to_120": 1.073, "contrast_portal_venous_hu": -11.2})
    assert corrected.apply(100.0) == pytest.approx(96.1)
    vertebrae = [_vertebra(level, 120.0, attenuation_hu_corrected=corrected) for level in AVERAGED_LEVELS]
    decision = decide(vertebrae, [])
    assert decision.index_hu == pytest.approx(120 * 1.073 - 11.2)
    assert decision.category is Category.REDUCED


def test_the_index_says_what_decided_and_l1_by_itself() -> None:
    corrected = CorrectedAttenuation(107.3, {"kvp_140_to_120": 1.073})
    vertebrae = [
        _vertebra(Level.L1, 100, attenuation_hu_corrected=corrected),
        _vertebra(Level.L2, 140, attenuation_hu_corrected=corrected),
    ]
    index = decide(vertebrae, []).index
    assert index == AttenuationIndex((Level.L1, Level.L2), 120.0, 128.8, 100, 107.3)
    assert decide(vertebrae[1:], []).index is None
    without_l1 = decide([vertebrae[1], dataclasses.replace(vertebrae[1], level=Level.L3)], []).index
    assert without_l1 is not None
    assert (without_l1.l1_measured, without_l1.l1_corrected) == (None, None)


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
        st.none() | st.builds(AttenuationIndex, st.lists(st.sampled_from(Level)).map(tuple), _hu, _hu, _hu, _hu),
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
