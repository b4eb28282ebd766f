"""Idempotency keys: a POST repeated with the same `Idempotency-Key` gets the response to the first POST.

The response is stored in the transaction of its write: either both exist or neither does. If two requests with the same
key are concurrent, the second waits for the COMMIT of the first.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import orjson
from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite

import models
from core.errors import FieldProblem, InvalidInput
from core.times import utc_now, utc_text
from repository.engine.database import Database
from repository.engine.events import Head
from repository.engine.transaction import Transaction
from repository.generic import rows


@dataclass(frozen=True, slots=True)
class Claim:
    """One user's key, and a digest of the request that it came with."""

    user_id: int
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that is sent and stored, so that it can be sent again."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    is_replayed: bool = False  # whether it was stored by an earlier request


async def once(
    tx: Transaction,
    claim: Claim | None,
    work: Callable[[], Awaitable[StoredResponse]],
    headers_at: Callable[[Head], Mapping[str, str]],
) -> StoredResponse:
    """Run `work`, or return the stored response. Raises InvalidInput when the key was used with another request.

    `headers_at` returns, for the position of the last event, headers to store besides those of the response.
    """
    if claim is None:
        return await work()
    table = models.idempotency_keys
    new = sqlite.insert(table) if tx.is_sqlite else postgresql.insert(table)
    taken = await tx.connection.execute(
        new.values(user_id=claim.user_id, key=claim.key, fingerprint=claim.fingerprint, created_at=utc_now())
        .on_conflict_do_nothing()
        .returning(table.c.key)
    )
    mine = (table.c.user_id == claim.user_id) & (table.c.key == claim.key)
    if taken.one_or_none() is None:
        row = (await tx.connection.execute(select(table).where(mine))).one()
        if row.fingerprint != claim.fingerprint:
            message = "This key was used with another request; expected a new key"
            raise InvalidInput([FieldProblem(("header", "Idempotency-Key"), message, "idempotency_key_reused")])
        body = await rows.off_the_loop(len(row.body) // 100, zlib.decompress, row.body)
        return StoredResponse(row.status, body, orjson.loads(row.headers), is_replayed=True)
    response = await work()
    stored = await rows.off_the_loop(len(response.body) // 1_000, zlib.compress, response.body, 1)

    async def store(position: Head) -> None:
        headers = orjson.dumps({**response.headers, **headers_at(position)}).decode()
        values = {"status": response.status, "body": stored, "headers": headers}
        await tx.connection.execute(update(table).where(mine).values(values))

    tx.on_position.append(store)
    return response


async def is_taken(database: Database, claim: Claim) -> bool:
    """Return whether the key has been used, with this request or another one. Raises Unavailable."""
    table = models.idempotency_keys
    mine = (table.c.user_id == claim.user_id) & (table.c.key == claim.key)
    return bool(await database.select(select(table.c.key).where(mine)))


async def forget(database: Database, older_than: datetime) -> int:
    """Delete the keys created before `older_than` (timezone-aware). Return how many were deleted."""
    table = models.idempotency_keys
    return await rows.delete_without_events(database, table, table.c.created_at < utc_text(older_than))
