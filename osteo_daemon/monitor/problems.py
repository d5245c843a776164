"""What is amiss at a node, in words that name no patient: for its health, its readiness and its messages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from osteo_daemon.domain.breaker import BreakerState
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.monitor.look import FOR_A_PERSON, Look
from osteo_daemon.settings import Settings


class Severity(StrEnum):
    """How soon somebody must hear of it."""

    CRITICAL = "critical"  # at any hour: studies are not taken, or will soon not be
    WARNING = "warning"  # at working hours: studies wait, or need a person


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is amiss.

    Attributes:
        key: the same as long as it is the same problem.
        severity: how soon somebody must hear of it.
        text: one sentence for a person.
        unhealthy: a process of the node is gone or hangs.
        unready: the node doesn't take or do its work.
    """

    key: str
    severity: Severity
    text: str
    unhealthy: bool = False
    unready: bool = False


def problems_of(look: Look, settings: Settings) -> list[Problem]:
    """Everything that is amiss now, the worst first."""
    found = [*_processes(look), *_memory(look, settings), *_studies(look, settings), *_destinations(look)]
    return sorted(found, key=lambda problem: problem.severity is not Severity.CRITICAL)


def is_healthy(problems: list[Problem]) -> bool:
    """Every process that the settings want runs and comes round."""
    return not any(problem.unhealthy for problem in problems)


def is_ready(problems: list[Problem]) -> bool:
    """The node takes studies and works on them."""
    return not any(problem.unready or problem.unhealthy for problem in problems)


def _processes(look: Look) -> list[Problem]:
    found: list[Problem] = []
    for role, wanted in look.wanted.items():
        well = look.well(role)
        if len(well) < wanted:
            severity = Severity.CRITICAL if role in ("receiver", "dicomweb") else Severity.WARNING
            text = f"The role {role} does not run, or hangs ({len(well)} of {wanted} processes are well)."
            found.append(Problem(f"role:{role}", severity, text, unhealthy=True))
        elif any(sign.state != "ready" for sign in well):
            text = f"The role {role} has started and is not ready yet."
            found.append(Problem(f"starting:{role}", Severity.WARNING, text, unready=True))
    return found


def _memory(look: Look, settings: Settings) -> list[Problem]:
    found: list[Problem] = []
    if not look.store_answers:
        found.append(Problem("store", Severity.CRITICAL, "The job store does not answer.", unready=True))
    free = f"{look.free_bytes / 1e9:.1f} GB of {look.size_bytes / 1e9:.1f} GB are free"
    if look.free_bytes < settings.receiver.minimum_free_bytes:
        text = f"The spool's disk is full ({free}): nothing is received."
        found.append(Problem("disk_full", Severity.CRITICAL, text, unready=True))
    elif look.free_bytes < settings.receiver.low_watermark_bytes:
        text = f"The spool's disk is nearly full ({free}): no new study is taken."
        found.append(Problem("disk_low", Severity.CRITICAL, text))
    if stale := sorted({run.step for run in look.runs if run.outcome not in (None, "done")}):
        found.append(Problem("steps", Severity.WARNING, f"The last run did not succeed of: {', '.join(stale)}."))
    return found


def _studies(look: Look, settings: Settings) -> list[Problem]:
    found: list[Problem] = []
    for state in FOR_A_PERSON:
        if count := look.jobs.get(state, 0):
            text = f"{count} studies are {state.value} and wait for a person."
            found.append(Problem(f"jobs:{state.value}", Severity.WARNING, text))
    waits = look.oldest.get(JobState.READY)
    if waits is not None and (seconds := (look.at - waits).total_seconds()) > settings.monitor.waiting_seconds:
        text = f"A study has waited for its screening for {seconds / 60:.0f} minutes."
        found.append(Problem("waiting", Severity.WARNING, text))
    if look.drift_alarms:
        found.append(Problem("drift", Severity.WARNING, f"{look.drift_alarms} drift charts are out of their limits."))
    return found


def _destinations(look: Look) -> list[Problem]:
    found: list[Problem] = []
    for name, breaker in look.breakers.items():
        if breaker.state is BreakerState.OPEN:
            since = f"{breaker.since:%Y-%m-%d %H:%M} UTC"
            text = f"The destination {name} has not answered since {since}; its reports wait."
            found.append(Problem(f"circuit:{name}", Severity.WARNING, text))
    for (name, state), count in look.deliveries.items():
        if state is DeliveryState.REFUSED:
            text = f"{count} deliveries to {name} were refused and wait for a person."
            found.append(Problem(f"refused:{name}", Severity.WARNING, text))
    return found
