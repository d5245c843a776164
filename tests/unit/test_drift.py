"""Drift: what is kept of a study, what chance does in a stable year, and how soon a change is seen."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from scipy.stats import betabinom, chi2

from osteo_daemon.domain.observation import Observation, Scanner, observe
from osteo_daemon.drift.charts import dispersion, mean_limits, mean_tails, rate_limits, rate_tails
from osteo_daemon.drift.page import to_html
from osteo_daemon.drift.report import DriftReport, Rules
from osteo_daemon.drift.stability import class_stability, value_stability
from osteo_daemon.drift.table import OVERALL, Window
from osteo_daemon.drift.watch import watch

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SCANNERS = (Scanner("SIEMENS", "FORCE", "soft"), Scanner("GE", "REVOLUTION", "soft"))
FLAGS = {"contrast_enhanced": 0.3, "tilted": 0.05, "low_confidence": 0.02, "metal": 0.01}
RULES = Rules()
LEVELS = ("T12", "L1", "L2", "L3", "L4")


def studies(
    count: int,
    seed: int,
    *,
    first_hour: float = 0.0,
    every_hours: float = 0.5,
    hu: float = 0.0,
    flags: dict[str, float] = FLAGS,
    scanners: Sequence[Scanner] = SCANNERS,
    network: str = "a" * 64,
    experts: Sequence[float] = (0.5, 0.3, 0.2),
) -> list[Observation]:
    """Studies of a site: skewed attenuation, rare flags, a twentieth excluded."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(count):
        at = BEGIN + timedelta(hours=first_hour + index * every_hours)
        scanner = scanners[int(draw.integers(len(scanners)))]
        if draw.random() < 0.05:
            made.append(Observation(at, scanner, "no_ct_series"))
            continue
        patient = float(draw.gamma(9.0, 15.0)) + hu  # mean 135 HU, standard deviation 45, skewed
        levels = {level: patient + float(draw.normal(0, 10)) for level in LEVELS}
        made.append(
            Observation(
                at,
                scanner,
                "reported",
                "low" if patient < 100 else "reduced" if patient < 130 else "not_flagged",
                levels,
                tuple(sorted(flag for flag, rate in flags.items() if draw.random() < rate)),
                network,
                ("normal", "osteopenia", "osteoporosis")[int(draw.choice(3, p=(0.5, 0.3, 0.2)))],
                int(draw.choice(len(experts), p=experts)),
            )
        )
    return made


@functools.cache
def as_ever(seed: int) -> list[Observation]:
    """The reference of a site."""
    return studies(3000, seed=seed)


def look(old: Sequence[Observation], new: Sequence[Observation], rules: Rules = RULES) -> DriftReport:
    boundary, end = new[0].at, new[-1].at + timedelta(seconds=1)
    return watch(Window.of(old, BEGIN, boundary), Window.of(new, boundary, end), rules)


def test_tails_are_those_of_the_predictive_distribution() -> None:
    draw = np.random.default_rng(1)
    reference = (draw.random(400) < 0.05).astype(float)
    events = (draw.random(50) < 0.05).astype(float)
    count, a, b = int(events.sum()), reference.sum() + 0.5, 400 - reference.sum() + 0.5
    low, high = rate_tails(events, reference, 1.0)
    assert low == pytest.approx(betabinom.cdf(count, 50, a, b))
    assert high == pytest.approx(betabinom.sf(count - 1, 50, a, b))
    bounds = [round(bound * 50) for bound in rate_limits(reference, 50, 0.01, 1.0)]
    assert betabinom.sf(bounds[1], 50, a, b) <= 0.01 < betabinom.sf(bounds[1] - 1, 50, a, b)
    assert bounds[0] == 0
    values = draw.normal(100, 40, 400)
    lower, upper = mean_limits(values, 50, 0.01, 1.0)
    assert mean_tails(np.full(50, upper), values, 1.0)[1] == pytest.approx(0.01)
    assert mean_tails(np.full(50, lower), values, 1.0)[0] == pytest.approx(0.01)


