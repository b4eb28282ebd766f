"""Reading lists: filters, search, sorting and paging, the same for every resource.

A list is one statement, so its rows, its total and its number of the log belong to one moment on both databases: a
client that watches from that number misses nothing and receives nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Table, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from core.filters import EVERYTHING, Filter
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head
from repository.engine.statement import statement
from repository.generic import filter_sql, rows
from resources.resource import Resource

T = TypeVar("T")
Order = tuple[tuple[str, bool], ...]  # (column, descending)
MAX_LIGHT_OFFSET = 10_000  # beyond it, a page skips more rows than a list of common size has
MAX_KEPT_STATEMENTS = 256  # without conditions there are about as many shapes as sort orders


@dataclass(frozen=True, slots=True)
class ListRequest:
    """The requested part of a list. `sort` holds (column, descending); `after` is the id before the page."""

    filter: Filter = EVERYTHING
    text: str = ""
    sort: Order = ()
    offset: int = 0
    limit: int = 50
    after: int | None = None
    user_id: int | None = None


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """The rows of a page, the number of rows in the whole list, and the head of the log that both show."""

    rows: list[T]
    total: int
    head: Head


# --- the statement


@dataclass(frozen=True, slots=True)
class Shape:
    """What a statement's text depends on besides its conditions. The first of `columns` is never null."""

    table: Table
    columns: tuple[str, ...]
    order: Order
    by_owner: bool = False
    after: bool = False


def _number(name: str) -> ColumnElement[int]:
    # The widest type, so that an offset past any table is not an error.
    return sa.bindparam(name, type_=sa.BigInteger)


def _select(shape: Shape, where: ColumnElement[bool]) -> sa.Select[Any]:
    """Return a query for epoch, seq and total, then the columns of each row of the page; nulls when it is empty.

    Columns are text here: compiling them as objects would take longer than the databases need for the page.
    """
    table, head = shape.table, models.event_head
    if shape.by_owner:
        where = and_(where, table.c.user_id == _number("owner"))
    names = dict.fromkeys((*shape.columns, *(name for name, _ in shape.order)))
    page = select(_columns(table.name, names)).select_from(table).where(where)
    if shape.after:
        page = page.where(table.c.id > _number("after"))
    page = page.order_by(_order(table.name, shape.order)).limit(_number("limit")).offset(_number("offset"))
    rows_of_page = page.subquery("page")
    total = select(func.count()).select_from(table).where(where).scalar_subquery()
    return (
        select(head.c.epoch, head.c.seq, total, _columns("page", shape.columns))
        .select_from(head.outerjoin(rows_of_page, sa.true()))
        .order_by(_order("page", shape.order))
    )


def _columns(of: str, names: Iterable[str]) -> sa.TextClause:
    return sa.text(", ".join(f'"{of}"."{name}"' for name in names))


def _order(of: str, order: Order) -> sa.TextClause:
    # Rows without a value come last in both directions; the databases disagree by default.
    return sa.text(", ".join(f'"{of}"."{name}" {"DESC" if down else "ASC"} NULLS LAST' for name, down in order))


@lru_cache(maxsize=MAX_KEPT_STATEMENTS)
def _plain_text(shape: Shape, dialect: sa.Dialect) -> tuple[str, tuple[str, ...]]:
    """Return the statement without conditions in the driver's form, and the names of its values."""
    compiled = _select(shape, sa.true()).compile(dialect=dialect)
    names = compiled.positiontup
    assert names is not None, "both drivers take values by position"
    return str(compiled), tuple(names)


async def read(
    database: Database,
    shape: Shape,
    where: ColumnElement[bool] | None,
    values: Mapping[str, int | None],
    lane: Lane = Lane.LIST,
) -> Listed[Sequence[Any]]:
    """Return the rows as tuples, in the forms of `rows.from_driver`. Raises Unavailable.

    Without conditions, the most frequent case, the statement bypasses SQLAlchemy, which costs several times what the
    databases need for a page.
    """

    async def work(connection: AsyncConnection) -> list[Any]:
        if where is not None:
            return list((await connection.execute(_select(shape, where), dict(values))).all())
        statement_text, names = _plain_text(shape, connection.dialect)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        given = [values[name] for name in names]
        try:
            if database.is_sqlite:
                return list(await driver.execute_fetchall(statement_text, given))
            return list(await driver.fetch(statement_text, *given))
        except Exception as error:
            # SQLAlchemy has not seen the error, after which the connection may be of no use.
            await connection.invalidate(error)
            raise

    found = await database.reading(work, lane)
    epoch, seq, total, first, *_ = found[0]
    return Listed([row[3:] for row in found] if first is not None else [], total, Head(epoch, seq))


