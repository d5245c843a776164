"""Versions of model bundles: where they come from, how they were judged, and the way in and out of use."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import RedirectResponse, Response

from osteo_daemon.console.pages import NotHere, Visit
from osteo_daemon.errors import BundleError
from osteo_daemon.inference.bundle import read_bundle
from osteo_daemon.registry.version import Version, objection, verdict_of

_PLOT = "docs/refit.png"
_HISTORY = 100


def show_models(visit: Visit) -> Response:
    """Every version and the history of changes."""
    registry = visit.node.registry
    faults: list[tuple[str, str]] = []
    try:
        rows = [_row(visit, version) for version in registry.versions()]
    except BundleError:
        # one that is damaged must not hide the others' names
        rows, faults = [], [(title, fault) for title, fault in registry.verify() if fault is not None]
    history = list(reversed(registry.history()))[:_HISTORY]
    return visit.show("models.html", rows=rows, faults=faults, history=history, network=_network(visit))


def show_model(visit: Visit) -> Response:
    """One version with its verdict, and how it does beside the deployed one."""
    from osteo_daemon.registry.paired import compare_shadow

    version = _version(visit)
    registry, store = visit.node.registry, visit.node.store
    bundle = read_bundle(version.path)
    deployed = registry.deployed(version.name)
    rows = [row for row in store.shadows(version.sha256) if row.deployed_sha256 == deployed.sha256]
    verdict = verdict_of(bundle)
    names = (version.version, *filter(None, [version.compared_with]))
    return visit.show(
        "model.html",
        row=_row(visit, version),
        deployed_version=deployed,
        verdict=verdict,
        verdict_text="" if verdict is None else json.dumps(verdict, indent=1),
        plot=_PLOT in bundle.files,
        comparison=compare_shadow(rows) if rows else None,
        objection=objection(version, deployed),
        network=_network(visit),
        history=[
            change
            for change in reversed(registry.history(version.name))
            if change.to_version in names or change.from_version in names
        ],
    )


def show_plot(visit: Visit) -> Response:
    """The picture that a refit's verdict comes with; no other file of a bundle is served."""
    bundle = read_bundle(_version(visit).path)
    if _PLOT not in bundle.files:
        raise NotHere("this version has no picture of its verdict")
    return Response((bundle.path / _PLOT).read_bytes(), media_type="image/png")


def change_model(visit: Visit) -> Response:
    """Promote a version, or let it run in the shadow."""
    version, who, reason = _version(visit), visit.person.name, visit.reason()
    registry = visit.node.registry
    if visit.names["act"] == "promote":
        before = registry.promote(version.name, version.version, who=who, reason=reason)
        visit.say(f"{version.name} {version.version} is deployed; {before.version} was before.")
    elif visit.names["act"] == "shadow":
        registry.cast_shadow(version.name, version.version, who=who, reason=reason)
        visit.say(f"{version.version} runs in the shadow.")
    else:
        raise NotHere
    return RedirectResponse("/models", 303)


def change_deployed(visit: Visit) -> Response:
    """Roll a bundle back, or end its shadow."""
    name, who, reason, registry = visit.names["name"], visit.person.name, visit.reason(), visit.node.registry
    if name not in {version.name for version in registry.versions()}:
        raise NotHere("there is no bundle of this name")
    if visit.names["act"] == "rollback":
        now = registry.rollback(name, who=who, reason=reason)
        visit.say(f"{name} {now.version} is deployed again.")
    elif visit.names["act"] == "unshadow":
        registry.cast_shadow(name, None, who=who, reason=reason)
        visit.say("No candidate runs in the shadow.")
    else:
        raise NotHere
    return RedirectResponse("/models", 303)


def _version(visit: Visit) -> Version:
    """By comparison with what there is: nothing of a request becomes a path."""
    wanted = visit.names["name"], visit.names["version"]
    for version in visit.node.registry.versions():
        if (version.name, version.version) == wanted:
            # the registered copy comes before the shipped one of the same name
            return visit.node.registry.version(*wanted)
    raise NotHere("there is no such version")


def _row(visit: Visit, version: Version) -> dict[str, Any]:
    registry = visit.node.registry
    shadow = registry.shadow(version.name)
    return {
        "version": version,
        "deployed": registry.deployed(version.name).path == version.path,
        "shadow": shadow is not None and shadow.path == version.path,
        "signed": registry.is_signed(version),
    }


def _network(visit: Visit) -> str:
    return visit.node.settings.screener.network_bundle
