"""Tables of the job store, typed; the migrations under ``migrations/`` create the same (a test compares both).

Times are UTC. Strings that come from a peer (AE titles, UIDs) are stored as received, paths relative to nothing:
absolute paths inside the spool. No table holds patient identity; `TrendRow` holds a digest of it that means
nothing without the node's secret.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    Float,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from osteo_daemon.domain.breaker import BreakerState
from osteo_daemon.domain.job import JobKind, JobState
from osteo_daemon.jobs.records import CommitmentState, DeliveryState, ReportKind

_UID = String(64)  # PS3.5 9.1: at most 64 characters
_AE = String(16)  # PS3.5 6.2, VR AE
_DIGEST = String(64)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept as UTC: SQLite has no time zones, and text of one zone sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a naive value is a bug of the caller."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Back to an aware datetime."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _names(kind: type[StrEnum]) -> Enum:
    # plain text without a CHECK: a new state must not need a table rebuild on SQLite
    return Enum(kind, native_enum=False, create_constraint=False, length=16, values_callable=_values)


def _values(kind: type[StrEnum]) -> list[str]:
    return [member.value for member in kind]


def _index_where(name: str, condition: str, *columns: str) -> Index:
    """An index of some rows; in an index of all, PostgreSQL would sort what is NULL in its first column."""
    return Index(name, *columns, sqlite_where=text(condition), postgresql_where=text(condition))


class Base(DeclarativeBase):
    """Every table of the store."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class StudyRow(Base):
    """A study of which at least one object was acknowledged."""

    __tablename__ = "studies"

    study_instance_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    source_ae: Mapped[str] = mapped_column(_AE)
    first_received_at: Mapped[datetime] = mapped_column(UtcDateTime)
    last_received_at: Mapped[datetime] = mapped_column(UtcDateTime)
    instances: Mapped[int] = mapped_column(server_default="0")  # how many rows of `InstanceRow` are the study's
    purging_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)  # files go now: nothing is stored
    purged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when files went last


class SourceRow(Base):
    """A sender, and when its work was last taken up: ``turn`` grows with every claim."""

    __tablename__ = "sources"

    source_ae: Mapped[str] = mapped_column(_AE, primary_key=True)
    turn: Mapped[int] = mapped_column(BigInteger)


class InstanceRow(Base):
    """One acknowledged SOP instance and where its bytes lie."""

    __tablename__ = "instances"
    __table_args__ = (Index(None, "study_instance_uid", "series_instance_uid"),)

    sop_instance_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"))
    series_instance_uid: Mapped[str] = mapped_column(_UID)
    sop_class_uid: Mapped[str] = mapped_column(_UID)
    transfer_syntax_uid: Mapped[str] = mapped_column(_UID)
    path: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(_DIGEST)
    source_ae: Mapped[str] = mapped_column(_AE)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime)


