"""an index of the accounts that await activation, for the clean-up that deletes overdue accounts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_users_awaiting",
        "users",
        ["created_at"],
        unique=False,
        sqlite_where=sa.text("awaits_activation = 1"),
        postgresql_where=sa.text("awaits_activation"),
    )


def downgrade() -> None:
    op.drop_index("ix_users_awaiting", table_name="users")
