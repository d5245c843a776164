"""Values that go into and come out of the job store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from osteo_daemon.domain.job import JobState, Priority


class RecordOutcome(StrEnum):
    """What became of an instance that the receiver recorded."""

    STORED = "stored"  # new
    DUPLICATE = "duplicate"  # same UID, same bytes: nothing changed
    REPLACED = "replaced"  # same pixels and geometry, other header or transfer syntax: a new revision
    CONFLICT = "conflict"  # other bytes under a known UID: nothing changed; the caller decides what they are
    OWN_RESULT = "own_result"  # one of our own report objects came back: nothing changed
    DISCARDED = "discarded"  # it only travels with a CT and isn't wanted: acknowledged, not written


class ReportKind(StrEnum):
    """Kinds of report objects, in the order in which a destination gets them."""

    SEG = "seg"  # first: the SR refers to it
    SR = "sr"
    KOS = "kos"
    SC = "sc"
    PDF = "pdf"
    HL7 = "hl7"  # a message, for one destination alone
    FHIR = "fhir"


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    PENDING = "PENDING"  # waits for a deliverer, perhaps with not_before
    SENDING = "SENDING"  # claimed under a lease
    AWAITING = "AWAITING"  # accepted; waits until not_before for the proof that it is kept
    DELIVERED = "DELIVERED"  # the destination has every object, proven as its settings ask
    UNPROVEN = "UNPROVEN"  # accepted, and no proof to be had; a late event report still makes it DELIVERED
    REFUSED = "REFUSED"  # dead letter: the destination refused for good, or patience ended


DELIVERY_TRANSITIONS: Mapping[DeliveryState, frozenset[DeliveryState]] = MappingProxyType(
    {
        # proven, given up or abandoned without being claimed: by a late event report, by patience, by a purge
        DeliveryState.PENDING: frozenset(set(DeliveryState) - {DeliveryState.PENDING, DeliveryState.AWAITING}),
        DeliveryState.SENDING: frozenset(set(DeliveryState) - {DeliveryState.SENDING}),
        DeliveryState.AWAITING: frozenset(set(DeliveryState) - {DeliveryState.AWAITING}),
        DeliveryState.DELIVERED: frozenset(),
        # sent again by a person or because it is not kept, settled by a person or a late report
        DeliveryState.UNPROVEN: frozenset({DeliveryState.PENDING, DeliveryState.DELIVERED, DeliveryState.REFUSED}),
        DeliveryState.REFUSED: frozenset({DeliveryState.PENDING, DeliveryState.DELIVERED}),
    }
)
"""Every legal transition of a delivery; the store refuses all others."""


class CommitmentState(StrEnum):
    """Where a storage commitment transaction stands."""

    ASKED = "ASKED"  # the request may have left
    ACCEPTED = "ACCEPTED"  # the destination will report
    REFUSED = "REFUSED"  # it does not do storage commitment for us
    COMMITTED = "COMMITTED"  # it keeps every object
    PARTIAL = "PARTIAL"  # it keeps some


def is_stored(status: str | None) -> bool:
    """True for a status that means stored: of C-STORE success and the warnings, of messages their acknowledgement."""
    return status is not None and status.startswith(("0x", "ack-", "http-"))


@dataclass(frozen=True, slots=True)
class ReportObject:
    """A report object in the spool. ``variant`` names the form it has for some destinations ("" when there's one)."""

    kind: ReportKind
    sop_class_uid: str
    sop_instance_uid: str
    path: Path
    size_bytes: int
    sha256: str
    variant: str = ""


@dataclass(frozen=True, slots=True)
class NewDelivery:
    """What a destination shall get: SOP Instance UIDs among the report objects committed with it."""

    destination: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeliveryObject:
    """An object of a claimed delivery.

    Attributes:
        status: what the destination answered (``0x....`` is stored), None when not yet sent.
        proof: how it is known that the destination keeps it, None when it is not.
    """

    report: ReportObject
    status: str | None
    proof: str | None = None

    @property
    def stored(self) -> bool:
        """True when the destination accepted it."""
        return is_stored(self.status)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One destination's objects of one job revision, in the order of sending.

    ``fencing_token`` grows with every claim and is checked at every write; ``created_at`` tells how long it waits.
    """

    delivery_id: int
    job_id: int
    study_instance_uid: str
    revision: int
    destination: str
    state: DeliveryState
    attempts: int
    fencing_token: int
    created_at: datetime
    not_before: datetime | None
    objects: tuple[DeliveryObject, ...]
    outcome: str | None = None
    detail: str | None = None
    proof_rounds: int = 0
    proof_questions: int = 0

    @property
    def unproven(self) -> tuple[ReportObject, ...]:
        """Objects that the destination accepted and has not proven to keep."""
        return tuple(entry.report for entry in self.objects if entry.stored and entry.proof is None)

    @property
    def unsent(self) -> tuple[ReportObject, ...]:
        """Objects that the destination has not yet accepted."""
        return tuple(entry.report for entry in self.objects if entry.status is None)


@dataclass(frozen=True, slots=True)
class Commitment:
    """A storage commitment transaction of a delivery."""

    transaction_uid: str
    delivery_id: int
    round: int
    state: CommitmentState
    detail: str | None
    requested_at: datetime
    answered_at: datetime | None


@dataclass(frozen=True, slots=True)
class HeldReport:
    """The structured report that a destination accepted last."""

    sop_instance_uid: str
    path: Path


@dataclass(frozen=True, slots=True)
class Event:
    """One row of a study's history."""

    at: datetime
    who: str
    event: str
    from_state: JobState | None
    to_state: JobState | None
    revision: int
    reason: str


@dataclass(frozen=True, slots=True)
class StudyEvent:
    """An event with its study, as logs of the whole node show it."""

    event_id: int
    study_instance_uid: str
    event: Event


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job as lists show it."""

    job_id: int
    study_instance_uid: str
    state: JobState
    revision: int
    attempts: int
    priority: Priority
    source_ae: str
    instances: int
    code: str | None
    detail: str | None
    not_before: datetime | None
    first_received_at: datetime
    last_received_at: datetime
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class SchedulerRun:
    """A timed step: when it ran last, with what outcome, and when it will again."""

    step: str
    interval_seconds: float
    next_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    detail: str | None
    runs: int
    failures: int
    missed: int

    def to_json(self) -> dict[str, Any]:
        """For programs; times in ISO 8601."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


class ModelChangeKind(StrEnum):
    """What a person did to the versions of a bundle."""

    REGISTERED = "registered"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    SHADOWED = "shadowed"  # or, without a version, no longer


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A change of what is deployed; ``done`` is None while it is not known whether it was made."""

    change_id: int
    at: datetime
    who: str
    kind: ModelChangeKind
    name: str
    from_version: str | None
    from_sha256: str | None
    to_version: str | None
    to_sha256: str | None
    reason: str
    done: bool | None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "at": self.at.isoformat()}


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a candidate said of one revision of a study beside the deployed bundle.

    Attributes:
        sha256, deployed_sha256: digests of both bundles.
        seconds: that it took.
        error: why it is incomplete; None when it is not.
        levels: level to ``bmd_g_cm2``, ``deployed_bmd_g_cm2``, ``class``, ``deployed_class``; None what was withheld.
    """

    job_id: int
    revision: int
    sha256: str
    deployed_sha256: str
    at: datetime
    seconds: float
    error: str | None
    levels: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """A drift chart that left its limits; ``cleared_at`` is None while it stands."""

    chart: str
    raised_at: datetime
    cleared_at: datetime | None
    detail: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Bytes kept apart because another content is stored under their UID."""

    sop_instance_uid: str
    study_instance_uid: str
    path: Path
    size_bytes: int
    sha256: str
    reason: str
    source_ae: str
    received_at: datetime
