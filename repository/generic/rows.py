"""Reads and writes rows in bulk, through the drivers' fast paths, with ids reserved up front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache, partial
from itertools import chain
from random import Random
from typing import Any, TypeVar

import orjson
import sqlalchemy as sa
from sqlalchemy import JSON, Boolean, Column, ColumnElement, Table, bindparam, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import BigInteger, Text

from core.databases.columns import IsoDate, UtcTime
from core.identity import unique_key
from core.times import utc_text
from repository.engine.database import Database
from repository.engine.statement import statement
from repository.engine.transaction import Transaction, require_fits
from repository.generic.versions import Row
from resources.derived import keys_of, visible_columns

T = TypeVar("T")
FEW_ROWS = 100
ROWS_PER_FETCH = 500  # the number of rows read before their size is checked; 500 rows of 40 kB are 20 MB
MAX_KEPT_TABLES = 32
MAX_KEPT_INSERTIONS = 128
RECORDS_OF_STATEMENTS = (1_000, 100, 10, 1)
MAX_SQLITE_VARIABLES = 32_766  # the default of SQLite since version 3.32
DELETED_ROWS = 1_000
Convert = Callable[[Any], Any]

# Conversions by column type, for values that drivers take or return in another form than clients see.
_TO_SQLITE: Mapping[type, Convert] = {JSON: lambda value: orjson.dumps(value).decode()}
_TO_POSTGRESQL = {**_TO_SQLITE, IsoDate: date.fromisoformat, UtcTime: datetime.fromisoformat}
_FROM_DRIVER: Mapping[type, Convert] = {
    JSON: lambda value: orjson.loads(value) if isinstance(value, str) else value,
    UtcTime: lambda value: utc_text(value) if isinstance(value, datetime) else value,
    IsoDate: lambda value: value.isoformat() if isinstance(value, date) else value,
    Boolean: lambda value: value if value is None else bool(value),
}


def key_of(value: str | None) -> str | None:
    """Return the key of a value, or None if there is no value."""
    return unique_key(value) if value is not None else None


async def reserve_ids(tx: Transaction, table: Table, count: int) -> list[int]:
    """Return `count` reserved ids. On SQLite, reading the last id is enough: the transaction excludes other writers."""
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
    table: Table, names: Sequence[str], made: Iterable[Iterable[Any]], *, is_sqlite: bool
) -> list[tuple[Any, ...]]:
    """Return rows of the columns `names` in the driver's form. Pure."""
    forms = _TO_SQLITE if is_sqlite else _TO_POSTGRESQL
    kinds = enumerate(type(table.c[name].type) for name in names)
    converters = [(index, forms[kind]) for index, kind in kinds if kind in forms]
    values = []
    for row in made:
        record = list(row)
        for index, convert in converters:
            if record[index] is not None:
                record[index] = convert(record[index])
        values.append(tuple(record))
    return values


async def insert(
    tx: Transaction, table: Table, names: Sequence[str], ids: Sequence[int], values: Sequence[tuple[Any, ...]], now: str
) -> None:
    """Insert a row for each id, with `values` (from `driver_values`) in the columns `names` and `now` as both times."""
    columns = ["id", *names, "created_at", "updated_at"]
    moment: Any = now if tx.is_sqlite else datetime.fromisoformat(now)
    records = [(entity_id, *middle, moment, moment) for entity_id, middle in zip(ids, values, strict=True)]
    await insert_records(tx, table, columns, records)


async def insert_records(
    tx: Transaction, table: Table, columns: Sequence[str], records: Sequence[tuple[Any, ...]], few: int = 1
) -> None:
    """Insert records, whose values are in the driver's form. On PostgreSQL, more than `few` of them are copied."""
    driver = await tx.driver()
    if tx.is_sqlite:
        await _insert_on_sqlite(driver, table, columns, records)
        return
    listed = ", ".join(f'"{name}"' for name in columns)
    if len(records) > few:
        # Before a COPY, asyncpg prepares this same statement to learn the types of the columns, but never runs it. If a
        # type has changed since it was prepared, PostgreSQL would store other values. Running the statement turns such
        # a change into an error, and locks the types until COMMIT.
        await driver.fetch(f'SELECT {listed} FROM "{table.name}" LIMIT 1')  # noqa: S608 (names of our own tables)
        await driver.copy_records_to_table(table.name, records=records, columns=list(columns))
        return
    marks = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    one = statement(f'INSERT INTO "{table.name}" ({listed}) VALUES ({marks})')  # noqa: S608 (names of our own tables)
    await tx.execute_many(one, records)


