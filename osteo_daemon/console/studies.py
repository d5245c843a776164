"""The list of studies: filtered, a page at a time by the key of its last row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from starlette.responses import RedirectResponse, Response

from osteo_daemon.console import formats
from osteo_daemon.console.pages import NotDone, Visit
from osteo_daemon.domain.job import JobState

_ROWS = 50
_FILTERS = ("state", "source", "code", "since", "until")


def list_studies(visit: Visit) -> Response:
    """A page of the list, newest first."""
    chosen = {name: visit.query.get(name, "").strip() for name in _FILTERS}
    before = visit.query.get("before", "")
    if before and not before.isdecimal():
        raise NotDone("a page begins after the number of a row")
    until = _day(chosen["until"])
    rows = visit.node.store.recent(
        state=_state(chosen["state"]),
        source_ae=chosen["source"] or None,
        code=chosen["code"] or None,
        since=_day(chosen["since"]),
        until=None if until is None else until + timedelta(days=1),
        before_job_id=int(before) if before else None,
        limit=_ROWS + 1,
    )
    more = len(rows) > _ROWS
    rows = rows[:_ROWS]
    query = {name: value for name, value in chosen.items() if value}
    values: dict[str, Any] = {
        "rows": rows,
        "chosen": chosen,
        "states": list(JobState),
        "sources": sorted(
            {*(source.ae_title for source in visit.node.settings.sources), *filter(None, [chosen["source"]])}
        ),
        "following": "/studies?" + urlencode({**query, "before": rows[-1].job_id}) if more else "",
        "first": "/studies?" + urlencode(query) if before else "",
    }
    return visit.show("studies.html", **values)


def find_study(visit: Visit) -> Response:
    """To a study by its UID. The search is posted: people type names, and a name must never stand in an address."""
    wanted = visit.form.get("uid", "").strip()
    if not formats.is_uid(wanted) or visit.node.store.job(wanted) is None:
        visit.say(
            "There is no study with this Study Instance UID. Names and patient numbers are not searched.", "failed"
        )
        return RedirectResponse("/studies", 303)
    return RedirectResponse(f"/studies/{wanted}", 303)


def _state(text: str) -> JobState | None:
    try:
        return JobState(text.upper()) if text else None
    except ValueError:
        raise NotDone("there is no such state") from None


def _day(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) if text else None
    except ValueError:
        raise NotDone("a day is written as 2026-01-31") from None