# --- the lists


def lane_of(page: ListRequest) -> Lane:
    """Return the lane of a list: whether it compares each row a few times, or searches the rows."""
    is_deep = page.offset > MAX_LIGHT_OFFSET
    return Lane.COSTLY if page.text or is_deep or filter_sql.is_costly(page.filter) else Lane.LIST


def _where(database: Database, resource: Resource, page: ListRequest) -> ColumnElement[bool] | None:
    clauses = []
    if page.filter:
        clauses.append(filter_sql.where(resource.table, page.filter, is_sqlite=database.is_sqlite))
    if page.text:
        clauses.append(filter_sql.search(resource.table, resource.searched, page.text, is_sqlite=database.is_sqlite))
    return and_(*clauses) if clauses else None


def total_order(sort: Order) -> Order:
    """Return `sort` with the id appended, so that no two rows compare equal."""
    return sort if any(name == "id" for name, _ in sort) else (*sort, ("id", False))


async def _read(
    database: Database, resource: Resource, page: ListRequest, columns: tuple[str, ...]
) -> Listed[Sequence[Any]]:
    shape = Shape(resource.table, columns, total_order(page.sort), page.user_id is not None, page.after is not None)
    values = {"owner": page.user_id, "after": page.after, "limit": page.limit, "offset": page.offset}
    return await read(database, shape, _where(database, resource, page), values, lane_of(page))


async def page_of(database: Database, resource: Resource, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return the entities of one page. Raises Unavailable."""
    found = await _read(database, resource, page, resource.columns)
    return Listed(rows.from_driver(resource.table, found.rows), found.total, found.head)


async def labels_of(database: Database, resource: Resource, page: ListRequest) -> Listed[tuple[int, str]]:
    """Return the ids and labels of one page. Raises Unavailable."""
    found = await _read(database, resource, page, ("id", resource.label))
    return Listed([(row[0], row[1]) for row in found.rows], found.total, found.head)


async def count_of(database: Database, resource: Resource, page: ListRequest) -> Listed[Any]:
    """Return the total without rows. Raises Unavailable."""
    counted = Shape(resource.table, ("id",), total_order(()))
    values = {"limit": 0, "offset": 0}
    return await read(database, counted, _where(database, resource, page), values, Lane.COSTLY)


async def entities_of(
    database: Database,
    table: Table,
    where: ColumnElement[bool],
    order: Order,
    public: Callable[[dict[str, Any]], dict[str, Any]],
    page: ListRequest,
) -> Listed[dict[str, Any]]:
    """Return the part `page` of a table that is not a resource; `public` makes what clients see. Raises Unavailable."""
    shape = Shape(table, tuple(str(column.name) for column in table.columns), order, after=page.after is not None)
    values = {"after": page.after, "limit": page.limit, "offset": page.offset}
    found = await read(database, shape, where, values, lane_of(page))
    return Listed([public(row) for row in rows.from_driver(table, found.rows)], found.total, found.head)


# --- single rows


def entity(row: sa.Row[Any]) -> dict[str, Any]:
    """Return a row of SQLAlchemy as a plain dict."""
    # Names that SQL reserves are a subclass of str, which the JSON encoder rejects as keys.
    return {str(name): value for name, value in row._mapping.items()}


async def one(connection: AsyncConnection, query: sa.Executable) -> dict[str, Any] | None:
    """Return the only row of a query as a plain dict, or None when there is none."""
    row = (await connection.execute(query)).one_or_none()
    return entity(row) if row is not None else None


async def find(database: Database, resource: Resource, entity_id: int) -> dict[str, Any] | None:
    """Return the entity, or None. Raises Unavailable."""
    columns = ", ".join(f'"{name}"' for name in resource.columns)
    found = await database.fetch(statement(f'SELECT {columns} FROM "{resource.table.name}" WHERE id = $1'), entity_id)  # noqa: S608 (names of our own tables)
    return rows.from_driver(resource.table, found)[0] if found else None


async def find_by(database: Database, resource: Resource, column: str, value: int, limit: int) -> list[dict[str, Any]]:
    """Return the first rows by id whose `column` holds `value`. Raises Unavailable."""
    table = resource.table
    named = select(*(table.c[name] for name in resource.columns)).where(table.c[column] == value)
    return [entity(row) for row in await database.select(named.order_by(table.c.id).limit(limit), Lane.LIST)]
