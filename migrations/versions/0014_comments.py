"""comments on movies, and their number in each movie

Every movie gets a new member, `comments_count`. An event for each movie would repeat the whole table in the log, so the
log gets a new epoch instead, unless there are no movies: clients then read everything again.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
NO_REPLY = sa.text("parent_id IS NULL")


def upgrade() -> None:
    op.create_table(
        "comments",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("text", TEXT, nullable=True),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("movie_id", ID, nullable=False),
        sa.Column("parent_id", ID, nullable=True),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.Column("edited_at", TIME, nullable=True),
        sa.Column("replies_count", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_comments_user_id_users")),
        sa.ForeignKeyConstraint(["movie_id"], ["movies.id"], name=op.f("fk_comments_movie_id_movies")),
        sa.ForeignKeyConstraint(["parent_id"], ["comments.id"], name=op.f("fk_comments_parent_id_comments")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comments")),
        sqlite_autoincrement=True,
    )
    for column in ("user_id", "movie_id", "parent_id"):
        op.create_index(f"ix_comments_{column}", "comments", [column, "id"])
    op.create_index("ix_comments_top", "comments", ["movie_id", "id"], sqlite_where=NO_REPLY, postgresql_where=NO_REPLY)
    op.add_column("movies", sa.Column("comments_count", sa.Integer(), nullable=False, server_default="0"))
    renew = sa.text("UPDATE event_head SET epoch = :epoch WHERE EXISTS (SELECT 1 FROM movies)")
    op.get_bind().execute(renew, {"epoch": secrets.token_hex(8)})


def downgrade() -> None:
    op.drop_column("movies", "comments_count")
    op.drop_table("comments")
