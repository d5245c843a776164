"""A drift report for people: one HTML file that holds its charts as pictures. No patient, no study in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from osteo_daemon.drift.charts import BATCH_STUDIES
from osteo_daemon.drift.report import Chart, DriftReport
from osteo_daemon.drift.table import OVERALL

_MOST_PICTURES = 12
_COLUMNS = 3
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ddd}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.alarm{background:#fde8e6}img{max-width:100%}"
)


def to_html(report: DriftReport) -> str:
    """The report as a page of its own, without a link to anything."""
    alarms = [chart for chart in report.charts if chart.alarm]
    rules = report.rules
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Drift {report.made_at:%Y-%m-%d}</title>"
        f"<style>{_STYLE}</style><h1>Drift report, {report.made_at:%Y-%m-%d %H:%M} UTC</h1>",
        f"<p>Current window since {report.current_since:%Y-%m-%d}; reference {report.reference_since:%Y-%m-%d} until "
        f"{report.reference_until:%Y-%m-%d}. {report.tests} tests; each alarms below a probability of "
        f"{report.limit:.1e}, so that chance alone raises at most {rules.false_alarms_per_year:g} alarm(s) a year.</p>",
        f"<h2>{len(alarms)} alarm(s)</h2>",
        _table(alarms) if alarms else "<p>Nothing has left its limits.</p>",
    ]
    if shown := _shown(report):
        parts.append(f'<h2>Charts</h2><img alt="control charts" src="data:image/png;base64,{_picture(shown)}">')
        parts.append(f"<p>Each point is {BATCH_STUDIES} studies; the band is where they lie without a change.</p>")
    for scope in report.scopes:
        parts.append(
            f"<h2>{escape(scope.name)}</h2><p>{scope.reference_studies} studies in the reference, "
            f"{scope.current_studies} in the current window.</p>"
        )
        if not scope.enough:
            parts.append(
                f"<p>Not enough data: {rules.minimum_reference} and {rules.minimum_current} are the least.</p>"
            )
        parts.append(_table(scope.charts) if scope.charts else "")
    return "\n".join([*parts, "</html>\n"])


def _table(charts: Sequence[Chart]) -> str:
    rows = "".join(
        f"<tr{' class=alarm' if c.alarm else ''}><td>{escape(c.scope)}<td>{escape(c.says)}"
        f"<td class=n>{c.reference_studies}<td class=n>{c.probability:.1e}<td class=n>{c.dispersion:.1f}</tr>"
        for c in charts
    )
    heads = "<tr><th>scope<th>chart<th>reference studies<th>probability<th>dispersion</tr>"
    return f"<table>{heads}{rows}</table>"


def _shown(report: DriftReport) -> list[Chart]:
    """Alarms first, then attenuation of all studies."""
    drawn = [chart for chart in report.charts if chart.limits is not None and chart.marks]
    alarms = [chart for chart in drawn if chart.alarm]
    calm = [c for c in drawn if not c.alarm and c.scope == OVERALL and c.kind == "mean"]
    return [*alarms, *calm][:_MOST_PICTURES]


def _picture(charts: Sequence[Chart]) -> str:
    """PNG in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(charts) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.4 * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for position, chart in enumerate(charts, start=1):
        axes = figure.add_subplot(rows, _COLUMNS, position)
        assert chart.limits is not None  # noqa: S101 - of `_shown`
        axes.axhspan(*chart.limits, color="#dbe7f3")
        axes.axhline(chart.reference, color="#6a7f94", linewidth=1)
        axes.plot(
            range(1, len(chart.marks) + 1),
            chart.marks,
            marker="o",
            markersize=3,
            color="#b3261e" if chart.alarm else "#1f4e79",
        )
        axes.set_title(f"{chart.scope}\n{chart.feature}", fontsize=8)
        axes.tick_params(labelsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return base64.b64encode(content.getvalue()).decode()
