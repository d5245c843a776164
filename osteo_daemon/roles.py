"""Which processes a node has, by its settings."""

from __future__ import annotations

from osteo_daemon.settings import Settings

ROLES = ("receiver", "dicomweb", "puller", "scheduler", "screener", "deliverer", "refitter", "console", "monitor")
"""Started in this order, ended in it too: what takes work in ends first; ``dicomweb``, ``puller``, ``refitter``,
``console`` and ``monitor`` only where the settings want them."""


def roles_of(settings: Settings) -> list[str]:
    """The roles that these settings want, in the order of their start."""
    unwanted = {"dicomweb"} if not settings.dicomweb.port else set()
    if not settings.refit.enabled:
        unwanted.add("refitter")
    if not settings.console.port:
        unwanted.add("console")
    if not settings.pulls:
        unwanted.add("puller")
    if not (settings.monitor.port or settings.notifications.wanted):
        unwanted.add("monitor")
    return [role for role in ROLES if role not in unwanted]


def screeners_of(settings: Settings) -> dict[str, dict[str, str]]:
    """Names of the screening processes that these settings want, and variables of each: a GPU is seen by one alone."""
    wanted = settings.screener
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in wanted.gpus] or [{} for _ in range(wanted.processes)]
    return {"screener" if number == 1 else f"screener-{number}": slot for number, slot in enumerate(slots, start=1)}
