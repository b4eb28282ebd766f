"""the address that an account waits for, which several accounts that await activation may have in common

Previously, `email_key` held the address, as it does for the owner of an address, or `WAITING <address>`. Of several
accounts that waited for one address, only one or two had either.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from core.identity import unique_key

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

KEY = sa.String(320).with_variant(sa.String(320, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("users", sa.Column("waiting_key", KEY, nullable=True))
    op.create_index(
        "ix_users_waiting_key",
        "users",
        ["waiting_key", "id"],
        unique=False,
        sqlite_where=sa.text("waiting_key IS NOT NULL"),
        postgresql_where=sa.text("waiting_key IS NOT NULL"),
    )
    users = sa.table(
        "users",
        *(sa.column(name, sa.String) for name in ("email", "email_key", "waiting_key")),
        sa.column("id", sa.BigInteger),
        sa.column("awaits_activation", sa.Boolean),
    )
    # An admin may have disabled an account before it was activated.
    is_waiting = users.c.awaits_activation | users.c.email_key.like("WAITING %")
    waiting = sa.select(users.c.id, users.c.email).where(is_waiting, users.c.email.is_not(None))
    connection = op.get_bind()
    for user_id, email in connection.execute(waiting).all():
        key = unique_key(email)
        connection.execute(sa.update(users).where(users.c.id == user_id).values(waiting_key=key))
    no_longer = sa.update(users).where(users.c.email_key.like("WAITING %")).values(email_key=None)
    connection.execute(no_longer)


def downgrade() -> None:
    # Accounts that wait for a taken address can sign in only with their user names then.
    op.drop_index("ix_users_waiting_key", table_name="users")
    op.drop_column("users", "waiting_key")
