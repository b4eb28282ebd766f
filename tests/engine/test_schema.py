"""The comparison of the tables in the database with the models."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select, text

import models
from core.errors import Unavailable
from core.times import utc_now
from repository.engine import schema
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import rows
from tests.support.backends import POSTGRES_ONLY


async def alter(database: Database, statement: str) -> None:
    async with database.begin() as (connection, _):
        await connection.execute(text(statement))


async def test_the_tables_are_as_expected(database: Database) -> None:
    assert await database.schema.problem() is None


async def test_a_missing_column_is_named_and_refuses_nothing_else(database: Database) -> None:
    await alter(database, "ALTER TABLE genres RENAME COLUMN description TO away")
    assert await database.schema.problem() == "a column is missing: genres.description"
    assert await database.schema.explain(TypeError()) is None
    assert await database.select(models.event_head.select())


@POSTGRES_ONLY
async def test_while_a_column_has_an_unexpected_type_everything_is_refused(
    database: Database, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alter(database, "ALTER TABLE genres ALTER COLUMN version TYPE numeric")
    found = await database.schema.explain(TypeError())
    assert found is not None
    assert "genres.version is numeric, expected integer" in str(found.detail)
    with pytest.raises(Unavailable):
        await database.select(models.event_head.select())
    # An error that comes right after the correction may still come from values that were read before the correction.
    await alter(database, "ALTER TABLE genres ALTER COLUMN version TYPE integer")
    assert await database.schema.explain(TypeError()) is not None
    monkeypatch.setattr(schema, "RECENT_SECONDS", 0.0)
    assert await database.schema.problem() is None
    assert await database.schema.explain(TypeError()) is None
    assert await database.select(models.event_head.select())


@POSTGRES_ONLY
@pytest.mark.parametrize("kind", ["bigint", "text"])
async def test_a_wider_type_is_allowed(database: Database, backend: str, kind: str) -> None:
    column = {"bigint": "genres.version", "text": "genres.name"}[kind]
    table, _, name = column.partition(".")
    await alter(database, f"ALTER TABLE {table} ALTER COLUMN {name} TYPE {kind}")
    assert await database.schema.problem() is None


async def test_errors_share_comparisons(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    difference = schema.difference

    def counted(found: schema.Types, *, is_sqlite: bool) -> schema.Difference | None:
        nonlocal compared
        compared += 1
        return difference(found, is_sqlite=is_sqlite)

    monkeypatch.setattr(schema, "difference", counted)
    found = await asyncio.gather(*(database.schema.explain(TypeError()) for _ in range(50)))
    assert found == [None] * 50
    assert compared <= 2  # the comparison that the first call begins, and one more that all later calls share


@POSTGRES_ONLY
async def test_rows_stored_in_bulk_after_a_change_of_a_type_are_right(database: Database, backend: str) -> None:
    table = models.genres
    stored: set[int] = set()

    async def work(tx: Transaction) -> list[int]:
        ids = await rows.reserve_ids(tx, table, 2)
        values = [(f"name {number}", f"key {number}", 1) for number in ids]
        await rows.insert(tx, table, ("name", "name_key", "version"), ids, values, utc_now())
        return ids

    for kind in ("bigint", "numeric", "bigint"):
        await alter(database, f"ALTER TABLE genres ALTER COLUMN id TYPE {kind}")
        for _ in range(2):
            stored.update(await database.write(work))
    found = await database.select(select(table.c.id))
    assert {int(row.id) for row in found} == stored
    assert len(stored) == 12
