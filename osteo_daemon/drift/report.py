"""What one look of drift monitoring found: charts, scopes, and the report that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from osteo_daemon.drift.charts import BATCH_STUDIES

SCHEMA = "osteo-drift/1"

QUIET_PROBABILITY = 0.01
"""An alarm stands until its chart's probability is above this: it does not flicker around the limit."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When there is enough to judge, and how often chance may alarm.

    Attributes:
        minimum_reference: studies of the reference below which a scope or chart is not judged.
        minimum_current: the same of the current window.
        false_alarms_per_year: expected at most, of all charts together, while nothing changes.
        looks_per_year: how often all of this is done.
    """

    minimum_reference: int = 300
    minimum_current: int = BATCH_STUDIES
    false_alarms_per_year: float = 1.0
    looks_per_year: float = 365.0


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        scope: ``all`` or a scanner.
        kind: ``mean`` in HU, ``rate``, or ``stability`` (the population stability index).
        feature: ``hu:L1``, ``outcome:CODE``, ``flag:CODE``, ``category:NAME``, ``class:NAME``, ``expert:INDEX``.
        reference, current: mean, rate, or bins and index; ``current`` over the last ``studies`` studies.
        reference_studies, studies: of how many.
        probability: of as much without a change, the smallest of its tests.
        tests: that it made.
        dispersion: of `charts.dispersion`.
        alarm: below the limit of the report.
        marks: means of successive batches of the current window, oldest first.
        limits: of a mark; None for a stability index.
    """

    scope: str
    kind: str
    feature: str
    reference: float
    current: float
    reference_studies: int
    studies: int
    probability: float
    tests: int
    dispersion: float
    alarm: bool = False
    marks: tuple[float, ...] = ()
    limits: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        """Names the chart from report to report."""
        return f"{self.scope} | {self.kind} | {self.feature}"

    @property
    def says(self) -> str:
        """In one line."""
        if self.kind == "stability":
            return f"{self.feature}: stability index {self.current:.3f} over {self.studies} studies"
        unit, digits = (" HU", 1) if self.kind == "mean" else ("", 3)
        return (
            f"{self.feature}: {self.current:.{digits}f}{unit} in the last {self.studies} studies, "
            f"{self.reference:.{digits}f}{unit} in the reference"
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """Charts of all studies or of one scanner; none where there is not enough data."""

    name: str
    reference_studies: int
    current_studies: int
    enough: bool
    charts: tuple[Chart, ...] = ()


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What one look found.

    Attributes:
        made_at: the end of the current window.
        reference_since, reference_until, current_since: of the windows.
        rules: as asked.
        tests: made in this look.
        limit: a test below this probability alarms.
        scopes: all studies first, then scanners, the busiest first.
    """

    made_at: datetime
    reference_since: datetime
    reference_until: datetime
    current_since: datetime
    rules: Rules
    tests: int
    limit: float
    scopes: tuple[Scope, ...]

    @property
    def charts(self) -> Iterator[Chart]:
        """Of all scopes."""
        return (chart for scope in self.scopes for chart in scope.charts)

    @property
    def alarms(self) -> dict[str, str]:
        """Chart to what it says, of those that alarm."""
        return {chart.key: f"{chart.scope}: {chart.says}" for chart in self.charts if chart.alarm}

    @property
    def quiet(self) -> frozenset[str]:
        """Charts that are well within their limits."""
        return frozenset(c.key for c in self.charts if not c.alarm and c.probability > QUIET_PROBABILITY)

    def to_json(self) -> dict[str, Any]:
        """Schema ``osteo-drift/1``; no patient and no study is named."""
        times = ("made_at", "reference_since", "reference_until", "current_since")
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name).isoformat(timespec="seconds") for name in times},
            "rules": asdict(self.rules),
            "tests": self.tests,
            "limit": self.limit,
            "alarms": self.alarms,
            "scopes": [asdict(scope) for scope in self.scopes],
        }
