"""What peers announce, how sources send, and what senders were promised to be kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add tables; nothing that was there changes."""
    op.create_table(
        "announcements",
        sa.Column("announcement_uid", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("source_ae", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("announcement_uid", name="pk_announcements"),
    )
    op.create_index("ix_announcements_changed_at", "announcements", ["changed_at"])
    op.create_table(
        "announced_studies",
        sa.Column("announcement_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["announcement_uid"], ["announcements.announcement_uid"], name="fk_announced_studies_announcement_uid"
        ),
        sa.PrimaryKeyConstraint("announcement_uid", "study_instance_uid", name="pk_announced_studies"),
    )
    op.create_index("ix_announced_studies_study_instance_uid", "announced_studies", ["study_instance_uid"])
    op.create_table(
        "announced_instances",
        sa.Column("announcement_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["announcement_uid"], ["announcements.announcement_uid"], name="fk_announced_instances_announcement_uid"
        ),
        sa.PrimaryKeyConstraint("announcement_uid", "sop_instance_uid", name="pk_announced_instances"),
    )
    op.create_table(
        "source_gaps",
        sa.Column("source_ae", sa.String(length=16), nullable=False),
        sa.Column("gaps_seconds", sa.JSON(), nullable=False),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("source_ae", name="pk_source_gaps"),
    )
    op.create_table(
        "committed_studies",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("requester_ae", sa.String(length=16), nullable=False),
        sa.Column("committed_at", _MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"], ["studies.study_instance_uid"], name="fk_committed_studies_study_instance_uid"
        ),
        sa.PrimaryKeyConstraint("study_instance_uid", name="pk_committed_studies"),
    )
    op.create_table(
        "commitment_requests",
        sa.Column("requester_ae", sa.String(length=16), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("items", sa.JSON(), nullable=False),
        sa.Column("failures", sa.JSON(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", _MOMENT, nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("requested_at", _MOMENT, nullable=False),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("requester_ae", "transaction_uid", name="pk_commitment_requests"),
    )
    op.create_index("ix_commitment_requests_state_not_before", "commitment_requests", ["state", "not_before"])
