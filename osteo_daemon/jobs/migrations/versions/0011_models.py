"""The registry of bundles: changes of what is deployed, and what candidates said in the shadow."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables."""
    op.create_table(
        "model_changes",
        sa.Column("change_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("from_version", sa.String(length=100), nullable=True),
        sa.Column("from_sha256", sa.String(length=64), nullable=True),
        sa.Column("to_version", sa.String(length=100), nullable=True),
        sa.Column("to_sha256", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("done", sa.Boolean(), nullable=True),
        sa.PrimaryKeyConstraint("change_id", name="pk_model_changes"),
    )
    op.create_index("ix_model_changes_name_change_id", "model_changes", ["name", "change_id"])
    op.create_table(
        "shadows",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("deployed_sha256", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("levels", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_shadows_job_id"),
        sa.PrimaryKeyConstraint("job_id", "revision", "sha256", name="pk_shadows"),
    )
    op.create_index("ix_shadows_sha256_at", "shadows", ["sha256", "at"])