class QuarantineRow(Base):
    """Bytes that arrived under a SOP Instance UID already stored with other pixels; kept, never used."""

    __tablename__ = "quarantine"
    __table_args__ = (UniqueConstraint("sop_instance_uid", "sha256"),)

    quarantine_id: Mapped[int] = mapped_column(primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(_UID)
    study_instance_uid: Mapped[str] = mapped_column(_UID, index=True)
    path: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(_DIGEST)
    reason: Mapped[str] = mapped_column(Text)
    source_ae: Mapped[str] = mapped_column(_AE)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class AssociationRow(Base):
    """An open association that last stored into a study: evidence that the study is not complete."""

    __tablename__ = "associations"

    association_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(_UID, index=True)
    source_ae: Mapped[str] = mapped_column(_AE)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class JobRow(Base):
    """One job; a study has one screening job that lives through its revisions."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("study_instance_uid", "kind"),
        Index(None, "state", "priority", "source_ae", "job_id"),  # claims
        # lists, newest first, by one filter each
        Index(None, "created_at", "job_id"),
        Index(None, "state", "created_at", "job_id"),
        Index(None, "source_ae", "created_at", "job_id"),
        Index(None, "state", "source_ae", "created_at", "job_id"),
        Index(None, "code", "created_at", "job_id"),
        # retention
        _index_where("ix_jobs_with_images", "images_purged_at IS NULL", "state", "changed_at"),
        _index_where("ix_jobs_with_reports", "reports_purged_at IS NULL", "state", "changed_at"),
    )

    job_id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[JobKind] = mapped_column(_names(JobKind))
    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"))
    source_ae: Mapped[str] = mapped_column(_AE, server_default="")  # that of its study, for claims in turn and lists
    state: Mapped[JobState] = mapped_column(_names(JobState))
    priority: Mapped[int]  # of `domain.job.Priority`; smaller is earlier
    revision: Mapped[int]
    attempts: Mapped[int]
    fencing_token: Mapped[int]
    worker: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deadline: Mapped[datetime | None] = mapped_column(UtcDateTime)  # no heartbeat extends the lease beyond it
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    localizer_bundle: Mapped[str | None] = mapped_column(String(64))  # of this revision, instead of the settings'
    network_bundle: Mapped[str | None] = mapped_column(String(64))
    lacks: Mapped[str | None] = mapped_column(String(32))  # of `domain.completeness.Lacks`, when it was complete last
    images_purged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    reports_purged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    code: Mapped[str | None] = mapped_column(String(64))  # of the last exclusion, hold, error or failure
    detail: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class JobCountRow(Base):
    """So many jobs more (or fewer) in a state; the sum of all rows is what stands in it.

    Appended by every transition and folded by the scheduler, see `osteo_daemon.jobs.counts`.
    """

    __tablename__ = "job_counts"

    count_id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[JobState] = mapped_column(_names(JobState))
    jobs: Mapped[int]


class DeliveryCountRow(Base):
    """So many deliveries more (or fewer) to a destination in a state; summed and folded like `JobCountRow`."""

    __tablename__ = "delivery_counts"

    count_id: Mapped[int] = mapped_column(primary_key=True)
    destination: Mapped[str] = mapped_column(String(32))
    state: Mapped[DeliveryState] = mapped_column(_names(DeliveryState))
    deliveries: Mapped[int]


class EventRow(Base):
    """What happened to a study: when, who, why. Written in the transaction of the change itself."""

    __tablename__ = "events"

    event_id: Mapped[int] = mapped_column(primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(_UID, index=True)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.job_id"))
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    who: Mapped[str] = mapped_column(Text)
    event: Mapped[str] = mapped_column(String(64))
    from_state: Mapped[str | None] = mapped_column(String(16))
    to_state: Mapped[str | None] = mapped_column(String(16))
    revision: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)


class ResultRow(Base):
    """The result of one revision of a job, as ``osteo-result/1``."""

    __tablename__ = "results"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ReportObjectRow(Base):
    """A DICOM object built for one revision; what is sent under its UID is always this file."""

    __tablename__ = "report_objects"
    __table_args__ = (Index(None, "job_id", "revision"),)

    sop_instance_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.job_id"))
    revision: Mapped[int]
    kind: Mapped[ReportKind] = mapped_column(_names(ReportKind))
    variant: Mapped[str] = mapped_column(String(64))
    sop_class_uid: Mapped[str] = mapped_column(_UID)
    path: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(_DIGEST)
    removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the file is gone, by retention or by hand


class DeliveryRow(Base):
    """The objects of one job revision on their way to one destination."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("job_id", "revision", "destination"),
        Index(None, "state", "not_before"),
        Index(None, "state", "delivery_id"),
        Index(None, "destination", "state", "priority", "delivery_id"),  # claims
        # lists, newest first
        Index(None, "destination", "delivery_id"),
        Index(None, "destination", "state", "delivery_id"),
    )

    delivery_id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.job_id"))
    revision: Mapped[int]
    destination: Mapped[str] = mapped_column(String(32))
    state: Mapped[DeliveryState] = mapped_column(_names(DeliveryState))
    attempts: Mapped[int]
    fencing_token: Mapped[int]
    worker: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(String(64))
    detail: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)
    priority: Mapped[int] = mapped_column(server_default="100")  # its job's, as it was screened
    proof_rounds: Mapped[int] = mapped_column(server_default="0")  # how often objects went again for want of proof
    proof_questions: Mapped[int] = mapped_column(server_default="0")  # C-FIND questions since they last went


class DeliveryObjectRow(Base):
    """One object of a delivery, in the order of sending."""

    __tablename__ = "delivery_objects"

    delivery_id: Mapped[int] = mapped_column(ForeignKey("deliveries.delivery_id"), primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(ForeignKey("report_objects.sop_instance_uid"), primary_key=True)
    position: Mapped[int]
    status: Mapped[str | None] = mapped_column(String(64))
    sent_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    proof: Mapped[str | None] = mapped_column(String(64))  # how it is known that the destination keeps it
    proved_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class CommitmentRow(Base):
    """A storage commitment transaction (PS3.4 annex J): asked of a destination, answered by an event report."""

    __tablename__ = "commitments"

    transaction_uid: Mapped[str] = mapped_column(_UID, primary_key=True)
    delivery_id: Mapped[int] = mapped_column(ForeignKey("deliveries.delivery_id"), index=True)
    round: Mapped[int]  # the delivery's ``proof_rounds`` when it was asked
    state: Mapped[CommitmentState] = mapped_column(_names(CommitmentState))
    detail: Mapped[str | None] = mapped_column(Text)
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime)
    answered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class BreakerRow(Base):
    """The circuit breaker of one destination."""

    __tablename__ = "breakers"

    destination: Mapped[str] = mapped_column(String(32), primary_key=True)
    state: Mapped[BreakerState] = mapped_column(_names(BreakerState))
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    failures: Mapped[int]
    next_probe_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(Text)


class LeaseRow(Base):
    """A role that only one process may have at a time."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(Text)
    fencing_token: Mapped[int]
    lease_until: Mapped[datetime] = mapped_column(UtcDateTime)


class SchedulerRunRow(Base):
    """What the scheduler does, when it did it last and when it will again."""

    __tablename__ = "scheduler_runs"

    step: Mapped[str] = mapped_column(String(64), primary_key=True)
    interval_seconds: Mapped[float] = mapped_column(Float)
    next_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(String(64))
    detail: Mapped[str | None] = mapped_column(Text)
    runs: Mapped[int]
    failures: Mapped[int]
    missed: Mapped[int]


class TrendRow(Base):
    """The value that decided a study's category, under a keyed digest of its patient."""

    __tablename__ = "trend"
    __table_args__ = (Index(None, "patient_key", "study_date"),)

    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"), primary_key=True)
    patient_key: Mapped[str] = mapped_column(_DIGEST)
    study_date: Mapped[str] = mapped_column(String(10))
    index_hu: Mapped[float] = mapped_column(Float)
