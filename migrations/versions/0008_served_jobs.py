"""an index of the jobs of a user by lease, which tells when the user was served last"""

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
