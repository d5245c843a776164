"""What an archive holds and which of it is wanted: studies and series as it tells of them, and rules that choose."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta

from osteo_daemon.errors import OsteoError

FIRST_DAY = date(1970, 1, 1)
"""Where a range without a beginning begins: no CT is older."""

_MINUTES_OF_A_DAY = 24 * 60


@dataclass(frozen=True, slots=True)
class FoundStudy:
    """A study as an archive describes it; what tells of the patient stays in memory and out of every text.

    Attributes:
        modalities: of its series; empty when the archive doesn't say.
        instances: how many objects the archive has of it; None when it doesn't say.
    """

    study_instance_uid: str
    study_date: str = ""
    modalities: tuple[str, ...] = ()
    description: str = field(default="", repr=False)
    instances: int | None = None
    patient_id: str = field(default="", repr=False)
    accession_number: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class FoundSeries:
    """A series as an archive describes it."""

    series_instance_uid: str
    modality: str = ""
    body_part: str = ""
    instances: int | None = None


@dataclass(frozen=True, slots=True)
class FoundStudies:
    """What an archive answered to one question.

    Attributes:
        error: why these may not be all; None when they are.
    """

    studies: tuple[FoundStudy, ...]
    error: OsteoError | None


@dataclass(frozen=True, slots=True)
class Target:
    """What is fetched: a series, or of it only some objects."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retrieved:
    """How a retrieval ended; what came is judged by what is stored.

    Attributes:
        failed: SOP Instance UIDs that the archive says did not come.
        refused: what this node itself refused for good, with the reason, by SOP Instance UID.
    """

    failed: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """A range of study dates, or of minutes within one day: what one query asks for.

    Attributes:
        first_minute: of the first day; with ``last_minute`` other than the whole day only for a span of one day.
    """

    first: date
    last: date
    first_minute: int = 0
    last_minute: int = _MINUTES_OF_A_DAY - 1

    @property
    def dates(self) -> str:
        """Value of Study Date for range matching (PS3.4 C.2.2.2.5)."""
        if self.first == self.last:
            return f"{self.first:%Y%m%d}"
        return f"{self.first:%Y%m%d}-{self.last:%Y%m%d}"

    @property
    def times(self) -> str:
        """Value of Study Time for range matching; empty for whole days."""
        if (self.first_minute, self.last_minute) == (0, _MINUTES_OF_A_DAY - 1):
            return ""
        start, end = divmod(self.first_minute, 60), divmod(self.last_minute, 60)
        return f"{start[0]:02d}{start[1]:02d}00-{end[0]:02d}{end[1]:02d}59.999999"

    def halves(self) -> tuple[Span, ...]:
        """Two spans that together are this one; empty for a single minute."""
        if self.first < self.last:
            middle = self.first + (self.last - self.first) // 2
            return Span(self.first, middle), Span(middle + timedelta(days=1), self.last)
        if self.first_minute < self.last_minute:
            minute = (self.first_minute + self.last_minute) // 2
            return (
                Span(self.first, self.last, self.first_minute, minute),
                Span(self.first, self.last, minute + 1, self.last_minute),
            )
        return ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which studies and which of their series; nothing in it tells of a patient.

    Attributes:
        modalities: of the series that are fetched; a study needs one of them.
        body_parts: Body Part Examined; a series without one is taken too, since many scanners give none.
        description: pattern of the Study Description with ``*`` and ``?``, without regard to case; empty takes all.
        whole_study: fetch every series of a study, not only those of the modalities and body parts.
    """

    modalities: tuple[str, ...] = ("CT",)
    body_parts: tuple[str, ...] = ()
    description: str = ""
    whole_study: bool = False

    def takes_study(self, study: FoundStudy) -> bool:
        """Whether a study is wanted as far as the archive describes it."""
        if study.modalities and not set(self.modalities) & set(study.modalities):
            return False
        return not self.description or fnmatch.fnmatchcase(study.description.upper(), self.description.upper())

    def has(self, series: FoundSeries) -> bool:
        """Whether a series is one that the study is wanted for."""
        if series.modality not in self.modalities:
            return False
        return not (self.body_parts and series.body_part) or series.body_part.upper() in self.body_parts

    def chosen(self, series: tuple[FoundSeries, ...]) -> tuple[FoundSeries, ...]:
        """The series to fetch; none when the study has no series that it is wanted for."""
        wanted = tuple(entry for entry in series if self.has(entry))
        return series if wanted and self.whole_study else wanted
