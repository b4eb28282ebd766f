"""first tables"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
DATE = sa.String(10).with_variant(sa.Date(), "postgresql")
STRINGS = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def _text(length: int | None = None) -> sa.types.TypeEngine[Any]:
    if length is None:
        return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "event_head",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event_head")),
    )
    op.create_table(
        "events",
        sa.Column("seq", ID, autoincrement=False, nullable=False),
        sa.Column("topic", sa.String(length=32), nullable=False),
        sa.Column("operation", sa.String(length=16), nullable=False),
        sa.Column("entity_id", sa.String(length=36), nullable=True),
        sa.Column("audience", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("before", sa.LargeBinary(), nullable=True),
        sa.Column("changed", sa.Text(), nullable=True),
        sa.Column("actor_id", sa.BigInteger(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=36), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_table(
        "users",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("username", _text(50), nullable=True),
        sa.Column("username_key", _text(200), nullable=True),
        sa.Column("email", _text(320), nullable=True),
        sa.Column("email_key", _text(320), nullable=True),
        sa.Column("name", _text(100), nullable=True),
        sa.Column("first_name", _text(100), nullable=True),
        sa.Column("last_name", _text(100), nullable=True),
        sa.Column("phone_number", _text(16), nullable=True),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("group", _text(20), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email_key", name=op.f("uq_users_email_key")),
        sa.UniqueConstraint("username_key", name=op.f("uq_users_username_key")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("key", _text(255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=True),
        sa.Column("headers", sa.Text(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_idempotency_keys_user_id_users")),
        sa.PrimaryKeyConstraint("user_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"], unique=False)

    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("batch_size", sa.Integer(), nullable=False),
        sa.Column("rate", sa.Float(), nullable=True),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("rows_per_second", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_jobs_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "lease_until"], unique=False)
    op.create_index("ix_jobs_user_id", "jobs", ["user_id"], unique=False)

    op.create_table(
        "movies",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("title", _text(255), nullable=False),
        sa.Column("description", _text(), nullable=True),
        sa.Column("release_date", DATE, nullable=True),
        sa.Column("rating", sa.SmallInteger(), nullable=True),
        sa.Column("duration_minutes", sa.Integer(), nullable=True),
        sa.Column("status", _text(50), nullable=True),
        sa.Column("budget", sa.BigInteger(), nullable=True),
        sa.Column("revenue", sa.BigInteger(), nullable=True),
        sa.Column("country", _text(2), nullable=True),
        sa.Column("languages", STRINGS, nullable=False),
        sa.Column("genres", STRINGS, nullable=False),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("characters_count", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_movies_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_movies")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_movies_user_id", "movies", ["user_id", "id"], unique=False)

    op.create_table(
        "characters",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("name", _text(255), nullable=False),
        sa.Column("description", _text(), nullable=True),
        sa.Column("movie_id", ID, nullable=True),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["movie_id"], ["movies.id"], name=op.f("fk_characters_movie_id_movies")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_characters_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_characters")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_characters_movie_id", "characters", ["movie_id", "id"], unique=False)
    op.create_index("ix_characters_user_id", "characters", ["user_id", "id"], unique=False)

    if op.get_bind().dialect.name == "postgresql":
        # By default, PostgreSQL would compress each payload while the head of the log is locked.
        op.execute("ALTER TABLE events ALTER COLUMN payload SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE events ALTER COLUMN before SET STORAGE EXTERNAL")


def downgrade() -> None:
    for table in ("characters", "movies", "jobs", "idempotency_keys", "users", "leases", "events", "event_head"):
        op.drop_table(table)
