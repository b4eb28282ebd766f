"""imports: what to import, and the files and reports in parts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
STRINGS = sa.JSON().with_variant(JSONB(), "postgresql")


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    flags = ("is_safe", "is_dry_run", "stops", "is_in_long_line")
    counters = ("added", "updated", "failed", "problems")
    op.create_table(
        "imports",
        sa.Column("job_id", _text(36)),
        sa.Column("format", _text(8), nullable=False),
        sa.Column("columns", STRINGS, nullable=False),
        *(sa.Column(name, sa.Boolean, nullable=False) for name in flags),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("size", "offset")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in counters),
        sa.PrimaryKeyConstraint("job_id", name="pk_imports"),
    )
    op.create_table(
        "import_parts",
        sa.Column("job_id", _text(36)),
        sa.Column("role", _text(8)),
        sa.Column("number", sa.Integer, autoincrement=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "role", "number", name="pk_import_parts"),
    )


def downgrade() -> None:
    for name in ("import_parts", "imports"):
        op.drop_table(name)
