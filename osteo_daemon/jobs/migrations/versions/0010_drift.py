"""Drift monitoring: what is kept of each finished study, and the alarms that were raised."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables; studies of before are not observed."""
    op.create_table(
        "observations",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("manufacturer", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("kernel", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("observed", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_observations_job_id"),
        sa.PrimaryKeyConstraint("job_id", name="pk_observations"),
    )
    op.create_index("ix_observations_at_job_id", "observations", ["at", "job_id"])
    op.create_table(
        "drift_alarms",
        sa.Column("alarm_id", sa.Integer(), nullable=False),
        sa.Column("chart", sa.String(length=255), nullable=False),
        sa.Column("raised_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cleared_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("alarm_id", name="pk_drift_alarms"),
    )
    op.create_index("ix_drift_alarms_chart", "drift_alarms", ["chart"])
