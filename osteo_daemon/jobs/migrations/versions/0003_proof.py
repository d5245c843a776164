"""Proof of storage: commitment transactions, what proves each object, and the breaker of each destination."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables; what was delivered before stays delivered without a proof."""
    op.add_column("deliveries", sa.Column("proof_rounds", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("deliveries", sa.Column("proof_questions", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("delivery_objects", sa.Column("proof", sa.String(length=64), nullable=True))
    op.add_column("delivery_objects", sa.Column("proved_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("deliveries", sa.Column("priority", sa.Integer(), nullable=False, server_default="100"))
    op.execute("UPDATE deliveries SET priority = (SELECT priority FROM jobs WHERE jobs.job_id = deliveries.job_id)")
    op.create_index(
        "ix_deliveries_destination_state_priority_delivery_id",
        "deliveries",
        ["destination", "state", "priority", "delivery_id"],
    )
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("delivery_id", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answered_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["delivery_id"], ["deliveries.delivery_id"], name="fk_commitments_delivery_id"),
        sa.PrimaryKeyConstraint("transaction_uid", name="pk_commitments"),
    )
    op.create_index("ix_commitments_delivery_id", "commitments", ["delivery_id"])
    op.create_table(
        "breakers",
        sa.Column("destination", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("next_probe_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("destination", name="pk_breakers"),
    )
