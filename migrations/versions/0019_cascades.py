"""cascades: the rows that jobs rename or delete, and how far the jobs have come"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JOB_ID = sa.String(36).with_variant(sa.String(36, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "cascades",
        sa.Column("job_id", JOB_ID),
        sa.Column("row_id", ID, nullable=False),
        sa.Column("last_id", ID, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_cascades"),
    )


def downgrade() -> None:
    op.drop_table("cascades")
