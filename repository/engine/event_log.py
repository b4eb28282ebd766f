"""The event log: contiguous numbers, in commit order, on both databases.

A transaction appends its events with its last statements before COMMIT (`repository.engine.append`). It takes n
numbers by updating the one `event_head` row, whose lock is held until COMMIT: the second of two transactions gets
higher numbers and commits later, and a rollback returns the numbers. So a reader that sees number k sees every number
below it, and detects a lost event as a gap in the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from types import NoneType
from typing import Any

import orjson
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from core.errors import Unavailable
from core.times import utc_text
from repository.engine.database import Database
from repository.engine.events import Event, Head, head_of, new_epoch
from repository.engine.statement import statement
from repository.engine.transaction import Transaction

HEAD_ID = 1
# What tells an event from another one with its number, in another history of the log.
Mark = tuple[str | int | None, ...]
HEAD = statement("SELECT epoch, seq FROM event_head WHERE id = 1")
HEAD_AND_MARK = statement(
    "SELECT event_head.epoch, event_head.seq, topic, operation, entity_id, actor_id, created_at FROM event_head"
    " LEFT JOIN events ON events.seq = $1 WHERE event_head.id = 1"
)
_MAYBE_STRING, _MAYBE_BYTES, _MAYBE_INT = (str, NoneType), (bytes, NoneType), (int, NoneType)
# The Python types of seq, topic, operation, entity_id, audience, payload, before, changed, actor_id and created_at.
_COLUMN_FORMS: tuple[Any, ...] = (
    int, str, str, _MAYBE_STRING, str, bytes, _MAYBE_BYTES, _MAYBE_STRING, _MAYBE_INT, str,
)  # fmt: skip
_SIZE = func.length(models.events.c.payload) + func.coalesce(func.length(models.events.c.before), 0)


async def head(database: Database) -> Head:
    """Return the log's epoch and its newest number. Raises Unavailable."""
    return head_of(await database.fetch(HEAD))


async def head_and_mark(database: Database, seq: int) -> tuple[Head, Mark | None]:
    """Return the head, and the mark of the event `seq`, or None if the log does not hold it. Raises Unavailable."""
    found = await database.fetch(HEAD_AND_MARK, seq)
    head = head_of(found)
    *fields, created_at = found[0][2:]
    if created_at is None:
        return head, None
    return head, (*fields, utc_text(created_at) if isinstance(created_at, datetime) else created_at)


def mark_of(event: Event) -> Mark:
    return (event.topic, event.operation, event.entity_id, event.actor_id, event.created_at)


async def _head(connection: AsyncConnection) -> Head:
    head = models.event_head.c
    return head_of((await connection.execute(select(head.epoch, head.seq).where(head.id == HEAD_ID))).all())


async def oldest(database: Database) -> int | None:
    """Return the lowest number still kept, or None when the log is empty. Raises Unavailable."""
    ((lowest,),) = await database.select(select(func.min(models.events.c.seq)))
    if not isinstance(lowest, _MAYBE_INT):
        raise Unavailable("The numbers of the events have an unexpected type")
    return lowest


async def read_after(database: Database, seq: int, *, max_rows: int, max_bytes: int) -> list[Event]:
    """Return the next events after `seq`, in order: at most `max_rows` events and `max_bytes` bytes.

    A first event larger than `max_bytes` is returned alone. The caller must check that the first number is `seq + 1`;
    otherwise the log no longer reaches back to `seq`.
    """
    table = models.events

    async def work(connection: AsyncConnection) -> list[Event]:
        following = select(table.c.seq, _SIZE).where(table.c.seq > seq).order_by(table.c.seq).limit(max_rows)
        sizes = await connection.execute(following)
        last, total = seq, 0
        for number, size in sizes:
            total += size
            if total > max_bytes and last != seq:
                break
            last = number
        if last == seq:
            return []
        current = await _head(connection)
        chosen = select(table).where(table.c.seq > seq, table.c.seq <= last).order_by(table.c.seq)
        found = (await connection.execute(chosen)).all()
        return [_event(current.epoch, row) for row in found]

    try:
        return await database.reading(work)
    except (TypeError, ValueError) as error:
        raise Unavailable("The log's events have an unexpected form") from error


