"""Whether the index of words holds exactly what the rows say."""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import select

import models
from repository import search
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import rows
from resources.registry import RESOURCES
from resources.resource import Resource

INTEGRITY = "INSERT INTO {0}_fts({0}_fts, rank) VALUES ('integrity-check', 1)"


async def indexed(database: Database, resource: Resource) -> dict[int, tuple[Any, ...]]:
    """Return the indexed words of all rows, by id."""
    words = models.WORDS[resource.name]
    return {row[0]: tuple(row[1:]) for row in await database.select(select(words).order_by(words.c.id))}


async def require_exact_index(database: Database) -> None:
    """Assert that the words of every row are indexed, and no others. Nothing else may write meanwhile."""
    for resource in RESOURCES:
        if not resource.searched:
            continue
        ids = [row[0] for row in await database.select(select(resource.table.c.id))]
        expected: dict[int, Any] = {}
        for start in range(0, len(ids), rows.ROWS_PER_FETCH):
            found = await database.write(
                partial(_read, resource=resource, ids=ids[start : start + rows.ROWS_PER_FETCH])
            )
            expected |= zip((row["id"] for row in found), search.index_rows(resource, found), strict=True)
        assert await indexed(database, resource) == expected, resource.name
        if database.is_sqlite:
            await database.write(partial(_check_fts, resource=resource))


async def _read(tx: Transaction, resource: Resource, ids: list[int]) -> list[dict[str, Any]]:
    return await rows.fetch_locked(tx, resource.table, ids)


async def _check_fts(tx: Transaction, resource: Resource) -> None:
    await tx.connection.exec_driver_sql(INTEGRITY.format(resource.name))
