"""The archive of VOIs: pseudonyms, sealed links, labels and their imports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables; an archive begins empty."""
    op.create_table(
        "archive_patients",
        sa.Column("patient", sa.String(length=32), nullable=False),
        sa.Column("patient_key", sa.String(length=64), nullable=False),
        sa.Column("link", sa.LargeBinary(), nullable=False),
        sa.Column("objected", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("patient", name="pk_archive_patients"),
        sa.UniqueConstraint("patient_key", name="uq_archive_patients_patient_key"),
    )
    op.create_table(
        "archive_entries",
        sa.Column("entry", sa.String(length=32), nullable=False),
        sa.Column("patient", sa.String(length=32), nullable=False),
        sa.Column("study_key", sa.String(length=64), nullable=False),
        sa.Column("link", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("archived_on", sa.Date(), nullable=False),
        sa.Column("file", sa.String(length=32), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("vertebrae", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["patient"], ["archive_patients.patient"], name="fk_archive_entries_patient"),
        sa.PrimaryKeyConstraint("entry", name="pk_archive_entries"),
        sa.UniqueConstraint("study_key", name="uq_archive_entries_study_key"),
        sa.UniqueConstraint("file", name="uq_archive_entries_file"),
    )
    op.create_index("ix_archive_entries_patient", "archive_entries", ["patient"])
    op.create_index("ix_archive_entries_archived_on_entry", "archive_entries", ["archived_on", "entry"])
    op.create_table(
        "archive_imports",
        sa.Column("import_id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("imported_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.String(length=64), nullable=False),
        sa.Column("matched", sa.Integer(), nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("ambiguous", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("import_id", name="pk_archive_imports"),
        sa.UniqueConstraint("sha256", name="uq_archive_imports_sha256"),
    )
    op.create_table(
        "archive_labels",
        sa.Column("entry", sa.String(length=32), nullable=False),
        sa.Column("level", sa.String(length=3), nullable=False),
        sa.Column("bmd_g_cm2", sa.Float(), nullable=False),
        sa.Column("t_score", sa.Float(), nullable=True),
        sa.Column("maker", sa.String(length=16), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("days_apart", sa.Integer(), nullable=False),
        sa.Column("import_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["entry"], ["archive_entries.entry"], name="fk_archive_labels_entry"),
        sa.ForeignKeyConstraint(["import_id"], ["archive_imports.import_id"], name="fk_archive_labels_import_id"),
        sa.PrimaryKeyConstraint("entry", "level", name="pk_archive_labels"),
    )
    op.create_index("ix_archive_labels_import_id", "archive_labels", ["import_id"])
    op.create_table(
        "archive_state",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("text", sa.String(length=255), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_archive_state"),
    )
