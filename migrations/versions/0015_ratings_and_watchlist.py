"""ratings, watchlists, and the average rating of movies

Movies get members that earlier events lack, so the log gets a new epoch: clients read everything anew.
"""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def _text(length: int | None = None) -> sa.types.TypeEngine[Any]:
    if length is None:
        return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("movies", sa.Column("average_rating", sa.Float(), nullable=True))
    op.add_column("movies", sa.Column("ratings_count", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("movies", sa.Column("ratings_sum", sa.BigInteger(), nullable=False, server_default="0"))
    _create(
        "ratings",
        sa.Column("score", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("movie_id", ID, nullable=False),
        sa.UniqueConstraint("movie_id", "user_id", name=op.f("uq_ratings_movie_id")),
    )
    op.create_index(op.f("ix_ratings_movie_id"), "ratings", ["movie_id", "id", "score"])
    op.create_index(op.f("ix_ratings_user_id"), "ratings", ["user_id", "id"])
    _create(
        "watchlist",
        sa.Column("movie_id", ID, nullable=False),
        sa.Column("status", _text(20), nullable=False),
        sa.Column("notes", _text(), nullable=True),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("watched_at", TIME, nullable=True),
        sa.UniqueConstraint("user_id", "movie_id", name=op.f("uq_watchlist_user_id")),
    )
    op.create_index(op.f("ix_watchlist_movie_id"), "watchlist", ["movie_id", "id"])
    op.create_index(op.f("ix_watchlist_user_id"), "watchlist", ["user_id", "id"])
    _renew_epoch()


def _create(name: str, *columns: sa.schema.SchemaItem) -> None:
    op.create_table(
        name,
        sa.Column("id", ID, autoincrement=True, nullable=False),
        *columns,
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f(f"fk_{name}_user_id_users")),
        sa.ForeignKeyConstraint(["movie_id"], ["movies.id"], name=op.f(f"fk_{name}_movie_id_movies")),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
        sqlite_autoincrement=True,
    )


def _renew_epoch() -> None:
    op.execute(sa.text("UPDATE event_head SET epoch = :epoch").bindparams(epoch=secrets.token_hex(8)))


def downgrade() -> None:
    op.drop_table("watchlist")
    op.drop_table("ratings")
    for name in ("ratings_sum", "ratings_count", "average_rating"):
        op.drop_column("movies", name)
    _renew_epoch()
