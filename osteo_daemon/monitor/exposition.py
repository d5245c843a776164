"""The node's metrics in Prometheus' words.

Labels are states, roles, stages, names from the settings and words of this code: nothing that a stranger sends, nothing
of a patient, and a bounded number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from osteo_daemon.domain.breaker import BreakerState
from osteo_daemon.domain.job import JobState
from osteo_daemon.monitor.look import Look
from osteo_daemon.settings import Settings
from osteo_daemon.tally import MEASURES, read_sums
from osteo_daemon.vitals import Sign

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def exposition(look: Look, settings: Settings) -> bytes:
    """Prometheus' text format, 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(look, settings))
    return generate_latest(registry)


def families(look: Look, settings: Settings) -> Iterator[Metric]:
    """Every metric of the node; those of an absent store are left out."""
    info = GaugeMetricFamily("osteo_build_info", "The program's version, as a label.", labels=["version"])
    info.add_metric([version("osteo-daemon")], 1)
    yield info
    yield GaugeMetricFamily("osteo_store_up", "Whether the job store answers.", float(look.store_answers))
    yield from _roles(look)
    yield from _disk(look, settings)
    yield from _screeners(look)
    if look.store_answers:
        yield from _studies(look)
        yield from _destinations(look, settings)
        yield from _steps(look)
    yield from _sums(look.signs)


class _Families(Collector):
    def __init__(self, look: Look, settings: Settings) -> None:
        self._look = look
        self._settings = settings

    def collect(self) -> Iterator[Metric]:
        return families(self._look, self._settings)


def _roles(look: Look) -> Iterator[Metric]:
    well = GaugeMetricFamily("osteo_role_processes", "Processes of a role that come round.", labels=["role"])
    wanted = GaugeMetricFamily("osteo_role_processes_wanted", "As many as the settings want.", labels=["role"])
    ready = GaugeMetricFamily("osteo_role_processes_ready", "Those that take work.", labels=["role"])
    for role, count in look.wanted.items():
        well.add_metric([role], len(look.well(role)))
        wanted.add_metric([role], count)
        ready.add_metric([role], sum(sign.state == "ready" for sign in look.well(role)))
    yield from (well, wanted, ready)


def _disk(look: Look, settings: Settings) -> Iterator[Metric]:
    yield GaugeMetricFamily("osteo_disk_free_bytes", "Free space of the spool's disk.", look.free_bytes)
    yield GaugeMetricFamily("osteo_disk_size_bytes", "Size of the spool's disk.", look.size_bytes)
    limits = settings.receiver
    yield GaugeMetricFamily("osteo_disk_low_bytes", "Below this no new study is taken.", limits.low_watermark_bytes)
    yield GaugeMetricFamily("osteo_disk_minimum_bytes", "Below this nothing is received.", limits.minimum_free_bytes)


def _screeners(look: Look) -> Iterator[Metric]:
    states = ("loading", "idle", "screening", "paused", "drained")
    family = GaugeMetricFamily("osteo_screeners", "Screening processes by what they do.", labels=["state"])
    said = [str(status.get("state")) for status in look.screeners]
    for state in states:
        family.add_metric([state], said.count(state))
    yield family
    memory = GaugeMetricFamily("osteo_gpu_memory_bytes", "Memory of a screener's GPU.", labels=["screener", "kind"])
    for number, status in enumerate(look.screeners, start=1):
        seen = status.get("gpu_memory")
        for kind, size in seen.items() if isinstance(seen, dict) else ():
            if kind in ("used", "total") and isinstance(size, int):
                memory.add_metric([str(number), kind], size)
    yield memory


def _studies(look: Look) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("osteo_jobs", "Studies in each state.", labels=["state"])
    for state in JobState:
        jobs.add_metric([state.value], look.jobs.get(state, 0))
    yield jobs
    oldest = GaugeMetricFamily(
        "osteo_oldest_job_age_seconds", "Since the oldest study in a state came; absent without one.", labels=["state"]
    )
    for state, came in look.oldest.items():
        oldest.add_metric([state.value], max((look.at - came).total_seconds(), 0.0))
    yield oldest
    yield GaugeMetricFamily("osteo_drift_alarms", "Drift charts out of their limits.", look.drift_alarms)


def _destinations(look: Look, settings: Settings) -> Iterator[Metric]:
    deliveries = GaugeMetricFamily(
        "osteo_deliveries", "Deliveries in each state, by destination.", labels=["destination", "state"]
    )
    for (name, delivery_state), count in look.deliveries.items():
        deliveries.add_metric([name, delivery_state.value], count)
    yield deliveries
    circuit = GaugeMetricFamily(
        "osteo_circuit_state", "1 for the state that a destination's circuit is in.", labels=["destination", "state"]
    )
    for entry in settings.destinations:
        present = look.breakers[entry.name].state if entry.name in look.breakers else BreakerState.CLOSED
        for state in BreakerState:
            circuit.add_metric([entry.name, state.value], float(state is present))
    yield circuit


def _steps(look: Look) -> Iterator[Metric]:
    last = GaugeMetricFamily("osteo_step_last_run_timestamp_seconds", "When a timed step began last.", labels=["step"])
    due = GaugeMetricFamily("osteo_step_interval_seconds", "How far apart two runs of it are.", labels=["step"])
    fine = GaugeMetricFamily("osteo_step_ok", "Whether its last run succeeded.", labels=["step"])
    failures = CounterMetricFamily("osteo_step_failures", "Its runs that failed.", labels=["step"])
    for run in look.runs:
        due.add_metric([run.step], run.interval_seconds)
        failures.add_metric([run.step], run.failures)
        if run.started_at is not None:
            last.add_metric([run.step], run.started_at.timestamp())
            fine.add_metric([run.step], float(run.outcome == "done"))
    yield from (last, due, fine, failures)


def _sums(signs: Sequence[Sign]) -> Iterator[Metric]:
    """What the processes have counted, added up: a process that was replaced has handed its sums on."""
    total: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for sign in signs:
        for name, labels, row in read_sums(sign.sums):
            earlier = total.get((name, labels), [0.0] * len(row))
            total[name, labels] = [one + other for one, other in zip(earlier, row, strict=True)]
    for name, measure in MEASURES.items():
        rows = {labels: row for (named, labels), row in total.items() if named == name}
        if measure.buckets:
            histogram = HistogramMetricFamily(name, measure.help, labels=measure.labels)
            for labels, row in sorted(rows.items()):
                counts, below = [], 0.0
                for bound, count in zip([*map(str, measure.buckets), "+Inf"], row, strict=False):
                    below += count
                    counts.append((bound, below))
                histogram.add_metric(labels, counts, sum_value=row[-1])
            yield histogram
        else:
            counter = CounterMetricFamily(name, measure.help, labels=measure.labels)
            for labels, row in sorted(rows.items()) if measure.labels else [((), rows.get((), [0.0]))]:
                counter.add_metric(labels, row[0])
            yield counter
