"""What a process has counted since its node was installed: sums and durations, for `osteo run monitor`.

Counted where something happens, or from the log line that tells of it. Every label's values are known beforehand or
bounded in number: what a stranger sends never becomes a label, nor does anything of a patient.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

MAXIMUM_SERIES: Final = 200
"""Of one metric; what comes after that is counted under `OTHERS`."""

OTHERS: Final = "others"


class Measure(NamedTuple):
    """What is counted.

    Attributes:
        help: what it tells.
        labels: names, in their order.
        buckets: upper bounds in seconds of a histogram; empty for a counter.
    """

    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STAGE_SECONDS: Final = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1800.0)

MEASURES: Final[Mapping[str, Measure]] = {
    "osteo_objects_received_total": Measure("Objects made durable, by what they were to this node.", ("outcome",)),
    "osteo_received_bytes_total": Measure("Bytes of these objects."),
    "osteo_refusals_total": Measure("Connections, associations, requests and objects refused.", ("kind", "reason")),
    "osteo_screenings_total": Measure("Screenings that ended, by how.", ("outcome",)),
    "osteo_stage_seconds": Measure("How long a stage of a screening took.", ("stage",), _STAGE_SECONDS),
    "osteo_deliveries_ended_total": Measure("Attempts at a delivery that ended, by how.", ("destination", "outcome")),
    "osteo_workers_died_total": Measure("Screening workers that ended in the middle."),
    "osteo_studies_completed_total": Measure("Studies given to screening, by whether images lacked.", ("evidence",)),
    "osteo_log_lines_total": Measure("Log lines that warn of something.", ("level",)),
}

_REFUSALS: Final = frozenset(
    {
        "association_cut_off",
        "association_refused",
        "certificates_refused",
        "connection_refused",
        "contexts_refused",
        "object_refused",
        "request_declined",
        "web_request_refused",
    }
)
_REPEATED: Final = "refusals_repeated"
_REASONS: Final = frozenset(
    {
        "a PDU did not come in time",
        "address not among the sources",
        "answers that nobody reads",
        "called AE title is not ours",
        "calling AE title comes from an address that is not its own",
        "calling AE title is not among the sources",
        "calling AE title must come over TLS",
        "certificate of another than the calling AE title",
        "connection lost",
        "little is free: no new study is begun",
        "little room is left: backfill waits",
        "no association request in time",
        "no certificate is listed for the calling AE title",
        "no request in time",
        "no thread is left",
        "none of its presentation contexts is taken",
        "out of file descriptors or memory",
        "the announced PDU is too long",
        "the command set is too long",
        "the data set is too long",
        "too many associations",
        "too many connections for nothing",
        "too many silent connections",
    }
)
"""Reasons that become labels; a text that a peer may have had a part in never does."""
_STATUS: Final = re.compile("0x[0-9A-F]{4}")
_OUTCOME_WORDS: Final = re.compile(r"[a-z_]+")

Key = tuple[str, tuple[str, ...]]


class Tally:
    """Sums by metric and label values; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[Key, list[float]] = {}
        self._series: dict[str, int] = {}

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        """Add to a counter.

        Raises:
            KeyError: there is no such counter.
        """
        measure = MEASURES[name]
        with self._lock:
            self._row(name, measure, labels)[0] += amount

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Add a duration to a histogram.

        Raises:
            KeyError: there is no such histogram.
        """
        measure = MEASURES[name]
        with self._lock:
            row = self._row(name, measure, labels)
            place = sum(seconds > bound for bound in measure.buckets)
            row[place] += 1
            row[-1] += seconds

    def hear(self, event: Mapping[str, Any]) -> None:
        """Count what a log line tells."""
        slug = event.get("event")
        if event.get("level") in ("warning", "error", "critical"):
            self.count("osteo_log_lines_total", str(event["level"]))
        if slug in _REFUSALS:
            self.count("osteo_refusals_total", str(slug), _reason(event))
        elif slug == _REPEATED and event.get("kind") in _REFUSALS:
            self.count("osteo_refusals_total", event["kind"], _reason(event), amount=int(event.get("count", 0)))
        elif slug == "screening_ended":
            # "retry, gpu_lost", "failed, ...": the first word is what became of the study
            self.count("osteo_screenings_total", _first_word(event.get("outcome")))
            self.observe("osteo_stage_seconds", float(event.get("duration_s", 0.0)), "all")
        elif slug == "delivery_ended":
            self.count(
                "osteo_deliveries_ended_total", str(event.get("destination", "")), _first_word(event.get("outcome"))
            )
        elif slug == "worker_died":
            self.count("osteo_workers_died_total")
        elif slug in ("study_complete", "study_incomplete"):
            self.count("osteo_studies_completed_total", str(slug).removeprefix("study_"))

    def to_json(self) -> list[list[Any]]:
        """All sums: name, label values, numbers (a counter has one; a histogram its buckets, those above, the sum)."""
        with self._lock:
            return [[name, list(labels), list(row)] for (name, labels), row in self._sums.items()]

    def take_up(self, document: Any) -> None:
        """Go on from what an earlier process of this role had counted; what is not understood counts as nothing."""
        for name, labels, row in read_sums(document):
            with self._lock:
                own = self._row(name, MEASURES[name], labels)
                own[:] = [mine + earlier for mine, earlier in zip(own, row, strict=True)]

    def _row(self, name: str, measure: Measure, labels: tuple[str, ...]) -> list[float]:
        key = (name, labels)
        if key not in self._sums:
            if len(labels) != len(measure.labels):
                raise KeyError(f"{name} has the labels {measure.labels}")
            if self._series.get(name, 0) >= MAXIMUM_SERIES:
                key = (name, (OTHERS,) * len(labels))
            if key not in self._sums:
                self._series[name] = self._series.get(name, 0) + 1
                # a histogram: one for each bucket, one for what is longer, the sum of seconds
                self._sums[key] = [0.0] * (len(measure.buckets) + 2 if measure.buckets else 1)
        return self._sums[key]


def read_sums(document: Any) -> list[tuple[str, tuple[str, ...], list[float]]]:
    """What `Tally.to_json` wrote; rows of another version that do not fit are left out."""
    found: list[tuple[str, tuple[str, ...], list[float]]] = []
    for entry in document if isinstance(document, list) else ():
        try:
            name, labels, row = entry
            measure = MEASURES[name]
            numbers = [float(number) for number in row]
        except (KeyError, TypeError, ValueError):
            continue
        length = len(measure.buckets) + 2 if measure.buckets else 1
        if len(labels) == len(measure.labels) and len(numbers) == length:
            found.append((name, tuple(str(label) for label in labels), numbers))
    return found


TALLY: Final = Tally()
"""This process's own."""


def _reason(event: Mapping[str, Any]) -> str:
    """The status that a sender heard, or one of the reasons that are known beforehand."""
    status = str(event.get("status", ""))
    if _STATUS.fullmatch(status):
        return status
    reason = str(event.get("reason", ""))
    return reason if reason in _REASONS else OTHERS


def _first_word(outcome: object) -> str:
    found = _OUTCOME_WORDS.match(str(outcome))
    return found.group() if found else OTHERS