def _event(epoch: str, row: Sequence[Any]) -> Event:
    """Return the event of a row, whose columns are in the order of the event's fields.

    Raises TypeError or ValueError when the row is not as expected.
    """
    if not all(isinstance(value, form) for value, form in zip(row, _COLUMN_FORMS, strict=True)):
        raise TypeError("expected the columns of an event")
    *fields, changed, actor_id, created_at = row
    values = (*fields, tuple(orjson.loads(changed)) if changed else (), actor_id, created_at)
    return Event(epoch, *values)


async def tail(database: Database, *, max_rows: int, max_bytes: int) -> int:
    """Return the lowest number after which all events fit into `max_rows` and `max_bytes`; 0 when the log is empty."""
    table = models.events
    newest = select(table.c.seq, _SIZE).order_by(table.c.seq.desc()).limit(max_rows)
    start, total = None, 0
    for seq, size in await database.select(newest):
        total += size
        start = start if start is not None else seq
        if total > max_bytes:
            break
        start = seq - 1
    return start or 0


async def prune(database: Database, *, keep_rows: int, keep_bytes: int, older_than: Any, max_rows: int) -> int:
    """Delete up to `max_rows` of the oldest events: those beyond the newest `keep_rows` or `keep_bytes`, or from before
    `older_than` (timezone-aware).

    Return how many were deleted.
    """

    async def work(tx: Transaction) -> int:
        table, head = models.events, models.event_head
        query = select(head.c.epoch, head.c.seq, head.c.size).where(head.c.id == HEAD_ID)
        found = (await tx.connection.execute(query)).all()
        newest, size = head_of(found).seq, found[0].size
        first_young = select(func.min(table.c.seq)).where(table.c.created_at >= utc_text(older_than))
        young = (await tx.connection.execute(first_young)).scalar()
        floor = max(newest - keep_rows, (young - 1) if young is not None else newest)
        oldest = await tx.connection.execute(select(table.c.seq, _SIZE).order_by(table.c.seq).limit(max_rows))
        count, freed, until = 0, 0, 0
        for seq, event_size in oldest:
            if seq > floor and size - freed <= keep_bytes:
                break
            count, freed, until = count + 1, freed + event_size, seq
        if count:
            spans = models.event_spans
            await tx.connection.execute(delete(spans).where(spans.c.seq <= until))
            await tx.connection.execute(delete(table).where(table.c.seq <= until))
            # The head is updated last, because other writers then wait for it until COMMIT.
            await tx.connection.execute(update(head).values(size=head.c.size - freed))
        return count

    return await database.write(work)


async def renew_epoch(database: Database, present: str | None = None) -> str:
    """Give the log a new epoch, as after restoring a backup: every position that a client holds becomes invalid.

    With `present`, do so only if `present` is still the epoch, so that only one of several workers changes it. Return
    the epoch that was generated, whether or not it was stored.
    """
    epoch = new_epoch()

    async def work(tx: Transaction) -> None:
        change = update(models.event_head).values(epoch=epoch)
        if present is not None:
            change = change.where(models.event_head.c.epoch == present)
        await tx.connection.execute(change)
        await raise_head(tx.connection)

    await database.write(work)
    return epoch


async def raise_head(connection: AsyncConnection) -> None:
    """Raise the head to the number of the newest event, because no number may be used again.

    The head may be behind the events if it was lost, or restored without them.
    """
    head, events = models.event_head, models.events
    newest = select(func.coalesce(func.max(events.c.seq), 0)).scalar_subquery()
    size = select(func.coalesce(func.sum(_SIZE), 0)).scalar_subquery()
    await connection.execute(update(head).where(head.c.seq < newest).values(seq=newest, size=size))
