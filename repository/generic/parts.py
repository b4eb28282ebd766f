"""Deletes the parts of a row together with the row: rows that mean nothing without it, such as the ratings of a movie.

The owner of each part that only its owner sees gets one event (or several, if one cannot hold all parts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from sqlalchemy import delete, select

from core.errors import Conflict
from repository.engine.transaction import Transaction
from repository.generic import rows
from resources.registry import parts_of
from resources.resource import Resource

# The limit for the parts that one request deletes. It is as high as the limit for the rows of a bulk operation, because
# on SQLite other writes wait meanwhile.
MAX_DELETED_PARTS = 10_000

Rows = Sequence[dict[str, Any]]


async def delete_parts(tx: Transaction, resource: Resource, gone: Rows, actor_id: int | None) -> None:
    """Delete the parts of rows that are about to be deleted. Raises Conflict when there are more than
    MAX_DELETED_PARTS, and ContentTooLarge when they exceed the size of a transaction.
    """
    left = MAX_DELETED_PARTS
    ids = [row["id"] for row in gone]
    for part, whole in parts_of(resource):
        table = part.table
        chosen = rows.one_of(tx.is_sqlite, table.c[whole.column], ids)
        query = select(table.c.id).where(chosen).order_by(table.c.id).limit(left + 1)
        found = list((await tx.connection.execute(query.with_for_update())).scalars())
        left -= len(found)
        if left < 0:
            raise Conflict(_too_many(resource, ids))
        if found:
            before = await rows.fetch_locked(tx, table, found)
            await tx.connection.execute(delete(table).where(rows.one_of(tx.is_sqlite, table.c.id, found)))
            await _emit(tx, part, before, actor_id)


def _too_many(resource: Resource, ids: Sequence[int]) -> str:
    has = f"{resource.singular.capitalize()} {ids[0]} has" if len(ids) == 1 else f"These {resource.name} have"
    names = " and ".join(part.name for part, _ in parts_of(resource))
    return f"{has} more than {MAX_DELETED_PARTS:,} rows of {names}, which would be deleted, too"


async def _emit(tx: Transaction, part: Resource, gone: Rows, actor_id: int | None) -> None:
    by_audience: dict[str, list[dict[str, Any]]] = {}
    for row in gone:
        by_audience.setdefault(part.audience_of(row), []).append(row)
    for audience, listed in by_audience.items():
        if len(listed) == 1:
            tx.emit(part.name, "delete", listed[0], actor_id=actor_id, before=listed[0], audience=audience)
            continue
        tx.emit_bulk(
            part.name,
            "delete_bulk",
            [str(row["id"]).encode() for row in listed],
            actor_id=actor_id,
            before=await rows.off_the_loop(len(listed), lambda each: [orjson.dumps(row) for row in each], listed),
            audience=audience,
        )