async def _insert_on_sqlite(
    driver: Any, table: Table, columns: Sequence[str], records: Sequence[tuple[Any, ...]]
) -> None:
    """Insert records, as many as possible with each statement.

    With a statement for each record, this thread would have to wait for other threads of Python after each record, for
    up to 5 ms. The numbers of records are powers of ten, so that there are few statements to compile.
    """
    start = 0
    for number in RECORDS_OF_STATEMENTS:
        if number * len(columns) > MAX_SQLITE_VARIABLES:
            continue
        end = len(records) - (len(records) - start) % number
        if start < end:
            blocks = [records[first : first + number] for first in range(start, end, number)]
            values = [list(chain.from_iterable(block)) for block in blocks]
            await driver.executemany(_insertion(table, tuple(columns), number), values)
            start = end


@lru_cache(maxsize=MAX_KEPT_INSERTIONS)
def _insertion(table: Table, columns: Sequence[str], number: int) -> str:
    listed = ", ".join(f'"{name}"' for name in columns)
    marks = f"({', '.join('?' * len(columns))})"
    return f'INSERT INTO "{table.name}" ({listed}) VALUES {", ".join([marks] * number)}'  # noqa: S608 (names of our own tables)


@lru_cache(maxsize=MAX_KEPT_TABLES)
def _forms(table: Table) -> tuple[list[str], list[tuple[str, Convert]]]:
    """Return the columns that clients see, and how to convert those that the drivers return in another form."""
    names = list(visible_columns(table))
    kinds = {name: type(table.c[name].type) for name in names}
    return names, [(name, _FROM_DRIVER[kind]) for name, kind in kinds.items() if kind in _FROM_DRIVER]


