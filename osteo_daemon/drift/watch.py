"""Have scanners, rules or networks changed? Every chart of a current window against a reference window.

How often chance alone raises an alarm is a setting, not an accident: each look makes so many tests (charts, times
windows, times two sides), there are so many looks in a year, and a test alarms only below the probability at which all
of them together are expected to alarm so often in a year without any change. Looks overlap, so that it is rather less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from osteo_daemon.drift.charts import (
    BATCH_STUDIES,
    dispersion,
    marks,
    mean_limits,
    mean_tails,
    rate_limits,
    rate_tails,
)
from osteo_daemon.drift.report import Chart, DriftReport, Rules, Scope
from osteo_daemon.drift.stability import MATERIAL, Stability, class_stability, value_stability
from osteo_daemon.drift.table import OVERALL, Window

Vector = npt.NDArray[np.float64]
Limits = Callable[[Vector, int, float, float], tuple[float, float]]

LOOKBACK_STUDIES = (BATCH_STUDIES, 4 * BATCH_STUDIES, 16 * BATCH_STUDIES)
"""Each look judges the last so many studies: a large change is seen within the first, a small one in the last."""

_MOST_SCANNERS = 12
_SIDES = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Judged:
    """A chart before the limit is known, which depends on how many charts there are."""

    chart: Chart
    reference: Vector | None = None
    limits_of: Limits | None = None

    def under(self, limit: float) -> Chart:
        """The chart with its limits, and whether it alarms."""
        chart = self.chart
        material = chart.kind != "stability" or chart.current >= MATERIAL
        limits = None
        if self.reference is not None and self.limits_of is not None:
            limits = self.limits_of(self.reference, BATCH_STUDIES, limit, chart.dispersion)
        return replace(chart, alarm=chart.probability <= limit and material, limits=limits)


def watch(reference: Window, current: Window, rules: Rules) -> DriftReport:
    """Judge the current window by the reference.

    Args:
        reference: how it was while all was well.
        current: how it is now; it ends at the moment of the look.
        rules: of the site.
    """
    names = [name for name, _ in (reference.scanners + current.scanners).most_common(_MOST_SCANNERS)]
    pairs = [(OVERALL, reference, current)]
    pairs += [(name, reference.of_scanner(name), current.of_scanner(name)) for name in names]
    judged = [(name, old, new, tuple(_judge(name, old, new, current.network, rules))) for name, old, new in pairs]
    tests = sum(entry.chart.tests for *_, entries in judged for entry in entries)
    limit = rules.false_alarms_per_year / (max(tests, 1) * rules.looks_per_year)
    scopes = tuple(
        Scope(
            name,
            len(old.studies),
            len(new.studies),
            _is_enough(len(old.studies), len(new.studies), rules),
            tuple(entry.under(limit) for entry in entries),
        )
        for name, old, new, entries in judged
    )
    return DriftReport(
        current.until, reference.since, reference.until, current.since, rules, tests, min(limit, 1.0), scopes
    )


def _is_enough(reference: int, current: int, rules: Rules) -> bool:
    return reference >= rules.minimum_reference and current >= rules.minimum_current


def _judge(scope: str, old: Window, new: Window, network: str | None, rules: Rules) -> Iterator[_Judged]:
    known, seen = old.levels_hu(), new.levels_hu()
    for level in known:
        yield from _values(scope, f"hu:{level}", known[level], seen[level], rules)
    yield from _rates(
        scope, "outcome", [(name,) for name in old.outcomes()], [(name,) for name in new.outcomes()], rules
    )
    yield from _rates(scope, "flag", old.flags(), new.flags(), rules)
    for kind, before, after in (
        ("category", old.categories(), new.categories()),
        ("class", old.classes(network), new.classes(network)),
        ("expert", old.experts(network), new.experts(network)),
    ):
        yield from _classes(scope, kind, before, after, rules)


def _values(scope: str, feature: str, old: Vector, new: Vector, rules: Rules) -> Iterator[_Judged]:
    if not _is_enough(len(old), len(new), rules):
        return
    ratio = dispersion(old)
    yield _lookback(scope, "mean", feature, old, new, ratio, mean_tails, mean_limits)
    if (stability := value_stability(old, new, ratio)) is not None:
        yield _stability(scope, feature, len(old), len(new), ratio, stability)


def _rates(
    scope: str, kind: str, old: Sequence[Collection[str]], new: Sequence[Collection[str]], rules: Rules
) -> Iterator[_Judged]:
    if not _is_enough(len(old), len(new), rules):
        return
    known_events, seen_events = _events(old), _events(new)
    for name in sorted(known_events.keys() | seen_events.keys()):
        known = known_events.get(name, np.zeros(len(old)))
        seen = seen_events.get(name, np.zeros(len(new)))
        yield _lookback(scope, "rate", f"{kind}:{name}", known, seen, dispersion(known), rate_tails, rate_limits)


def _events(studies: Sequence[Collection[str]]) -> dict[str, Vector]:
    """For each name, (N,) 1 where a study has it."""
    events: dict[str, Vector] = {}
    for index, names in enumerate(studies):
        for name in names:
            if name not in events:
                events[name] = np.zeros(len(studies))
            events[name][index] = 1.0
    return events


def _classes(scope: str, kind: str, old: Sequence[str], new: Sequence[str], rules: Rules) -> Iterator[_Judged]:
    rates = list(_rates(scope, kind, [(name,) for name in old], [(name,) for name in new], rules))
    yield from rates
    # the largest of its classes' ratios: a first-order correction that errs towards silence (Rao and Scott 1981)
    ratio = max((entry.chart.dispersion for entry in rates), default=1.0)
    if rates and (stability := class_stability(old, new, ratio)) is not None:
        yield _stability(scope, kind, len(old), len(new), ratio, stability)


def _lookback(
    scope: str,
    kind: str,
    feature: str,
    old: Vector,
    new: Vector,
    ratio: float,
    tails: Callable[[Vector, Vector, float], tuple[float, float]],
    limits_of: Limits,
) -> _Judged:
    """The last 50, 200 and 800 studies, or all that there are; the least probable speaks for the chart."""
    sizes = sorted({min(size, len(new)) for size in LOOKBACK_STUDIES})
    found = [(min(tails(new[-size:], old, ratio)), size) for size in sizes]
    probability, size = min(found)
    chart = Chart(
        scope=scope,
        kind=kind,
        feature=feature,
        reference=float(old.mean()),
        current=float(new[-size:].mean()),
        reference_studies=len(old),
        studies=size,
        probability=probability,
        tests=_SIDES * len(sizes),
        dispersion=ratio,
        marks=tuple(round(float(value), 4) for value in marks(new)),
    )
    return _Judged(chart, old, limits_of)


def _stability(scope: str, feature: str, old: int, new: int, ratio: float, stability: Stability) -> _Judged:
    chart = Chart(
        scope=scope,
        kind="stability",
        feature=feature,
        reference=float(stability.bins),
        current=stability.index,
        reference_studies=old,
        studies=new,
        probability=stability.probability,
        tests=1,
        dispersion=ratio,
    )
    return _Judged(chart)
