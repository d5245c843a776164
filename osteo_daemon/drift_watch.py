"""Drift monitoring of a node: observations from the store, a dated report in the state folder, alarms told once."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

from osteo_daemon.drift.page import to_html
from osteo_daemon.drift.report import DriftReport, Rules
from osteo_daemon.drift.table import Window
from osteo_daemon.drift.watch import watch
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger
from osteo_daemon.settings import DriftSettings, Settings

STEP = "drift_report"
"""Its name among the scheduler's steps."""

_MOST_STUDIES = 200_000
"""More than half a year of the busiest site; of more the newest are read."""

_SECONDS_OF_A_YEAR = 365 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Look:
    """A report that was made, where it lies, and which alarms are new or over."""

    report: DriftReport
    path: Path
    raised: tuple[str, ...]
    cleared: tuple[str, ...]
    standing: int

    @property
    def detail(self) -> str:
        """For the scheduler's row."""
        return f"{len(self.raised)} new alarms, {len(self.cleared)} over, {self.standing} stand; {self.path.name}"


def drift_dir(settings: Settings) -> Path:
    """Where the reports lie."""
    return settings.state_dir / "drift"


def latest_report(settings: Settings) -> Path | None:
    """The newest report as JSON; None when there is none."""
    return max(drift_dir(settings).glob("????-??-??T*.json"), default=None)


def look(settings: Settings, store: JobStore, now: datetime, every_seconds: float) -> Look:
    """Judge the present, write the report, tell of alarms that are new.

    Args:
        settings: of the node.
        store: with the observations.
        now: the end of the current window.
        every_seconds: how often this is done: the false alarms of a year are spread over so many looks.

    Raises:
        StoreUnavailable: the store does not answer; the next look tells of what this one found.
        ConfigurationError: the reference window is empty, or the report cannot be written.
    """
    drift = settings.drift
    since, until, current_since = _windows(drift, now)
    studies = store.observations(min(since, current_since), now, _MOST_STUDIES)
    rules = Rules(
        drift.minimum_reference,
        drift.minimum_current,
        drift.false_alarms_per_year,
        max(_SECONDS_OF_A_YEAR / every_seconds, 1.0),
    )
    report = watch(Window.of(studies, since, until), Window.of(studies, current_since, now), rules)
    path = _write(drift_dir(settings), report, drift.keep_reports)
    # after the report: an alarm that is told has one to look at
    raised, cleared = store.note_drift(report.alarms, report.quiet, now=now)
    for chart in raised:
        get_logger().warning("drift_alarm", kind=chart, detail=report.alarms[chart])
    for chart in cleared:
        get_logger().info("drift_over", kind=chart)
    return Look(report, path, tuple(raised), tuple(cleared), len(store.drift_alarms()))


def _windows(drift: DriftSettings, now: datetime) -> tuple[datetime, datetime, datetime]:
    """Begin and end of the reference, begin of the current window."""
    current = now - timedelta(days=drift.current_days)
    if drift.reference_from is None:
        return current - timedelta(days=drift.reference_days), current, current
    since = datetime.combine(drift.reference_from, time(), UTC)
    until = min(since + timedelta(days=drift.reference_days), now)
    if since >= now:
        raise ConfigurationError(f"drift.reference_from {drift.reference_from} lies in the future")
    # a current window must not judge itself
    return since, until, max(current, until)


def _write(folder: Path, report: DriftReport, keep: int) -> Path:
    name = f"{report.made_at:%Y-%m-%dT%H%M%SZ}"
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        _replace(folder / f"{name}.html", to_html(report))
        _replace(folder / f"{name}.json", json.dumps(report.to_json(), indent=1))
        for old in sorted(folder.glob("????-??-??T*.json"))[:-keep]:
            old.with_suffix(".html").unlink(missing_ok=True)
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the drift report could not be written to {folder} ({error.strerror})") from error
    return folder / f"{name}.json"


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as part:
        part.write(text)
        part.flush()
        os.fsync(part.fileno())
    Path(part.name).replace(path)
