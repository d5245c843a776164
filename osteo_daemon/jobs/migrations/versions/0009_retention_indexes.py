"""Indexes of the jobs whose files are still there, in order of time: retention takes the oldest of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """In an index that begins with a column that is NULL, PostgreSQL finds them and sorts them all."""
    for what in ("images", "reports"):
        op.drop_index(f"ix_jobs_{what}_purged_at_state_changed_at", "jobs")
        there = sa.text(f"{what}_purged_at IS NULL")
        columns = ["state", "changed_at"]
        op.create_index(f"ix_jobs_with_{what}", "jobs", columns, sqlite_where=there, postgresql_where=there)
