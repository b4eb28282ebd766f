"""what jobs generate with each movie"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

STRINGS = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parts", STRINGS, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("jobs", "parts")
