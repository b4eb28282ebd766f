"""audit entries about rows of other users, beside those about accounts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")
NAME = sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("audit", sa.Column("resource", NAME, nullable=True))
    op.add_column("audit", sa.Column("entity_ids", JSON, nullable=True))
    op.add_column("audit", sa.Column("count", sa.Integer(), nullable=True))
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    ids = "json_array(user_id)" if is_sqlite else "jsonb_build_array(user_id)"
    op.execute(f"UPDATE audit SET resource = 'users', count = 1, entity_ids = {ids}")  # noqa: S608 (our own function)
    with op.batch_alter_table("audit", table_kwargs={"sqlite_autoincrement": True}) as audit:
        audit.alter_column("resource", existing_type=NAME, nullable=False)
        audit.alter_column("entity_ids", existing_type=JSON, nullable=False)
        audit.alter_column("count", existing_type=sa.Integer(), nullable=False)
        audit.alter_column("user_id", existing_type=ID, nullable=True)


def downgrade() -> None:
    # The previous version would treat every entry as one about an account.
    op.execute("DELETE FROM audit WHERE resource <> 'users'")
    with op.batch_alter_table("audit", table_kwargs={"sqlite_autoincrement": True}) as audit:
        audit.alter_column("user_id", existing_type=ID, nullable=False)
        audit.drop_column("count")
        audit.drop_column("entity_ids")
        audit.drop_column("resource")
