"""sign-in sessions and presence"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JOB_TEXTS = {"id": 36, "kind": 32, "state": 16}
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def _text(length: int) -> sa.types.TypeEngine[Any]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", _text(36), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("user_agent", _text(255), nullable=True),
        sa.Column("address", _text(64), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_sessions_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id", "created_at"], unique=False)
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"], unique=False)

    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "presence",
        sa.Column("worker", sa.String(length=32), nullable=False),
        sa.Column("topic", sa.String(length=32), nullable=False),
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("username", _text(50), nullable=True),
        sa.Column("connections", sa.Integer(), nullable=False),
        sa.Column("lingering", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("worker", "topic", "user_id", name=op.f("pk_presence")),
    )
    # PostgreSQL must compare the columns that clients use in filters by code point, as SQLite always does.
    if op.get_bind().dialect.name == "postgresql":
        for column, length in JOB_TEXTS.items():
            op.alter_column("jobs", column, type_=_text(length))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for column, length in JOB_TEXTS.items():
            op.alter_column("jobs", column, type_=sa.String(length))
    for table in ("presence", "workers", "sessions"):
        op.drop_table(table)
