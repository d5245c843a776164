"""The decision table: levels, attenuation, age and flags to the study's category.

Attenuation alone decides. The table is documented with its sources in docs/decision.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from osteo_daemon.domain.eligibility import AgeBand, ExclusionCode
from osteo_daemon.domain.findings import (
    AVERAGED_LEVELS,
    AttenuationIndex,
    Category,
    Level,
    QualityFlag,
    Severity,
    VertebraFinding,
)
from osteo_daemon.domain.references import LOW_ATTENUATION, REDUCED_ATTENUATION

MINIMUM_LEVELS = 2
"""A category needs at least two analysable levels of L1-L4 (ACR QCT practice and ISCD)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A category, the attenuation in HU that decided it and the levels it was averaged over."""

    category: Category
    index_hu: float | None
    levels: tuple[Level, ...]
    quality_flags: tuple[QualityFlag, ...]
    index: AttenuationIndex | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the decision table; None means that the column doesn't matter.

    Attributes:
        ages: bands of age the row is for.
        enough_levels: at least `MINIMUM_LEVELS` analysable levels of L1-L4.
        blocked: a blocking flag on the study.
        up_to_hu: largest attenuation index in HU, the bound included.
        outcome: the category, or why the study is excluded.
    """

    ages: frozenset[AgeBand] | None
    enough_levels: bool | None
    blocked: bool | None
    up_to_hu: float | None
    outcome: Category | ExclusionCode

    def matches(self, age: AgeBand, enough_levels: bool, blocked: bool, index_hu: float | None) -> bool:
        """True when every column that matters fits."""
        return (
            (self.ages is None or age in self.ages)
            and (self.enough_levels is None or self.enough_levels is enough_levels)
            and (self.blocked is None or self.blocked is blocked)
            and (self.up_to_hu is None or (index_hu is not None and index_hu <= self.up_to_hu))
        )


ROWS: tuple[Row, ...] = (
    Row(frozenset({AgeBand.BELOW_LIMIT}), None, None, None, ExclusionCode.AGE_BELOW_LIMIT),
    Row(None, False, None, None, Category.INDETERMINATE),
    Row(None, None, True, None, Category.INDETERMINATE),
    Row(None, True, False, LOW_ATTENUATION.hu, Category.LOW),
    Row(None, True, False, REDUCED_ATTENUATION.hu, Category.REDUCED),
    Row(None, True, False, float("inf"), Category.NOT_FLAGGED),
)
"""The decision table: the first row that matches decides. docs/decision.md shows it with its sources."""

TABLE: tuple[tuple[float, Category], ...] = tuple(
    (row.up_to_hu, row.outcome) for row in ROWS if row.up_to_hu is not None and isinstance(row.outcome, Category)
)
"""The part of `ROWS` that attenuation decides: upper bound in HU, bound included, and category."""


def outcome_of(age: AgeBand, enough_levels: bool, blocked: bool, index_hu: float | None) -> Category | ExclusionCode:
    """What the table says; ``index_hu`` may be None only without enough levels."""
    return next(row.outcome for row in ROWS if row.matches(age, enough_levels, blocked, index_hu))


def categorise(attenuation_hu: float) -> Category:
    """Category of an attenuation in HU at 120 kVp, by `TABLE`."""
    return next(category for bound, category in TABLE if attenuation_hu <= bound)


def decide(vertebrae: Sequence[VertebraFinding], study_flags: Sequence[QualityFlag]) -> Decision:
    """Category of a study.

    The deciding value is the mean over the analysable levels of L1-L4 of each level's median attenuation (corrected
    where a correction applies): the median is robust to islands of dense bone and to vessels. Blocked levels don't
    count. `ROWS` gives the category; the age was looked at before anything was measured.

    Flags added: ``few_levels`` (blocking), ``category_depends_on_correction`` (caution) when the uncorrected values
    alone would give another category.
    """
    usable = [
        vertebra
        for vertebra in vertebrae
        if vertebra.level in AVERAGED_LEVELS and not vertebra.blocked and vertebra.attenuation_hu is not None
    ]
    levels = tuple(vertebra.level for vertebra in usable)
    enough = len(usable) >= MINIMUM_LEVELS
    blocked = any(flag.severity is Severity.BLOCKING for flag in study_flags)
    if not enough:
        return Decision(Category.INDETERMINATE, None, levels, (QualityFlag("few_levels", Severity.BLOCKING),))
    measured = sum(vertebra.attenuation_hu.median for vertebra in usable if vertebra.attenuation_hu) / len(usable)
    corrected = sum(_corrected_median(vertebra) for vertebra in usable) / len(usable)
    outcome = outcome_of(AgeBand.UNKNOWN, enough, blocked, corrected)
    if not isinstance(outcome, Category):
        raise ValueError(f"an age that is screened gives a category, not {outcome}")
    flags: tuple[QualityFlag, ...] = ()
    if not blocked and categorise(measured) is not outcome:
        flags = (QualityFlag("category_depends_on_correction", Severity.CAUTION),)
    l1 = next((vertebra for vertebra in usable if vertebra.level is Level.L1), None)
    index = AttenuationIndex(
        levels=levels,
        measured=round(measured, 1),
        corrected=round(corrected, 1),
        l1_measured=None if l1 is None or l1.attenuation_hu is None else l1.attenuation_hu.median,
        l1_corrected=None if l1 is None else round(_corrected_median(l1), 1),
    )
    return Decision(outcome, corrected, levels, flags, index)


def _corrected_median(vertebra: VertebraFinding) -> float:
    attenuation, corrected = vertebra.attenuation_hu, vertebra.attenuation_hu_corrected
    if attenuation is None:
        raise ValueError(f"{vertebra.level} has no attenuation")
    return attenuation.median if corrected is None else corrected.apply(attenuation.median)
