"""the address that an account waits for, which several accounts that await activation may have in common

Previously, the `email_key` of a waiting account was the address, like that of an owner, or `WAITING <address>`. If
several accounts waited for one address, at most two of them had such a key; the others had none.
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
    # If an admin disabled an account before it was activated, only the key shows that the account was waiting.
    is_waiting = users.c.awaits_activation | users.c.email_key.like("WAITING %")
    waiting = sa.select(users.c.id, users.c.email).where(is_waiting, users.c.email.is_not(None))
    connection = op.get_bind()
    for user_id, email in connection.execute(waiting).all():
        key = unique_key(email)
        connection.execute(sa.update(users).where(users.c.id == user_id).values(waiting_key=key))
    no_longer = sa.update(users).where(users.c.email_key.like("WAITING %")).values(email_key=None)
    connection.execute(no_longer)


def downgrade() -> None:
    # After this, a sign-in by address no longer finds the accounts that wait for a taken address.
    op.drop_index("ix_users_waiting_key", table_name="users")
    op.drop_column("users", "waiting_key")
