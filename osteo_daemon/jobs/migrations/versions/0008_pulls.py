"""Pulls: what is to be fetched from archives, and what became of each study."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add tables; nothing that was there changes."""
    op.create_table(
        "pulls",
        sa.Column("pull_id", sa.Integer(), nullable=False),
        sa.Column("archive", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("criteria", sa.JSON(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("pull_id", name="pk_pulls"),
    )
    op.create_table(
        "pulled_studies",
        sa.Column("pull_id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", _MOMENT, nullable=True),
        sa.Column("instances", sa.Integer(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.ForeignKeyConstraint(["pull_id"], ["pulls.pull_id"], name="fk_pulled_studies_pull_id"),
        sa.PrimaryKeyConstraint("pull_id", "study_instance_uid", name="pk_pulled_studies"),
    )
    op.create_index("ix_pulled_studies_pull_id_state_position", "pulled_studies", ["pull_id", "state", "position"])
