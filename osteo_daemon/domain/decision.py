"""The decision table: levels, attenuation, age and flags to the study's category.

Attenuation alone decides. The table is documented with its sources in docs/decision.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from osteo_daemon.domain.findings import AVERAGED_LEVELS, Category, Level, QualityFlag, Severity, VertebraFinding
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


# Upper bound in HU (exclusive) of each category, in order; the last has none.
TABLE: tuple[tuple[float, Category], ...] = (
    (LOW_ATTENUATION.hu, Category.LOW),
    (REDUCED_ATTENUATION.hu, Category.REDUCED),
    (float("inf"), Category.NOT_FLAGGED),
)


def categorise(attenuation_hu: float) -> Category:
    """Category of an attenuation in HU at 120 kVp, by `TABLE`."""
    return next(category for bound, category in TABLE if attenuation_hu < bound)


def decide(vertebrae: Sequence[VertebraFinding], study_flags: Sequence[QualityFlag]) -> Decision:
    """Category of a study.

    The deciding value is the mean over the analysable levels of L1-L4 of each level's median attenuation (corrected
    where a correction applies): the median is robust to islands of dense bone and to vessels. Blocked levels don't
    count. Indeterminate when fewer than `MINIMUM_LEVELS` remain or a study flag is blocking.

    Flags added: ``few_levels`` (blocking), ``category_depends_on_correction`` (caution) when the uncorrected values
    alone would give another category.
    """
    usable = [
        vertebra
        for vertebra in vertebrae
        if vertebra.level in AVERAGED_LEVELS and not vertebra.blocked and vertebra.attenuation_hu is not None
    ]
    levels = tuple(vertebra.level for vertebra in usable)
    if len(usable) < MINIMUM_LEVELS:
        return Decision(Category.INDETERMINATE, None, levels, (QualityFlag("few_levels", Severity.BLOCKING),))
    measured = sum(vertebra.attenuation_hu.median for vertebra in usable if vertebra.attenuation_hu) / len(usable)
    corrected = sum(_corrected_median(vertebra) for vertebra in usable) / len(usable)
    if any(flag.severity is Severity.BLOCKING for flag in study_flags):
        return Decision(Category.INDETERMINATE, corrected, levels, ())
    flags: tuple[QualityFlag, ...] = ()
    if categorise(measured) is not categorise(corrected):
        flags = (QualityFlag("category_depends_on_correction", Severity.CAUTION),)
    return Decision(categorise(corrected), corrected, levels, flags)


def _corrected_median(vertebra: VertebraFinding) -> float:
    attenuation, corrected = vertebra.attenuation_hu, vertebra.attenuation_hu_corrected
    if attenuation is None:
        raise ValueError(f"{vertebra.level} has no attenuation")
    return attenuation.median if corrected is None else corrected.apply(attenuation.median)
