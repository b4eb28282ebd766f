"""an index of the event log by entity, and the lowest and highest id of each bulk event, for the history of rows"""

from __future__ import annotations

import orjson
import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
EVENTS_PER_READ = 50  # an event may have 768 KiB


def upgrade() -> None:
    spans = op.create_table(
        "event_spans",
        sa.Column("seq", ID, autoincrement=False),
        sa.Column("topic", sa.String(32), nullable=False),
        sa.Column("first_id", sa.BigInteger(), nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_event_spans"),
    )
    op.create_index("ix_event_spans_topic", "event_spans", ["topic", "seq", "first_id", "last_id"])
    op.create_index("ix_events_entity_id", "events", ["topic", "entity_id", "seq"])
    _add_spans(spans)


def _add_spans(spans: sa.Table) -> None:
    bind = op.get_bind()
    bulk = sa.text(
        "SELECT seq, topic, payload FROM events WHERE seq > :last AND entity_id IS NULL AND operation LIKE '%bulk'"
        " ORDER BY seq LIMIT :limit"
    )
    last = -1
    while found := bind.execute(bulk, {"last": last, "limit": EVENTS_PER_READ}).all():
        made = []
        for seq, topic, payload in found:
            data = orjson.loads(payload)
            ids = data["ids"] if "ids" in data else [item["id"] for item in data["items"]]
            made.append({"seq": seq, "topic": topic, "first_id": min(ids), "last_id": max(ids)})
        bind.execute(spans.insert(), made)
        last = found[-1][0]


def downgrade() -> None:
    op.drop_index("ix_events_entity_id", table_name="events")
    op.drop_table("event_spans")
