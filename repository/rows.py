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


async def insert(tx: Transaction, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert whole rows, every column given, ids included."""
    driver = await tx.driver()
    columns = [column.name for column in table.columns]
    if tx.is_sqlite:
        quoted = ", ".join(f'"{name}"' for name in columns)
        marks = ", ".join("?" for _ in columns)
        lists = {name for name in columns if table.c[name].type is models.Strings}
        values = (
            [orjson.dumps(row[name]).decode() if name in lists else row[name] for name in columns] for row in rows
        )
        statement = f'INSERT INTO "{table.name}" ({quoted}) VALUES ({marks})'  # noqa: S608 (names of our own tables)
        await driver.executemany(statement, list(values))
        return
    convert = [_to_postgresql(table.c[name].type) for name in columns]
    records = [tuple(change(row[name]) for name, change in zip(columns, convert, strict=True)) for row in rows]
    await driver.copy_records_to_table(table.name, records=records, columns=columns)


def _same(value: Any) -> Any:
    return value


def _json(value: Any) -> Any:
    # SQLAlchemy sets up asyncpg to take JSONB as text that is already encoded.
    return orjson.dumps(value).decode()


def _date(value: str | None) -> Any:
    return date.fromisoformat(value) if value is not None else None


def _time(value: str | None) -> Any:
    return datetime.fromisoformat(value) if value is not None else None


def _to_postgresql(kind: Any) -> Any:
    if kind is models.Strings:
        return _json
    if isinstance(kind, models.IsoDate):
        return _date
    if isinstance(kind, models.UtcTime):
        return _time
    return _same


def one_of(tx_is_sqlite: bool, column: ColumnElement[int], ids: Sequence[int]) -> ColumnElement[bool]:
    """`column` is among `ids`, as one parameter however many there are."""
    if tx_is_sqlite:
        listed = func.json_each(orjson.dumps(list(ids)).decode()).table_valued("value")
        return column.in_(select(listed.c.value))
    return column == func.any(bindparam(None, list(ids), type_=ARRAY(BigInteger)))
