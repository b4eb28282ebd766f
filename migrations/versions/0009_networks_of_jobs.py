"""the network from which a job was requested, for the limits that all users of a network share"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("network", sa.Text(), nullable=True))
    op.create_index("ix_jobs_network", "jobs", ["network", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_network", table_name="jobs")
    op.drop_column("jobs", "network")
