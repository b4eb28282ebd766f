"""Rows in and out in bulk, through the drivers' fast paths, with ids reserved up front."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Table, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger

import models
from repository.statement import statement
from repository.transaction import Transaction
from times import utc_text


async def reserve_ids(tx: Transaction, table: Table, count: int) -> list[int]:
    """`count` ids that nobody else gets. On SQLite the transaction already excludes every other writer."""
    driver = await tx.driver()
    if tx.is_sqlite:
        found = list(await driver.execute_fetchall("SELECT seq FROM sqlite_sequence WHERE name = ?", (table.name,)))
        last = found[0][0] if found else 0
        return list(range(last + 1, last + count + 1))
    taken = await driver.fetch(
        "SELECT nextval(pg_get_serial_sequence($1, 'id')) FROM generate_series(1, $2::bigint)", str(table.name), count
    )
    return sorted(row[0] for row in taken)


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
    if not tx.is_sqlite and len(records) > 1:
        await driver.copy_records_to_table(table.name, records=records, columns=columns)
        return
    names = ", ".join(f'"{name}"' for name in columns)
    marks = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    one = statement(f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})')  # noqa: S608 (names of our own tables)
    if tx.is_sqlite:
        await driver.executemany(one.sqlite, records)
    else:
        await driver.execute(one.postgresql, *records[0])


def from_driver(table: Table, values: Sequence[Any]) -> dict[str, Any]:
    """An entity from a row of all columns as the driver answers it, on either database."""
    row: dict[str, Any] = {}
    for column, value in zip(table.columns, values, strict=True):
        if value is None:
            found = None
        elif column.type is models.Strings:
            found = value if isinstance(value, list) else orjson.loads(value)
        elif isinstance(value, datetime):
            found = utc_text(value)
        elif isinstance(value, date):
            found = value.isoformat()
        else:
            found = value
        row[str(column.name)] = found
    return row


def one_of(tx_is_sqlite: bool, column: ColumnElement[int], ids: Sequence[int]) -> ColumnElement[bool]:
    """`column` is among `ids`, as one parameter however many there are."""
    if tx_is_sqlite:
        listed = func.json_each(orjson.dumps(list(ids)).decode()).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == func.any(bindparam(None, list(ids), type_=ARRAY(BigInteger)))
