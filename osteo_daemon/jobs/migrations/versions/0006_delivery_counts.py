"""Counters of deliveries, as there are of jobs, and indexes for lists by destination."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Counting a million deliveries reads a million rows of an index."""
    op.create_table(
        "delivery_counts",
        sa.Column("count_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("count_id", name="pk_delivery_counts"),
    )
    op.execute(
        "INSERT INTO delivery_counts (destination, state, deliveries)"
        " SELECT destination, state, count(*) FROM deliveries GROUP BY destination, state"
    )
    for columns in (["destination", "delivery_id"], ["destination", "state", "delivery_id"]):
        op.create_index(f"ix_deliveries_{'_'.join(columns)}", "deliveries", columns)