def test_one_study_with_a_new_flag_is_no_alarm_and_ten_are() -> None:
    never = np.zeros(1000)
    assert rate_tails(np.array([1.0] + [0.0] * 49), never, 1.0)[1] > 0.01
    assert rate_tails(np.array([1.0] * 10 + [0.0] * 40), never, 1.0)[1] < 1e-9
    constant = np.full(400, 7.0)
    assert mean_tails(constant, constant, 1.0) == (1.0, 1.0)
    assert mean_tails(constant + 1, constant, 1.0) == (1.0, 0.0)


def test_dispersion_between_batches_widens_limits_and_independent_studies_have_none() -> None:
    draw = np.random.default_rng(2)
    plain = [dispersion(draw.normal(0, 1, 3000)) for _ in range(20)]
    assert sum(ratio > 1 for ratio in plain) <= 4
    wards = np.repeat(draw.normal(0, 0.5, 60), 50) + draw.normal(0, 1, 3000)
    ratio = dispersion(wards)
    assert 5 < ratio <= 20
    assert mean_limits(wards, 50, 0.01, ratio)[1] > 2 * mean_limits(wards, 50, 0.01, 1.0)[1]
    assert dispersion(wards[:450]) == 1.0  # too few batches to tell


def test_the_stability_index_knows_how_large_it_gets_by_chance() -> None:
    draw = np.random.default_rng(3)
    found = [value_stability(draw.normal(0, 1, 5000), draw.normal(0, 1, 250)) for _ in range(300)]
    indices = [entry.index for entry in found if entry is not None]
    assert len(indices) == 300
    # its mean without a change is (bins - 1)(1/N + 1/M)
    assert np.mean(indices) == pytest.approx(9 * (1 / 250 + 1 / 5000), rel=0.1)
    assert np.mean([entry.probability < 0.05 for entry in found if entry is not None]) == pytest.approx(0.05, abs=0.03)
    assert found[0] is not None
    assert found[0].bins == 10
    few = value_stability(draw.normal(0, 1, 5000), draw.normal(0, 1, 45))
    assert few is not None
    assert few.bins == 2
    assert value_stability(draw.normal(0, 1, 5000), draw.normal(0, 1, 30)) is None
    wider = value_stability(draw.normal(0, 1, 5000), draw.normal(0, 1.6, 800))  # the same mean
    assert wider is not None
    assert wider.index > 0.1
    assert wider.probability < 1e-9 < chi2.sf(30, 9)


def test_rare_classes_count_as_one() -> None:
    old = ["a"] * 900 + ["b"] * 80 + ["c"] * 10 + ["d"] * 10
    same = class_stability(old, old[::2])
    assert same is not None
    assert same.bins == 2
    assert same.index == pytest.approx(0, abs=1e-3)
    assert class_stability(["a"] * 500, ["a"] * 500) is None
    swapped = class_stability(old, ["b"] * 180 + ["a"] * 16 + ["c"] * 4)
    assert swapped is not None
    assert swapped.probability < 1e-9


def test_three_stable_years_raise_no_more_alarms_than_asked_for() -> None:
    """A look a month, all charts of two scanners: at most what was asked for, and some, or the limits would be idle."""
    raised, tests = 0, 0
    rules = Rules(false_alarms_per_year=12.0, looks_per_year=12.0)
    for year in range(3):
        stream = studies(2000 + 12 * 200, seed=100 + year)
        for position in range(12):
            end = 2000 + (position + 1) * 200
            report = look(stream[:2000], stream[max(2000, end - 900) : end], rules)
            raised, tests = raised + len(report.alarms), report.tests
    assert tests > 150
    assert 1 <= raised <= 36  # expected at most: twelve a year


@pytest.mark.parametrize(
    ("change", "within", "chart"),
    [
        ({"hu": 10.0}, 1200, "all | mean | hu:L1"),
        ({"hu": -30.0}, 200, "all | mean | hu:L1"),
        ({"flags": {**FLAGS, "tilted": 0.1}}, 1200, "all | rate | flag:tilted"),
        ({"flags": {**FLAGS, "unheard_of": 0.1}}, 100, "all | rate | flag:unheard_of"),
        ({"experts": (0.2, 0.3, 0.5)}, 200, "all | stability | expert"),
    ],
)
def test_a_change_alarms_within_so_many_studies(change: dict[str, Any], within: int, chart: str) -> None:
    """With one false alarm a year at daily looks, in at least four of five sites."""
    seen = 0
    for seed in range(5):
        old = as_ever(seed)
        new = studies(within, seed=50 + seed, first_hour=1600, **change)
        seen += any(chart in look(old, new[:end]).alarms for end in range(within, 50, -200))
    assert seen >= 4


