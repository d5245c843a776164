"""What a pull asks for, as it is kept with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from osteo_daemon.domain.archive import Span, Wanted


@dataclass(frozen=True, slots=True)
class Criteria:
    """What a pull asks for, as it is kept; nothing in it tells of a patient.

    Attributes:
        span: study dates; None for any, with a list only.
        listed: how many patients or orders were listed; 0 without a list.
        limit: fetch at most so many studies of which nothing is here; 0 for all.
        again: fetch studies too whose images were here and are removed.
        name: of the ``[[pulls]]`` entry; empty for a pull that a person started.
    """

    wanted: Wanted = field(default_factory=Wanted)
    span: Span | None = None
    listed: int = 0
    limit: int = 0
    again: bool = False
    name: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        span = self.span
        return {
            "from": None if span is None else span.first.isoformat(),
            "to": None if span is None else span.last.isoformat(),
            "modalities": list(self.wanted.modalities),
            "body_parts": list(self.wanted.body_parts),
            "description": self.wanted.description,
            "whole_study": self.wanted.whole_study,
            "listed": self.listed,
            "limit": self.limit,
            "again": self.again,
            "name": self.name,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Criteria:
        """From JSON."""
        span = None
        if document["from"] is not None:
            span = Span(date.fromisoformat(document["from"]), date.fromisoformat(document["to"]))
        wanted = Wanted(
            tuple(document["modalities"]),
            tuple(document["body_parts"]),
            document["description"],
            document["whole_study"],
        )
        return cls(wanted, span, document["listed"], document["limit"], document["again"], document.get("name", ""))
