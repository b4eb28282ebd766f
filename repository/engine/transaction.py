"""A write in progress: its connection, and the events that it appends just before COMMIT."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import ContentTooLarge
from core.identity import PUBLIC_AUDIENCE, Identity
from repository.engine.events import Head, Newest
from repository.engine.lock_waits import LockWaits
from repository.engine.statement import Statement

# Clients usually limit frames to 1 MiB; this smaller limit leaves room for the rest of the frame.
MAX_EVENT_BYTES = 768 * 1024
MAX_EVENT_ITEMS = 1_000
# Large enough for the largest body of a bulk operation (10 MiB) with the fields that the service adds to 10,000 rows.
# Without a limit, a request of 45 kB that edits 10,000 long rows would write 386 MB.
MAX_TRANSACTION_BYTES = 16 * 1024 * 1024
_ID = re.compile(rb'(?:\{"id":)?([0-9]+)')


class Draft(NamedTuple):
    """An event that has no number yet: the fields of `Event` between its number and its time, in the same order, and
    the `span`, which only the log has.
    """

    topic: str
    operation: str
    entity_id: str | None
    audience: str
    payload: bytes
    before: bytes | None
    changed: tuple[str, ...]
    actor_id: int | None
    # The lowest and the highest id in a bulk event.
    span: tuple[int, int] | None = None


@dataclass(slots=True)
class Transaction:
    """A transaction, as `Database.write` passes it to its work. Only the `emit` methods send events to watchers.

    `writer` is the client on whose behalf the transaction writes. It must still have its rights when the transaction
    ends (`repository.engine.rights`); with None, no rights are checked. `address` is the client's IP address, for the
    audit trail. With `job_id`, the bulk events name this job.

    The functions in `on_position` are called just before COMMIT, with the position of the transaction's last event, or
    with the log's head if there is no event. They may write rows, but emit nothing.
    """

    connection: AsyncConnection
    writer: Identity | None = None
    drafts: list[Draft] = field(default_factory=list)
    size: int = 0  # the total size of the drafts, in bytes
    on_position: list[Callable[[Head], Awaitable[None]]] = field(default_factory=list)
    lock_waits: LockWaits = field(default_factory=LockWaits)
    newest: Newest = field(default_factory=Newest)
    address: str | None = None
    job_id: str | None = None
    _driver: Any = None

    @property
    def is_sqlite(self) -> bool:
        return self.connection.dialect.name == "sqlite"

    async def driver(self) -> Any:
        """Return the driver's connection (aiosqlite or asyncpg), inside this transaction, for the bulk paths.

        On asyncpg, SQLAlchemy begins the transaction only when it runs its first statement, so this method runs a
        statement first if necessary. Otherwise, each statement that bypasses SQLAlchemy would commit separately.
        """
        if self._driver is None:
            raw: Any = (await self.connection.get_raw_connection()).driver_connection
            if not self.is_sqlite and not raw.is_in_transaction():
                await self.connection.exec_driver_sql("SELECT 1")
                assert raw.is_in_transaction()
            self._driver = raw
        return self._driver

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Undo all that the block has written, its events included, if the block raises an exception."""
        drafts, size, listeners = len(self.drafts), self.size, len(self.on_position)
        try:
            async with self.connection.begin_nested():
                yield
        except BaseException:
            del self.drafts[drafts:], self.on_position[listeners:]
            self.size = size
            raise

    async def execute_many(self, statement: Statement, rows: Sequence[Sequence[Any]]) -> None:
        """Run the statement once for each row, through the driver itself."""
        driver = await self.driver()
        if self.is_sqlite:
            await driver.executemany(statement.sqlite, rows)
        elif len(rows) == 1:  # one statement is cheaper than a batch of one
            await driver.execute(statement.postgresql, *rows[0])
        else:
            await driver.executemany(statement.postgresql, rows)

    def emit(
        self,
        topic: str,
        operation: str,
        entity: dict[str, Any],
        *,
        actor_id: int | None,
        before: dict[str, Any] | None = None,
        changed: Sequence[str] = (),
        audience: str = PUBLIC_AUDIENCE,
    ) -> bytes:
        """Append an event about one entity and return its payload. The payload of a delete holds only the id.

        `before` is the whole entity before the change. Raises ContentTooLarge.
        """
        payload = orjson.dumps({"id": entity["id"]} if operation == "delete" else entity)
        old = None
        if before is not None:
            old = orjson.dumps(before if operation == "delete" else former_values(before, entity))
        self._append(Draft(topic, operation, str(entity["id"]), audience, payload, old, tuple(changed), actor_id))
        return payload

    def emit_encoded(self, topic: str, operation: str, entity_id: str, payload: bytes, *, actor_id: int | None) -> None:
        """Append an event about one public entity that is already encoded. Raises ContentTooLarge."""
        self._append(Draft(topic, operation, entity_id, PUBLIC_AUDIENCE, payload, None, (), actor_id))

    def emit_bulk(
        self,
        topic: str,
        operation: str,
        items: Sequence[bytes],
        *,
        actor_id: int | None,
        before: Sequence[bytes] | None = None,
        changed: Sequence[str] = (),
        job_id: str | None = None,
        audience: str = PUBLIC_AUDIENCE,
    ) -> None:
        """Append `add_bulk` or `update_bulk` with encoded entities, or `delete_bulk` with encoded ids.

        `before` holds, encoded and in the same order, the `former_values` of updated entities, or the whole deleted
        entities. Rows that exceed MAX_EVENT_BYTES or MAX_EVENT_ITEMS are split into several events. Raises
        ContentTooLarge.
        """
        job_id = job_id or self.job_id
        key = b"ids" if operation == "delete_bulk" else b"items"
        tail = b',"job_id":' + orjson.dumps(job_id) if job_id is not None else b""
        start = 0
        while start < len(items):
            end = _end_of_slice(items, before, start)
            payload = b'{"count":%d,"%s":[%s]%s}' % (end - start, key, b",".join(items[start:end]), tail)
            old = b"[" + b",".join(before[start:end]) + b"]" if before is not None else None
            span = _span(items[start:end])
            self._append(Draft(topic, operation, None, audience, payload, old, tuple(changed), actor_id, span))
            start = end

    def _append(self, draft: Draft) -> None:
        self.size += len(draft.payload) + (len(draft.before) if draft.before is not None else 0)
        require_fits(self.size)
        self.drafts.append(draft)


def require_fits(size: int) -> None:
    """Raise ContentTooLarge if rows of `size` bytes are more than one transaction may write."""
    if size > MAX_TRANSACTION_BYTES:
        raise ContentTooLarge(
            f"Expected a request that changes at most {MAX_TRANSACTION_BYTES:,} bytes of rows: change fewer rows at a "
            "time; if other rows refer to them, change those first"
        )


def former_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of `before` whose values differ in `after`. Both have the same members."""
    return {name: value for name, value in before.items() if after[name] != value}


def _span(items: Sequence[bytes]) -> tuple[int, int] | None:
    """Return the lowest and the highest id of encoded entities or ids. An entity begins with its id."""
    found = [int(match[1]) for match in map(_ID.match, items) if match is not None]
    return (min(found), max(found)) if found else None


def _end_of_slice(items: Sequence[bytes], before: Sequence[bytes] | None, start: int) -> int:
    size = 0
    for index in range(start, min(len(items), start + MAX_EVENT_ITEMS)):
        size += len(items[index]) + 1 + (len(before[index]) + 1 if before is not None else 0)
        if size > MAX_EVENT_BYTES and index > start:
            return index
    return min(len(items), start + MAX_EVENT_ITEMS)
