"""indexes for the lists of popular and of recent movies"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The order of each list, with nulls last: SQLite sorts nulls so by default, and has no words for it in an index.
    last = "" if op.get_bind().dialect.name == "sqlite" else " NULLS LAST"
    # New movies have no ratings, so they cost nothing in this index.
    op.execute(
        f"CREATE INDEX ix_movies_popular ON movies (ratings_count DESC{last}, average_rating DESC{last}, id)"
        " WHERE ratings_count > 0"
    )
    op.execute(f"CREATE INDEX ix_movies_release_date ON movies (release_date DESC{last}, id)")


def downgrade() -> None:
    op.drop_index("ix_movies_release_date", table_name="movies")
    op.drop_index("ix_movies_popular", table_name="movies")
