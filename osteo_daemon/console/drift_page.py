"""Drift: the latest report and those before it, their charts, and the alarms that stand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from osteo_daemon.console.pages import NotDone, NotHere, Visit
from osteo_daemon.drift_watch import drift_dir

_REPORTS = 60
_CHARTS = 24
_WIDTH, _HEIGHT, _EDGE = 480.0, 150.0, 14.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart as numbers for a picture of `_WIDTH` by `_HEIGHT`.

    Attributes:
        points: (x, y) of each mark, and whether it lies outside the limits.
        band: y of upper and lower limit; ``mean``: y of the reference.
        highest, lowest: of the scale, in the chart's unit.
    """

    points: tuple[tuple[float, float, bool], ...]
    band: tuple[float, float]
    mean: float
    highest: float
    lowest: float

    @property
    def line(self) -> str:
        """For a polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _out in self.points)


def show_drift(visit: Visit) -> Response:
    """A report: the one that is asked for, or the latest."""
    folder = drift_dir(visit.node.settings)
    reports = {path.stem: path for path in sorted(folder.glob("????-??-??T*.json"), reverse=True)[:_REPORTS]}
    wanted = visit.query.get("report", "") or next(iter(reports), "")
    if wanted and wanted not in reports:
        raise NotHere("there is no such report")
    document: dict[str, Any] | None = None
    if wanted:
        try:
            document = json.loads(reports[wanted].read_bytes())
        except (OSError, ValueError) as error:
            raise NotDone(f"the report cannot be read: {type(error).__name__}") from None
    charts = [] if document is None else [chart for scope in document["scopes"] for chart in scope["charts"]]
    charts.sort(key=lambda chart: (not chart["alarm"], chart["probability"]))
    return visit.show(
        "drift.html",
        alarms=visit.node.store.drift_alarms(),
        reports=list(reports),
        wanted=wanted,
        report=document,
        charts=[(chart, draw(chart)) for chart in charts[:_CHARTS]],
        left_out=max(len(charts) - _CHARTS, 0),
        size=(_WIDTH, _HEIGHT),
    )


def draw(chart: dict[str, Any]) -> Drawing | None:
    """A chart's marks between its limits; None for one without marks."""
    marks: list[float] = chart["marks"]
    limits: list[float] | None = chart["limits"]
    if not marks or limits is None:
        return None
    lowest, highest = min(*marks, limits[0]), max(*marks, limits[1])
    span = (highest - lowest) or 1.0

    def height(value: float) -> float:
        return _HEIGHT - _EDGE - (value - lowest) / span * (_HEIGHT - 2 * _EDGE)

    step = (_WIDTH - 2 * _EDGE) / max(len(marks) - 1, 1)
    points = tuple(
        (_EDGE + number * step, height(mark), not limits[0] <= mark <= limits[1]) for number, mark in enumerate(marks)
    )
    middle = min(max(float(chart["reference"]), lowest), highest)
    return Drawing(points, (height(limits[1]), height(limits[0])), height(middle), highest, lowest)
