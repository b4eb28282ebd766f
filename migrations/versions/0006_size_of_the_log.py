"""the size of the event log in bytes, stored with the head of the log"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("event_head", sa.Column("size", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE event_head SET size ="
        " (SELECT coalesce(sum(length(payload) + coalesce(length(before), 0)), 0) FROM events)"
    )


def downgrade() -> None:
    # Earlier versions expect whole rows in `before`, so the log is emptied and gets a new epoch.
    op.execute("DELETE FROM events")
    op.execute(sa.text("UPDATE event_head SET epoch = :epoch").bindparams(epoch=secrets.token_hex(8)))
    op.drop_column("event_head", "size")
