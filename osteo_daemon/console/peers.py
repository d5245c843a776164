"""Peers: which destinations answer, what waits for them, when they were last reached; senders and archives."""

from __future__ import annotations

import threading
import time
from typing import Any

from starlette.responses import RedirectResponse, Response

from osteo_daemon.console.pages import NotHere, Visit
from osteo_daemon.delivery.transport import TRANSPORTS
from osteo_daemon.errors import OsteoError
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.pull.archive import open_archive
from osteo_daemon.settings import Settings

_PROBES = threading.BoundedSemaphore(2)
"""Of the process: a page must not become a way to keep a PACS busy."""

_NO_STUDY = "1.2.3"
_SHOWN = 50


def show_peers(visit: Visit) -> Response:
    """Destinations with their breakers, archives, senders."""
    settings, store = visit.node.settings, visit.node.store
    breakers, counts = store.breakers(), store.delivery_counts()
    configured = {entry.name: entry for entry in settings.destinations}
    names = list(dict.fromkeys([*configured, *breakers, *(name for name, _state in counts)]))
    reached = store.last_delivered(names)
    rows: list[dict[str, Any]] = []
    for name in names:
        entry, breaker = configured.get(name), breakers.get(name)
        rows.append(
            {
                "name": name,
                "kind": "" if entry is None else entry.kind,
                "where": "" if entry is None else entry.url or f"{entry.ae_title} {entry.host}:{entry.port}".strip(),
                "configured": entry is not None,
                "tls": entry is not None and (entry.tls or entry.url.startswith("https:")),
                "breaker": breaker,
                "state": None if breaker is None else breaker.state,
                "reached": reached.get(name),
                "counts": {state: counts[name, state] for state in DeliveryState if counts.get((name, state))},
            }
        )
    waiting = (DeliveryState.REFUSED, DeliveryState.UNPROVEN)
    return visit.show(
        "peers.html",
        destinations=rows,
        archives=settings.archives,
        sources=[
            (source, next(iter(store.recent(source_ae=source.ae_title, limit=1)), None)) for source in settings.sources
        ],
        ended=store.deliveries(states=waiting, limit=_SHOWN),
    )


def ask_peer(visit: Visit) -> Response:
    """C-ECHO, or what a peer of another kind answers to; said on the page."""
    name = visit.names["name"]
    if not _PROBES.acquire(blocking=False):
        visit.say("Peers are being asked already; try again in a moment.", "failed")
        return RedirectResponse("/peers", 303)
    try:
        begun = time.perf_counter()
        _ask(visit.node.settings, visit.names["kind"], name)
        visit.say(f"{name} answered in {(time.perf_counter() - begun) * 1000:.0f} ms.")
    except NotHere:
        raise
    except OsteoError as error:
        visit.say(f"{name}: {error}", "failed")
    finally:
        _PROBES.release()
    return RedirectResponse("/peers", 303)


def _ask(settings: Settings, kind: str, name: str) -> None:
    if kind == "destinations":
        for destination in settings.destinations:
            if destination.name == name:
                TRANSPORTS[destination.kind](settings, destination).probe()
                return
    if kind == "archives":
        for archive in settings.archives:
            if archive.name == name:
                with open_archive(settings, archive, threading.Event()).catalogue() as catalogue:
                    catalogue.series(_NO_STUDY)  # a question that costs it nothing
                return
    raise NotHere("no peer of this name is in the settings")
