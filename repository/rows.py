"""Rows in and out in bulk, through the drivers' fast paths, with ids reserved up front."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Table, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger

import models
from repository.transaction import Transaction


async def reserve_ids(tx: Transaction, table: Table, count: int) -> list[int]:
    """`count` ids that nobody else gets. On SQLite the transaction already excludes every other writer."""
    if tx.is_sqlite:
        found = await tx.connection.execute(
            text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table.name}
        )
        last = found.scalar() or 0
        return list(range(last + 1, last + count + 1))
    taken = await tx.connection.execute(
        text("SELECT nextval(pg_get_serial_sequence(:name, 'id')) FROM generate_series(1, :count)"),
        {"name": table.name, "count": count},
    )
    return sorted(taken.scalars())


def driver_values(
    table: Table, names: Sequence[str], made: Sequence[dict[str, Any]], *, is_sqlite: bool
) -> list[tuple[Any, ...]]:
    """The columns `names` of each row as the driver takes them. Pure."""
    kinds = [table.c[name].type for name in names]
    lists = [index for index, kind in enumerate(kinds) if kind is models.Strings]
    dates = [] if is_sqlite else [index for index, kind in enumerate(kinds) if isinstance(kind, models.IsoDate)]
    values = []
    for row in made:
        record: list[Any] = list(row.values())
        for index in lists:
            record[index] = orjson.dumps(record[index]).decode()
        for index in dates:
            record[index] = date.fromisoformat(record[index]) if record[index] is not None else None
        values.append(tuple(record))
    return values


async def insert(
    tx: Transaction, table: Table, ids: Sequence[int], values: Sequence[tuple[Any, ...]], now: str
) -> None:
    """Insert rows of `id`, then `driver_values` of the columns between, then `created_at` and `updated_at`."""
    driver = await tx.driver()
    columns = [str(column.name) for column in table.columns]
    moment: Any = now if tx.is_sqlite else datetime.fromisoformat(now)
    records = [(entity_id, *middle, moment, moment) for entity_id, middle in zip(ids, values, strict=True)]
    if tx.is_sqlite:
        marks = ", ".join("?" for _ in columns)
        names = ", ".join(f'"{name}"' for name in columns)
        statement = f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})'  # noqa: S608 (names of our own tables)
        await driver.executemany(statement, records)
    else:
        await driver.copy_records_to_table(table.name, records=records, columns=columns)


def one_of(tx_is_sqlite: bool, column: ColumnElement[int], ids: Sequence[int]) -> ColumnElement[bool]:
    """`column` is among `ids`, as one parameter however many there are."""
    if tx_is_sqlite:
        listed = func.json_each(orjson.dumps(list(ids)).decode()).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == func.any(bindparam(None, list(ids), type_=ARRAY(BigInteger)))
