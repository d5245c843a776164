"""Trend: each study's deciding value under a keyed digest of its patient."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; studies of before have no row in it."""
    op.create_table(
        "trend",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("patient_key", sa.String(length=64), nullable=False),
        sa.Column("study_date", sa.String(length=10), nullable=False),
        sa.Column("index_hu", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"], ["studies.study_instance_uid"], name="fk_trend_study_instance_uid"
        ),
        sa.PrimaryKeyConstraint("study_instance_uid", name="pk_trend"),
    )
    op.create_index("ix_trend_patient_key_study_date", "trend", ["patient_key", "study_date"])
