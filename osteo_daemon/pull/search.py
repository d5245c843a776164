"""Find the studies of an archive that are wanted: ranges that answer too much are split until each answers in full."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from osteo_daemon.domain.archive import FIRST_DAY, FoundStudies, FoundStudy, Span, Wanted
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.pull.archive import ArchiveCatalogue

_WILDCARDS = frozenset("*?\\")


@dataclass(frozen=True, slots=True)
class Identities:
    """Patients or orders to search for; only ever in memory.

    Attributes:
        orders: True for accession numbers, False for Patient IDs.
    """

    values: tuple[str, ...] = field(repr=False)
    orders: bool = False

    def of(self, study: FoundStudy) -> str:
        """What of a study is compared with the list."""
        return study.accession_number if self.orders else study.patient_id


def read_identities(path: Path, *, orders: bool) -> Identities:
    """A list, one identifier a line; empty lines and lines that begin with ``#`` say nothing.

    Raises:
        ConfigurationError: it can't be read, names nobody, or a line can be no identifier; lines are told by number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the list cannot be read: {type(error).__name__}") from None
    values: list[str] = []
    for number, line in enumerate(lines, start=1):
        value = line.strip()
        if not value or value.startswith("#"):
            continue
        if _WILDCARDS & set(value) or len(value) > 64 or not value.isprintable():
            raise ConfigurationError(f"line {number} of the list is no identifier (one a line, without * ? and \\)")
        values.append(value)
    if not values:
        raise ConfigurationError("the list names nobody")
    return Identities(tuple(dict.fromkeys(values)), orders)


def search(
    catalogue: ArchiveCatalogue,
    wanted: Wanted,
    span: Span | None,
    maximum: int,
    *,
    identities: Identities | None = None,
    stopping: threading.Event,
) -> Iterator[FoundStudy]:
    """Studies of the span, or of any date, that are wanted; each once.

    Args:
        maximum: a question with so many answers is split.
        identities: only studies of these; an archive that ignores such a key cannot add strangers.

    Raises:
        PeerUnavailable: the archive does not answer, or not in full even for a single minute.
        Refused: it answers no such questions.
        ConfigurationError: the archive can be asked for dates only, and there are none.
    """
    seen: set[str] = set()
    listed = None if identities is None else frozenset(identities.values)
    if listed is not None and span is None and not catalogue.names_patients:
        raise ConfigurationError(
            "a list for this archive needs a range of dates: patients are never named in a URL, so its studies "
            "of those days are compared with the list here"
        )
    for question in _questions(catalogue, wanted, span, identities):
        for found in _answers(question, span, catalogue, maximum, stopping):
            for study in found.studies:
                if study.study_instance_uid in seen or not wanted.takes_study(study):
                    continue
                if identities is not None and listed is not None and identities.of(study) not in listed:
                    continue
                seen.add(study.study_instance_uid)
                yield study


@dataclass(frozen=True, slots=True)
class _Question:
    modality: str
    patient_id: str = ""
    accession_number: str = ""


def _questions(
    catalogue: ArchiveCatalogue, wanted: Wanted, span: Span | None, identities: Identities | None
) -> Iterator[_Question]:
    for modality in wanted.modalities:
        if identities is None or not catalogue.names_patients:
            yield _Question(modality)
            continue
        for value in identities.values:
            yield _Question(modality, accession_number=value) if identities.orders else _Question(modality, value)


def _answers(
    question: _Question, span: Span | None, catalogue: ArchiveCatalogue, maximum: int, stopping: threading.Event
) -> Iterator[FoundStudies]:
    spans: list[Span | None] = [span]
    while spans and not stopping.is_set():
        part = spans.pop(0)
        found = catalogue.studies(
            part,
            question.modality,
            maximum,
            patient_id=question.patient_id,
            accession_number=question.accession_number,
        )
        # those that were told count, also of an answer that is not whole: one without a time has no minute
        yield found
        if found.error is None:
            continue
        halves: Sequence[Span] = (part or Span(FIRST_DAY, date.today())).halves()  # noqa: DTZ011 - as the archive's
        if not halves:
            raise found.error
        spans[:0] = halves
