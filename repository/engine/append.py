"""The last statements of a transaction: they number its events, check the writer's rights and insert the events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import structlog

from core.identity import Identity
from core.times import utc_now
from repository.engine import rights
from repository.engine.events import Event, Head, head_of, new_epoch
from repository.engine.statement import statement
from repository.engine.transaction import Draft, Transaction

# These statements bypass SQLAlchemy to save time, because every write with events runs two of them.
TAKE = statement("UPDATE event_head SET seq = seq + $1, size = size + $2 WHERE id = 1 RETURNING epoch, seq")
_HEAD = statement("SELECT epoch, seq FROM event_head WHERE id = 1")
_RENEW = statement("UPDATE event_head SET epoch = $1 WHERE id = 1")
_INTO = (
    "INSERT INTO events (seq, topic, operation, entity_id, audience, payload, before, changed, actor_id, created_at)"
)
_VALUES = "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::timestamptz"
INSERT = statement(f"{_INTO} VALUES ({_VALUES})")
INSERT_SPANS = statement("INSERT INTO event_spans (seq, topic, first_id, last_id) VALUES ($1, $2, $3, $4)")
# To save a statement, the INSERT includes the check of rights. The check cannot be part of TAKE: after a statement has
# waited for a lock, PostgreSQL still evaluates the statement's other tables as they were before the wait.
INSERT_WHILE_RIGHTS_HOLD = statement(f"{_INTO} SELECT {_VALUES}{rights.WHILE_RIGHTS_HOLD} RETURNING seq")

log = structlog.get_logger("database")


async def append(tx: Transaction) -> list[Event]:
    """Number and insert the transaction's drafts, and return them as events.

    If the head is behind a number that is known to be committed, the database has lost the log's newest events, and
    these events take the same numbers. So the log gets a new epoch in the same transaction.

    Only `tell_position` may follow in the transaction, because the lock on the head is held until COMMIT. Raises
    Unauthenticated or Forbidden when the writer no longer has its rights, or Unavailable when the log has no head.
    """
    created_at = utc_now()
    driver = await tx.driver()
    count = len(tx.drafts)
    if tx.is_sqlite:
        found = await driver.execute_fetchall(TAKE.sqlite, (count, tx.size))
    else:
        with tx.lock_waits.waiting():
            found = await driver.fetch(TAKE.postgresql, count, tx.size)
    head = head_of(found)
    if tx.newest.is_beyond(head.epoch, head.seq - count):
        head = await _renew_epoch(tx, head, count)
    first = head.seq - count + 1
    events = [Event(head.epoch, seq, *draft[:-1], created_at) for seq, draft in enumerate(tx.drafts, first)]
    rows = [
        (event.seq, *draft[:-3], _encoded(event.changed), event.actor_id, created_at)
        for event, draft in zip(events, tx.drafts, strict=True)
    ]
    if tx.writer is not None and await _inserted_with_rights(tx, tx.writer, rows[0]):
        del rows[0]
    if rows:
        await tx.execute_many(INSERT, rows)
    if spans := spans_of(tx.drafts, first):
        await tx.execute_many(INSERT_SPANS, spans)
    return events


def spans_of(drafts: Sequence[Draft], first: int) -> list[tuple[Any, ...]]:
    """Return the rows of `event_spans` for drafts whose numbers begin with `first`."""
    return [(seq, draft.topic, *draft.span) for seq, draft in enumerate(drafts, first) if draft.span is not None]


async def _renew_epoch(tx: Transaction, head: Head, count: int) -> Head:
    log.warning("event log lost its newest events", epoch=head.epoch, known_seq=tx.newest.seq, seq=head.seq - count)
    renewed = Head(new_epoch(), head.seq)
    await tx.execute_many(_RENEW, [(renewed.epoch,)])
    return renewed


async def tell_position(tx: Transaction, events: Sequence[Event]) -> None:
    """Call the functions in `on_position`. `events` is the result of `append`, or empty if there are no events."""
    if not tx.on_position:
        return
    if events:
        position = Head(events[-1].epoch, events[-1].seq)
    else:
        driver = await tx.driver()
        found = await (driver.execute_fetchall(_HEAD.sqlite) if tx.is_sqlite else driver.fetch(_HEAD.postgresql))
        position = head_of(found)
    for each in tx.on_position:
        await each(position)


async def _inserted_with_rights(tx: Transaction, writer: Identity, row: tuple[Any, ...]) -> bool:
    """Insert an event and return True if the writer's rights are unchanged. If they have grown, insert nothing and
    return False.

    Raises Unauthenticated or Forbidden when the writer has lost rights.
    """
    driver = await tx.driver()
    values = (*row, writer.session_id, writer.user_id, writer.group.value)
    if tx.is_sqlite:
        found = await driver.execute_fetchall(INSERT_WHILE_RIGHTS_HOLD.sqlite, values)
    else:
        found = await driver.fetch(INSERT_WHILE_RIGHTS_HOLD.postgresql, *values)
    if found and not rights.is_expired(writer):
        return True
    await rights.require(tx, writer)
    return False


def _encoded(changed: tuple[str, ...]) -> str | None:
    return orjson.dumps(changed).decode() if changed else None