def from_driver(
    table: Table, found: Sequence[Sequence[Any]], columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Convert rows of these columns, or of all visible columns, as either driver returns them, to entities. Pure."""
    visible, forms = _forms(table)
    names = visible if columns is None else columns
    entities = [dict(zip(names, values, strict=True)) for values in found]
    for name, form in forms:
        if name in names:
            for row in entities:
                row[name] = form(row[name])
    return entities


def shown(column: Column[Any], value: Any) -> Any:
    """Convert a value from the driver's form to the form that clients see. Pure."""
    form = _FROM_DRIVER.get(type(column.type))
    return form(value) if form is not None else value


def entity(row: sa.Row[Any]) -> dict[str, Any]:
    """Return an SQLAlchemy row as a plain dict."""
    # SQLAlchemy names some columns with a subclass of str, which the JSON encoder rejects as a key.
    return {str(name): value for name, value in row._mapping.items()}


async def one(connection: AsyncConnection, query: sa.Executable) -> dict[str, Any] | None:
    """Return the only row of a query as a plain dict, or None when there is none."""
    row = (await connection.execute(query)).one_or_none()
    return entity(row) if row is not None else None


async def fetch_locked(tx: Transaction, table: Table, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entities with these ids, in order of id, locked until COMMIT.

    Raises ContentTooLarge when they exceed the size of a transaction, before all of them are in memory.
    """
    driver = await tx.driver()
    columns = ", ".join(f'"{name}"' for name in visible_columns(table))
    texts = _long_columns(table)
    ordered = sorted(ids)
    found: list[Any] = []
    size = 0
    for start in range(0, len(ordered), ROWS_PER_FETCH):
        part = ordered[start : start + ROWS_PER_FETCH]
        if tx.is_sqlite:
            query = f'SELECT {columns} FROM "{table.name}" WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id'  # noqa: S608 (names of our own tables)
            fetched = await driver.execute_fetchall(query, (orjson.dumps(part).decode(),))
        else:
            query = f'SELECT {columns} FROM "{table.name}" WHERE id = ANY($1::bigint[]) ORDER BY id FOR UPDATE'  # noqa: S608 (names of our own tables)
            fetched = await driver.fetch(query, part)
        if len(ordered) > ROWS_PER_FETCH:
            size += sum(len(row[place] or "") for row in fetched for place in texts)
            require_fits(size)
        found += fetched
    return await off_the_loop(len(found), from_driver, table, found)


@lru_cache(maxsize=MAX_KEPT_TABLES)
def _long_columns(table: Table) -> list[int]:
    """Return the indexes of those visible columns that hold long texts."""
    names = enumerate(visible_columns(table))
    return [place for place, name in names if isinstance(table.c[name].type, Text)]


async def pick(tx: Transaction, table: Table, random: Random, count: int, *, locked: bool = False) -> list[int]:
    """Return up to `count` ids of existing rows, starting at a random id; none only if there are no rows. If `locked`,
    the rows are locked until COMMIT.
    """
    lowest, highest = (await tx.connection.execute(select(func.min(table.c.id), func.max(table.c.id)))).one()
    if lowest is None:
        return []
    start = random.randint(lowest, max(lowest, highest - count + 1))
    chosen = select(table.c.id).where(table.c.id >= start).order_by(table.c.id).limit(count)
    return list((await tx.connection.execute(chosen.with_for_update() if locked else chosen)).scalars())


async def write_back(tx: Transaction, table: Table, after: Sequence[Row], columns: Sequence[str]) -> None:
    """Write these columns of the rows, found by their ids, and the keys that are derived from the columns."""
    sources = {key: source for key, source in keys_of(table).items() if source in columns}
    unique = [key for key in sources if table.c[key].unique]
    if unique and len(after) > 1:
        # Rows may swap values, so first give each row a temporary key. No value has such a key, because the keys of
        # values are case-folded and contain no capitals.
        for key in unique:
            moved = [(f"MOVED {row['id']}", row["id"]) for row in after]
            move = statement(f'UPDATE "{table.name}" SET "{key}" = $1 WHERE id = $2')  # noqa: S608 (names of our own tables)
            await tx.execute_many(move, moved)
    names = [*columns, *sources, "id"]
    places = ", ".join(f'"{name}" = ${number}' for number, name in enumerate(names[:-1], 1))
    one = statement(f'UPDATE "{table.name}" SET {places} WHERE id = ${len(names)}')  # noqa: S608 (names of our own tables)
    made = [[key_of(row[sources[name]]) if name in sources else row[name] for name in names] for row in after]
    values = await off_the_loop(len(made), partial(driver_values, table, names, made, is_sqlite=tx.is_sqlite))
    await tx.execute_many(one, values)


async def delete_without_events(database: Database, table: Table, which: ColumnElement[bool]) -> int:
    """Delete rows that no client sees. Return how many were deleted. Raises Unavailable.

    Each transaction deletes at most DELETED_ROWS, so that other writes get their turn.
    """
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(which).limit(DELETED_ROWS)
    total = 0

    async def work(tx: Transaction) -> int:
        return int((await tx.connection.execute(delete(table).where(key.in_(some)))).rowcount)

    while (count := await database.write(work)) > 0:
        total += count
        if count < DELETED_ROWS:
            break
    return total


async def off_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` and return its result, in a thread when `size` is so large that `work` would delay the sockets."""
    return work(*arguments) if size < FEW_ROWS else await asyncio.to_thread(work, *arguments)


def one_of(tx_is_sqlite: bool, column: ColumnElement[Any], values: Sequence[int | str]) -> ColumnElement[bool]:
    """Return the condition that `column` is among `values`, with one parameter, however many values there are."""
    if tx_is_sqlite:
        listed = func.json_each(orjson.dumps(list(values)).decode()).table_valued("value")
        return column.in_(select(listed.c.value))
    items = Text() if values and isinstance(values[0], str) else BigInteger()
    return column == func.any(bindparam(None, list(values), type_=ARRAY(items)))
