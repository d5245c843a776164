"""An index for lists by state and source together."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Without it the few held studies of one source are looked for among all of its studies."""
    columns = ["state", "source_ae", "created_at", "job_id"]
    op.create_index("ix_jobs_state_source_ae_created_at_job_id", "jobs", columns)
