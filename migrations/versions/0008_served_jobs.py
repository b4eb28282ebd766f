"""an index of each user's jobs by lease, which shows when the user was last served"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_jobs_user_id", table_name="jobs")
    op.create_index("ix_jobs_user_id", "jobs", ["user_id", "lease_until"])


def downgrade() -> None:
    op.drop_index("ix_jobs_user_id", table_name="jobs")
    op.create_index("ix_jobs_user_id", "jobs", ["user_id"])
