"""The last statements of a writing transaction: number its events and insert them."""

from __future__ import annotations

import orjson

from core.times import utc_now
from repository.engine.events import Event
from repository.engine.statement import statement
from repository.engine.transaction import Transaction

# In the drivers' own form, because every write runs both.
TAKE = statement("UPDATE event_head SET seq = seq + $1 WHERE id = 1 RETURNING epoch, seq")
INSERT = statement(
    "INSERT INTO events (seq, topic, operation, entity_id, audience, payload, before, changed, actor_id, created_at)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::timestamptz)"
)


async def append(tx: Transaction) -> list[Event]:
    """Number and insert the transaction's drafts, and return them as events.

    Nothing may be written in the transaction after this: the lock on the head is held until COMMIT.
    """
    created_at = utc_now()
    driver = await tx.driver()
    count = len(tx.drafts)
    if tx.is_sqlite:
        (row,) = await driver.execute_fetchall(TAKE.sqlite, (count,))
    else:
        with tx.lock_waits.waiting():
            row = await driver.fetchrow(TAKE.postgresql, count)
    epoch, last = row[0], row[1]
    events = [Event(epoch, seq, *draft, created_at) for seq, draft in enumerate(tx.drafts, last - count + 1)]
    rows = [
        (event.seq, *draft[:-2], _encoded(event.changed), event.actor_id, created_at)
        for event, draft in zip(events, tx.drafts, strict=True)
    ]
    await tx.execute_many(INSERT, rows)
    return events


def _encoded(changed: tuple[str, ...]) -> str | None:
    return orjson.dumps(changed).decode() if changed else None
