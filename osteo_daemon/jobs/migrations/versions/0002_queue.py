"""Fair claims, counters, retention marks, the scheduler's memory, and the indexes that a million studies need."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables; fill them from what is there."""
    _sources()
    _jobs()
    op.add_column("studies", sa.Column("instances", sa.Integer(), nullable=False, server_default="0"))
    for name in ("purging_at", "purged_at"):
        op.add_column("studies", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_studies_purging_at", "studies", ["purging_at"])
    op.execute(
        "UPDATE studies SET instances = (SELECT count(*) FROM instances"
        " WHERE instances.study_instance_uid = studies.study_instance_uid)"
    )
    op.add_column("report_objects", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_deliveries_state_delivery_id", "deliveries", ["state", "delivery_id"])
    op.create_index("ix_events_at", "events", ["at"])
    op.create_index("ix_quarantine_received_at", "quarantine", ["received_at"])
    op.create_table(
        "job_counts",
        sa.Column("count_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("count_id", name="pk_job_counts"),
    )
    op.execute("INSERT INTO job_counts (state, jobs) SELECT state, count(*) FROM jobs GROUP BY state")
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "scheduler_runs",
        sa.Column("step", sa.String(length=64), nullable=False),
        sa.Column("interval_seconds", sa.Float(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.String(length=64), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("step", name="pk_scheduler_runs"),
    )


def _sources() -> None:
    op.create_table(
        "sources",
        sa.Column("source_ae", sa.String(length=16), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("source_ae", name="pk_sources"),
    )
    op.execute("INSERT INTO sources (source_ae, turn) SELECT DISTINCT source_ae, 0 FROM studies")


def _jobs() -> None:
    op.add_column("jobs", sa.Column("source_ae", sa.String(length=16), nullable=False, server_default=""))
    for name in ("claimed_at", "deadline", "images_purged_at", "reports_purged_at"):
        op.add_column("jobs", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    for name in ("localizer_bundle", "network_bundle"):
        op.add_column("jobs", sa.Column(name, sa.String(length=64), nullable=True))
    op.execute(
        "UPDATE jobs SET source_ae = (SELECT source_ae FROM studies"
        " WHERE studies.study_instance_uid = jobs.study_instance_uid)"
    )
    op.drop_index("ix_jobs_state_priority_job_id", "jobs")
    for columns in (
        ["state", "priority", "source_ae", "job_id"],
        ["created_at", "job_id"],
        ["state", "created_at", "job_id"],
        ["source_ae", "created_at", "job_id"],
        ["code", "created_at", "job_id"],
        ["images_purged_at", "state", "changed_at"],
        ["reports_purged_at", "state", "changed_at"],
    ):
        op.create_index(f"ix_jobs_{'_'.join(columns)}", "jobs", columns)
