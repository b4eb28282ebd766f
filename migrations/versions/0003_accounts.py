"""profiles, refresh tokens, the outbox, one-time tokens and the audit trail"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
DATE = sa.String(10).with_variant(sa.Date(), "postgresql")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
BEGINNING = "1970-01-01T00:00:00.000000Z"


def _text(length: int | None = None) -> sa.types.TypeEngine[Any]:
    plain: sa.types.TypeEngine[Any] = sa.String(length) if length else sa.Text()
    by_code_point: sa.types.TypeEngine[Any] = sa.String(length, collation="C") if length else sa.Text(collation="C")
    return plain.with_variant(by_code_point, "postgresql")


USER_COLUMNS = ("gender", "date_of_birth", "info", "avatar", "profile_created_at", "awaits_activation", "deleted_at")


def upgrade() -> None:
    op.add_column("users", sa.Column("gender", _text(20), nullable=True))
    op.add_column("users", sa.Column("date_of_birth", DATE, nullable=True))
    op.add_column("users", sa.Column("info", _text(), nullable=True))
    op.add_column("users", sa.Column("avatar", _text(64), nullable=True))
    op.create_index("ix_users_avatar", "users", ["avatar"], unique=False)
    op.add_column("users", sa.Column("profile_created_at", TIME, nullable=True))
    op.add_column("users", sa.Column("awaits_activation", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("users", sa.Column("deleted_at", TIME, nullable=True))

    op.add_column("sessions", sa.Column("last_used_at", TIME, nullable=False, server_default=BEGINNING))
    op.add_column("sessions", sa.Column("refresh_id", _text(32), nullable=True))
    op.execute("UPDATE sessions SET last_used_at = created_at")

    op.create_table(
        "one_time_tokens",
        sa.Column("digest", _text(64), nullable=False),
        sa.Column("purpose", _text(16), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("email", _text(320), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_one_time_tokens_user_id_users")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_one_time_tokens")),
    )
    op.create_index("ix_one_time_tokens_user_id", "one_time_tokens", ["user_id", "purpose"], unique=False)
    op.create_index("ix_one_time_tokens_expires_at", "one_time_tokens", ["expires_at"], unique=False)

    op.create_table(
        "mails",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("kind", _text(32), nullable=False),
        sa.Column("recipient", _text(320), nullable=False),
        sa.Column("details", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("due_at", sa.Float(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(64), nullable=True),
        sa.Column("sent_at", TIME, nullable=True),
        sa.Column("failed_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_mails_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mails")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mails_due_at", "mails", ["due_at"], unique=False)
    op.create_index("ix_mails_user_id", "mails", ["user_id", "kind"], unique=False)

    op.create_table(
        "audit",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("actor_id", ID, nullable=True),
        sa.Column("action", _text(32), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("changes", JSON, nullable=False),
        sa.Column("address", _text(64), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_user_id", "audit", ["user_id", "id"], unique=False)
    op.create_index("ix_audit_actor_id", "audit", ["actor_id", "id"], unique=False)


def downgrade() -> None:
    for table in ("audit", "mails", "one_time_tokens"):
        op.drop_table(table)
    for column in ("refresh_id", "last_used_at"):
        op.drop_column("sessions", column)
    op.drop_index("ix_users_avatar", "users")
    for column in reversed(USER_COLUMNS):
        op.drop_column("users", column)