def test_one_scanner_that_drifts_is_named() -> None:
    old, other = studies(4000, seed=5), studies(900, seed=6, first_hour=2100, scanners=SCANNERS[:1])
    drifted = studies(900, seed=7, first_hour=2100, scanners=SCANNERS[1:], hu=20)
    report = look(old, sorted([*other, *drifted], key=lambda study: study.at))
    assert "GE REVOLUTION soft | mean | hu:L1" in report.alarms
    assert not any(key.startswith("SIEMENS") for key in report.alarms)


def test_too_few_studies_are_not_judged() -> None:
    report = look(studies(200, seed=8), studies(100, seed=9, first_hour=500, hu=80))
    assert [scope.enough for scope in report.scopes] == [False] * 3
    assert not list(report.charts)
    assert not report.alarms
    assert "Not enough data" in to_html(report)
    small = look(studies(1000, seed=8), studies(40, seed=9, first_hour=700, hu=80))
    assert not small.alarms


def test_another_networks_values_are_no_reference() -> None:
    old = studies(2000, seed=10, experts=(0.9, 0.05, 0.05))
    new = studies(300, seed=11, first_hour=1100, network="b" * 64, experts=(0.1, 0.1, 0.8))
    report = look(old, new)
    assert not any(chart.feature.startswith(("expert", "class")) for chart in report.charts)
    assert any(chart.feature == "hu:L1" for chart in report.charts)


def test_a_report_says_what_it_is_and_holds_its_charts() -> None:
    report = look(studies(2000, seed=12), studies(800, seed=13, first_hour=1100, hu=30))
    page = to_html(report)
    assert "data:image/png;base64," in page
    assert "hu:L1" in page
    assert "http" not in page
    document = json.loads(json.dumps(report.to_json()))
    assert document["schema"] == "osteo-drift/1"
    assert document["alarms"] == report.alarms
    assert document["tests"] == sum(chart.tests for chart in report.charts)
    assert report.limit == pytest.approx(1 / (365 * report.tests))
    alarm = next(chart for chart in report.charts if chart.alarm and chart.limits is not None)
    assert alarm.says.startswith(alarm.feature)
    assert not report.quiet & report.alarms.keys()


def test_what_is_kept_of_a_result() -> None:
    def vertebra(level: str, median: float, weights: list[float], severity: str = "caution") -> dict[str, Any]:
        return {
            "level": level,
            "attenuation_hu": {"median": median},
            "quality_flags": [{"code": f"of_{level.lower()}", "severity": severity}],
            "network": {
                "class_probabilities": {"normal": weights[0], "osteoporosis": 1 - weights[0]},
                "expert_weights": weights,
                "quality_flags": [{"code": "outlier", "severity": "caution"}],
            },
        }

    result = {
        "outcome": "reported",
        "exclusion": None,
        "category": "low",
        "vertebrae": [vertebra("L1", 91.234, [0.2, 0.8]), vertebra("L2", 80.0, [0.6, 0.4], severity="blocking")],
        "quality_flags": [{"code": "contrast", "severity": "info"}],
        "models": [{"sha256": "1" * 64}, {"sha256": "2" * 64}],
    }
    scanner = Scanner.named("Siemens\x00 Healthineers ", "SOMATOM  Force", "soft")
    assert scanner.label == "SIEMENS HEALTHINEERS SOMATOM FORCE soft"
    seen = observe(result, scanner, BEGIN)
    expected = Observation(
        BEGIN, scanner, "reported", "low", {"L1": 91.23}, ("contrast", "of_l1", "of_l2", "outlier"), "2" * 64,
        "osteoporosis", 1,
    )  # fmt: skip
    assert dataclasses.asdict(seen) == dataclasses.asdict(expected)
    excluded = observe({"exclusion": {"code": "age_below_limit"}}, scanner, BEGIN)
    assert excluded.outcome == "age_below_limit"
    assert scanner.label != OVERALL
