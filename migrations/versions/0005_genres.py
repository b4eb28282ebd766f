"""genres"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def _text(length: int | None = None) -> sa.types.TypeEngine[Any]:
    if length is None:
        return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "genres",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("name", _text(100), nullable=False),
        sa.Column("name_key", _text(200), nullable=False),
        sa.Column("description", _text(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_genres")),
        sa.UniqueConstraint("name_key", name=op.f("uq_genres_name_key")),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    op.drop_table("genres")
