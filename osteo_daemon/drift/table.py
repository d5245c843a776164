"""Observations of one scope as columns: values with gaps, events, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt

from osteo_daemon.domain.findings import MEASURED_LEVELS, Outcome
from osteo_daemon.domain.observation import Observation

Vector = npt.NDArray[np.float64]

OVERALL = "all"
"""The scope of every study; the others are scanners."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Studies from one moment until before another, oldest first."""

    since: datetime
    until: datetime
    studies: tuple[Observation, ...]

    @classmethod
    def of(cls, studies: Sequence[Observation], since: datetime, until: datetime) -> Window:
        """Those of ``studies`` that lie in it."""
        return cls(since, until, tuple(study for study in studies if since <= study.at < until))

    def of_scanner(self, label: str) -> Window:
        """Those of one scanner."""
        return Window(self.since, self.until, tuple(s for s in self.studies if s.scanner.label == label))

    @property
    def scanners(self) -> Counter[str]:
        """Studies by scanner, of those whose scanner is known."""
        labels = (study.scanner.label for study in self.studies)
        return Counter(label for label in labels if label != "unknown")

    def levels_hu(self) -> dict[str, Vector]:
        """Median attenuation in HU by level, where it was measured."""
        return {
            level.value: np.array([s.levels_hu[level.value] for s in self.studies if level.value in s.levels_hu])
            for level in MEASURED_LEVELS
        }

    def outcomes(self) -> list[str]:
        """Of every study."""
        return [study.outcome for study in self.studies]

    def flags(self) -> list[tuple[str, ...]]:
        """Of every reported study."""
        return [study.flags for study in self.studies if study.outcome == Outcome.REPORTED]

    def categories(self) -> list[str]:
        """Of every reported study."""
        return [study.category for study in self.studies if study.category is not None]

    def classes(self, network: str | None) -> list[str]:
        """The network's class of every study that this bundle gave one."""
        return [s.network_class for s in self.studies if s.network == network and s.network_class is not None]

    def experts(self, network: str | None) -> list[str]:
        """The leading expert of every study that this bundle estimated."""
        return [str(s.expert) for s in self.studies if s.network == network and s.expert is not None]

    @property
    def network(self) -> str | None:
        """The bundle of the last study with estimates: another bundle's are no reference for it."""
        return next((study.network for study in reversed(self.studies) if study.network is not None), None)
