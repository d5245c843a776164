"""What is kept of every finished study to see whether scanners, rules or networks drift: numbers and codes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

_TEXT_LENGTH = 64  # VR LO, PS3.5 6.2


@dataclass(frozen=True, slots=True)
class Scanner:
    """What acquired a study: maker and model as the header names them, and the class of the kernel; empty: unknown."""

    manufacturer: str = ""
    model: str = ""
    kernel: str = ""

    @classmethod
    def named(cls, manufacturer: object, model: object, kernel: str) -> Scanner:
        """From header values: one spelling of case and spaces, printable, not longer than the standard allows."""
        return cls(_plain(manufacturer), _plain(model), kernel)

    @property
    def label(self) -> str:
        """For people."""
        return " ".join(part for part in (self.manufacturer, self.model, self.kernel) if part) or "unknown"


@dataclass(frozen=True, slots=True)
class Observation:
    """One finished study as drift monitoring sees it.

    Attributes:
        at: when its screening first ended, aware.
        scanner: what acquired it; all unknown where nothing could be read.
        outcome: ``reported``, or the code of its exclusion, hold or failure.
        category: of `findings.Category`; None without a report.
        levels_hu: median attenuation in HU as measured, by level, of levels that no blocking flag keeps out.
        flags: codes of its quality flags, those of its vertebrae and of the network's estimates included.
        network: digest of the bundle of the network channel; None when that gave nothing.
        network_class: class of the highest mean probability over its vertebrae; None when withheld.
        expert: index of the expert with the highest mean gate weight; None without network.
    """

    at: datetime
    scanner: Scanner
    outcome: str
    category: str | None = None
    levels_hu: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    network: str | None = None
    network_class: str | None = None
    expert: int | None = None


def observe(result: Mapping[str, Any], scanner: Scanner, at: datetime) -> Observation:
    """What is kept of a result.

    Args:
        result: of schema ``osteo-result/1``, of any version; keys that are missing count as empty.
        scanner: what acquired the series.
        at: when the screening ended.
    """
    exclusion = result.get("exclusion")
    if exclusion is not None:
        return Observation(at, scanner, str(exclusion["code"]))
    vertebrae: Sequence[Mapping[str, Any]] = result.get("vertebrae", ())
    estimates = [entry["network"] for entry in vertebrae if entry.get("network")]
    flags = [*result.get("quality_flags", ())]
    for entry in (*vertebrae, *estimates):
        flags += entry.get("quality_flags", ())
    classes = [entry["class_probabilities"] for entry in estimates if entry.get("class_probabilities")]
    weights = [entry["expert_weights"] for entry in estimates if entry.get("expert_weights")]
    models: Sequence[Mapping[str, Any]] = result.get("models", ())
    expert = _highest({str(k): sum(w[k] for w in weights) for k in range(min(map(len, weights)))}) if weights else None
    return Observation(
        at=at,
        scanner=scanner,
        outcome=str(result.get("outcome", "")),
        category=result.get("category"),
        levels_hu={
            str(entry["level"]): round(float(entry["attenuation_hu"]["median"]), 2)
            for entry in vertebrae
            if entry.get("attenuation_hu") and not _is_blocked(entry)
        },
        flags=tuple(sorted({str(flag["code"]) for flag in flags})),
        network=str(models[-1]["sha256"]) if estimates and models else None,
        network_class=_highest({name: sum(entry[name] for entry in classes) for name in classes[0]})
        if classes
        else None,
        expert=None if expert is None else int(expert),
    )


def _is_blocked(entry: Mapping[str, Any]) -> bool:
    return any(flag.get("severity") == "blocking" for flag in entry.get("quality_flags", ()))


def _highest(sums: Mapping[str, float]) -> str:
    return max(sums, key=lambda name: sums[name])


def _plain(value: object) -> str:
    words = "".join(c if c.isprintable() else " " for c in str(value or "")).upper().split()
    return " ".join(words)[:_TEXT_LENGTH].rstrip()
