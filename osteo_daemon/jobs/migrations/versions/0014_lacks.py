"""What a study was known to lack when its arrival ended, for its report."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of studies that were complete before nothing is said."""
    op.add_column("jobs", sa.Column("lacks", sa.String(length=32), nullable=True))
