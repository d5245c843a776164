"""The first page: how many studies stand where and for how long, room, screeners, peers, what the scheduler does."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from osteo_daemon.console.pages import Visit
from osteo_daemon.control import read_wish, screener_statuses
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.roles import roles_of
from osteo_daemon.vitals import read_signs

_WAITING = (JobState.RECEIVING, JobState.READY, JobState.SCREENING, JobState.REPORTED)
_FOR_A_PERSON = (JobState.HELD, JobState.FAILED)


def show_overview(visit: Visit) -> Response:
    """The whole page."""
    return visit.show("overview.html", **_values(visit))


def overview_part(visit: Visit) -> Response:
    """What changes of it, fetched by the page every few seconds."""
    return visit.part("overview_part.html", **_values(visit))


def _values(visit: Visit) -> dict[str, Any]:
    settings, store = visit.node.settings, visit.node.store
    counts, oldest = store.counts_by_state(), store.oldest_by_state((*_WAITING, *_FOR_A_PERSON))
    deliveries, breakers = store.delivery_counts(), store.breakers()
    dead = sum(count for (_name, state), count in deliveries.items() if state is DeliveryState.REFUSED)
    unproven = sum(count for (_name, state), count in deliveries.items() if state is DeliveryState.UNPROVEN)
    signs = read_signs(settings.state_dir)
    room = shutil.disk_usage(next(folder for folder in settings.spool_dir.parents if folder.exists()))
    return {
        "now": datetime.now(UTC),
        "states": [(state, counts[state], oldest.get(state)) for state in JobState],
        "for_a_person": _FOR_A_PERSON,
        "dead": dead,
        "unproven": unproven,
        "room": room,
        "taken": room.total - room.free,
        "low": room.free < settings.receiver.low_watermark_bytes,
        "roles": [(role, [sign for sign in signs if sign.role == role]) for role in roles_of(settings)],
        "wish": read_wish(settings.state_dir),
        "screeners": screener_statuses(settings.state_dir),
        "destinations": [
            (entry.name, breakers[entry.name].state if entry.name in breakers else None)
            for entry in settings.destinations
        ],
        "runs": [run for run in store.scheduler_runs() if run.started_at is not None],
        "alarms": store.drift_alarms(),
    }
