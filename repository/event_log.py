"""The event log: contiguous numbers, in commit order, on both databases.

`append` is the last thing a transaction does before COMMIT. It takes n numbers by updating the one `event_head` row,
whose lock is held until COMMIT: whoever comes second gets higher numbers and commits later, and a rollback gives the
numbers back. A reader that sees number k therefore sees every number below it, and can find a loss by arithmetic.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from repository.statement import statement
from times import utc_now, utc_text

if TYPE_CHECKING:
    from repository.database import Database
    from repository.transaction import Transaction

HEAD_ID = 1

# Every write pays for the first two, and every worker asks for the head many times a second.
TAKE = statement("UPDATE event_head SET seq = seq + $1 WHERE id = 1 RETURNING epoch, seq")
INSERT = statement(
    "INSERT INTO events (seq, topic, operation, entity_id, audience, payload, before, changed, actor_id, created_at)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::timestamptz)"
)
HEAD = statement("SELECT epoch, seq FROM event_head WHERE id = 1")


@dataclass(frozen=True, slots=True)
class Event:
    """A committed event. `payload` and `before` are encoded JSON, shared by the log, the bus and the sockets."""

    epoch: str
    seq: int
    topic: str
    operation: str
    entity_id: str | None
    audience: str
    payload: bytes
    before: bytes | None
    changed: tuple[str, ...]
    actor_id: int | None
    created_at: str
    # Parts of frames already built for this event, by what they depend on (`realtime.frames`).
    built: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes, about: what it costs to keep."""
        return len(self.payload) + (len(self.before) if self.before else 0) + 512


@dataclass(frozen=True, slots=True)
class Head:
    """The log's identity and its newest number."""

    epoch: str
    seq: int


async def append(tx: Transaction) -> list[Event]:
    """Number and insert the transaction's drafts. Nothing may be written in the transaction after this."""
    created_at = utc_now()
    driver = await tx.driver()
    count = len(tx.drafts)
    if tx.is_sqlite:
        (row,) = await driver.execute_fetchall(TAKE.sqlite, (count,))
    else:
        row = await driver.fetchrow(TAKE.postgresql, count)
    epoch, last = row[0], row[1]
    events = [
        Event(
            epoch,
            last - count + 1 + index,
            draft.topic,
            draft.operation,
            draft.entity_id,
            draft.audience,
            draft.payload,
            draft.before,
            draft.changed,
            draft.actor_id,
            created_at,
        )
        for index, draft in enumerate(tx.drafts)
    ]
    rows = [
        (
            event.seq,
            event.topic,
            event.operation,
            event.entity_id,
            event.audience,
            event.payload,
            event.before,
            orjson.dumps(event.changed).decode() if event.changed else None,
            event.actor_id,
            event.created_at,
        )
        for event in events
    ]
    if tx.is_sqlite:
        await driver.executemany(INSERT.sqlite, rows)
    elif count == 1:
        await driver.execute(INSERT.postgresql, *rows[0])
    else:
        await driver.executemany(INSERT.postgresql, rows)
    return events


async def head(database: Database) -> Head:
    (row,) = await database.fetch(HEAD)
    return Head(row[0], row[1])


async def _head(connection: AsyncConnection) -> Head:
    row = (await connection.execute(select(models.event_head.c.epoch, models.event_head.c.seq))).one()
    return Head(row.epoch, row.seq)


async def oldest(database: Database) -> int | None:
    """The lowest number still kept, or None when no event is."""
    async with database.read() as connection:
        lowest: int | None = (await connection.execute(select(func.min(models.events.c.seq)))).scalar()
        return lowest


async def read_after(database: Database, seq: int, *, max_rows: int, max_bytes: int) -> list[Event]:
    """The next events after `seq`, in order: at most `max_rows`, and at most `max_bytes` unless one alone is larger.

    The caller checks that the first is `seq + 1`: when it is not, the log no longer reaches back to there.
    """
    table = models.events
    async with database.read() as connection:
        weight = func.length(table.c.payload) + func.coalesce(func.length(table.c.before), 0)
        sizes = await connection.execute(
            select(table.c.seq, weight).where(table.c.seq > seq).order_by(table.c.seq).limit(max_rows)
        )
        last, total = seq, 0
        for number, size in sizes:
            total += size
            if total > max_bytes and last != seq:
                break
            last = number
        if last == seq:
            return []
        current = await _head(connection)
        rows = await connection.execute(
            select(table).where(table.c.seq > seq, table.c.seq <= last).order_by(table.c.seq)
        )
        return [
            Event(
                current.epoch,
                row.seq,
                row.topic,
                row.operation,
                row.entity_id,
                row.audience,
                row.payload,
                row.before,
                tuple(orjson.loads(row.changed)) if row.changed else (),
                row.actor_id,
                row.created_at,
            )
            for row in rows
        ]


async def tail(database: Database, *, max_rows: int, max_bytes: int) -> int:
    """The number after which the newest events begin that fit into the bounds."""
    table = models.events
    weight = func.length(table.c.payload) + func.coalesce(func.length(table.c.before), 0)
    async with database.read() as connection:
        newest = await connection.execute(select(table.c.seq, weight).order_by(table.c.seq.desc()).limit(max_rows))
        start, total = None, 0
        for seq, size in newest:
            total += size
            start = start if start is not None else seq
            if total > max_bytes:
                break
            start = seq - 1
        return start or 0


async def prune(database: Database, *, keep_rows: int, older_than: Any, max_rows: int) -> int:
    """Delete up to `max_rows` of the oldest events that are beyond `keep_rows` or before `older_than` (aware time)."""

    async def work(tx: Transaction) -> int:
        table = models.events
        current = await _head(tx.connection)
        first_young = await tx.connection.execute(
            select(func.min(table.c.seq)).where(table.c.created_at >= utc_text(older_than))
        )
        young = first_young.scalar()
        floor = max(current.seq - keep_rows, (young - 1) if young is not None else current.seq)
        lowest = (await tx.connection.execute(select(func.min(table.c.seq)))).scalar()
        if lowest is None or lowest > floor:
            return 0
        until = min(floor, lowest + max_rows - 1)
        await tx.connection.execute(delete(table).where(table.c.seq <= until))
        return int(until - lowest + 1)

    return await database.write(work)


async def renew_epoch(database: Database, present: str | None = None) -> str:
    """Give the log a new identity, as after restoring a backup: every watcher's position becomes void.

    With `present`, only if that is still its identity: of many who see the same reason one acts.
    """
    epoch = new_epoch()

    async def work(tx: Transaction) -> None:
        change = update(models.event_head).values(epoch=epoch)
        if present is not None:
            change = change.where(models.event_head.c.epoch == present)
        await tx.connection.execute(change)

    await database.write(work)
    return epoch


def new_epoch() -> str:
    return secrets.token_hex(8)
