"""Reading lists: filters, search, sorting and paging, the same for every resource.

A list is read by one statement, so its rows, its total and its log number belong to the same moment on both databases:
a client that watches from that number misses nothing and receives nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement, Table, Text, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from core.errors import FieldProblem, InvalidInput
from core.filters import EVERYTHING, Filter
from core.identity import unique_key
from repository import search
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head, head_of
from repository.engine.statement import statement
from repository.generic import cursors, filter_sql, rows
from repository.generic.cursors import Cursor, Order, Ordering, total_order
from repository.search import Ranking
from resources.resource import Link, Resource
from schemas import MAX_PROSE_LENGTH

T = TypeVar("T")
# A page beyond this offset skips more rows than most lists have.
MAX_LIGHT_OFFSET = 10_000
# The cost of a sort, in the unit of `filter_sql.MAX_LIGHT_COST`: a sort reads and compares every row. Each column after
# the first one adds 1. Every SKIPPED_ROWS_PER_COST skipped rows add 1, too, because the sort keeps them.
SORT_COST = 4
SKIPPED_ROWS_PER_COST = 2_000
# Only statements without conditions are kept, which differ mainly in their sort order.
MAX_KEPT_STATEMENTS = 256
# The long texts of a page are limited, because the page stays in memory until its client has read it.
MAX_PAGE_BYTES = 4 * 1024 * 1024
_SIZE, SIZE_SO_FAR = "bytes", "bytes_so_far"
CHARACTER_SIZE = 4  # the bytes of the widest characters in UTF-8
# The number of bytes of a column, by whether the database is SQLite, of which old versions have no `octet_length`.
BYTES_OF = {True: 'length(CAST("{}" AS BLOB))', False: 'octet_length("{}")'}


@dataclass(frozen=True, slots=True)
class ListRequest:
    """The requested part of a list. `sort` holds pairs (column, descending). The page holds only rows with an id above
    `after`, and only rows that come after the place that `cursor` names. `page_of` reads only `columns`, or all columns
    if it is None. With `link`, the list has only rows that link to the row with the id (or code) `linked`.
    """

    filter: Filter = EVERYTHING
    text: str = ""
    sort: Order = ()
    offset: int = 0
    limit: int = 50
    after: int | None = None
    cursor: Cursor | None = None
    user_id: int | None = None
    columns: tuple[str, ...] | None = None
    link: Link | None = None
    linked: int | str | None = None


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """The rows of a page, the number of rows in the whole list, and the log head at which both were read.

    `end` is the place of the last row, None for a page without rows.
    """

    rows: list[T]
    total: int
    head: Head
    end: Cursor | None = None


# --- the statement


@dataclass(frozen=True, slots=True)
class Shape:
    """What the SQL text of a list depends on besides its conditions. The first of `columns` must not be nullable."""

    table: Table
    columns: tuple[str, ...]
    order: Order
    by_owner: bool = False
    link: Link | None = None
    after: bool = False
    # Which values of the cursor are null, or None without a cursor.
    cursor_nulls: tuple[bool, ...] | None = None
    # With an expression of `BYTES_OF`, each row comes with the bytes of its long texts, alone and with those of all
    # earlier rows of the page.
    measure: str = ""
    extend: Extend | None = None  # returns the query with other rows before those of the page, in the same columns
    ranking: Ranking | None = None  # the search that finds the rows, if `table` is its `ranked_table`

    @property
    def selected(self) -> tuple[str, ...]:
        """The columns, and after them those that only the order needs."""
        return tuple(dict.fromkeys((*self.columns, *(name for name, _ in self.order))))

    @property
    def is_sorted(self) -> bool:
        """Whether the rows have to be sorted. The index on the id yields the rows in the order of their ids."""
        return self.order[0][0] != "id"


Extend = Callable[[sa.Select[Any], Shape], sa.Select[Any]]


def _shape(table: Table, columns: tuple[str, ...], order: Order, page: ListRequest) -> Shape:
    nulls = cursors.nulls_of(page.cursor) if page.cursor is not None else None
    return Shape(table, columns, order, page.user_id is not None, page.link, page.after is not None, nulls)


def _number(name: str) -> ColumnElement[int]:
    # The widest integer type is used, so that even a huge offset is not an error.
    return sa.bindparam(name, type_=sa.BigInteger)


def _select(shape: Shape, where: ColumnElement[bool]) -> sa.Select[Any]:
    """Return a query for epoch, seq, total and `shape.selected` of each row of the page, null for an empty page.

    The columns are given as text, because compiling objects would take longer than the databases need for the page.
    """
    table, head = shape.table, models.event_head
    if shape.by_owner:
        where = and_(where, table.c.user_id == _number("owner"))
    source: sa.FromClause = table
    counted, ids = source, table.c.id
    if shape.link is not None:
        source, counted, ids, where = filter_sql.linked(table, shape.link, where, "linked")
    names = shape.selected
    page = select(_columns(table.name, names)).select_from(source).where(where)
    if shape.after:
        page = page.where(ids > _number("after"))
    if shape.cursor_nulls is not None:
        page = page.where(cursors.rows_after(table, shape.order, shape.cursor_nulls))
    page = page.order_by(_order(table.name, shape.order, ids)).limit(_number("limit")).offset(_number("offset"))
    if shape.ranking is not None:
        ranked = page.with_only_columns(table.c.id, table.c.rank).correlate(None)
        page = select(_columns(table.name, names)).select_from(shape.ranking.of_page(ranked))
    elif shape.is_sorted:
        # Only the ids are sorted: otherwise, SQLite reads all columns of every row, even of rows beyond the page.
        chosen = table.c.id.in_(page.with_only_columns(table.c.id).correlate(None))
        page = select(_columns(table.name, names)).select_from(table).where(chosen)
    shown = [_columns("page", shape.columns), *_only_in_the_order(shape)]
    fits: ColumnElement[bool] | sa.TextClause = sa.true()
    if shape.measure:
        page = _measured(page, shape, names)
        shown.append(_columns("page", (SIZE_SO_FAR,)))
        # The first row that does not fit is read, too, because it shows that the page is too large.
        fits = sa.text(f'"page"."{SIZE_SO_FAR}" - "page"."{_SIZE}" <= {MAX_PAGE_BYTES}')
    matching = select(func.count()).select_from(counted if shape.ranking is None else source).where(where)
    if shape.ranking is not None and isinstance(where, sa.True_):
        matching = shape.ranking.total  # reads only the index
    total = matching.scalar_subquery().label("total")
    query = select(head.c.epoch, head.c.seq, total, *shown).select_from(head.outerjoin(page.subquery("page"), fits))
    query = query.order_by(_order("page", shape.order))
    query = query if shape.ranking is None else query.add_cte(shape.ranking.content)
    return query if shape.extend is None else shape.extend(query, shape)


def _measured(page: sa.Select[Any], shape: Shape, names: Iterable[str]) -> sa.Select[Any]:
    """Add to each row of a page the number of bytes in its long texts, and the sum up to and including the row."""
    texts = _long_texts(shape.table, shape.columns)
    lengths = " + ".join(f"coalesce({shape.measure.format(name)}, 0)" for name in texts)
    rows_of_page = page.add_columns(sa.text(f'{lengths or "0"} AS "{_SIZE}"')).subquery("rows")
    so_far = sa.text(
        f'sum("rows"."{_SIZE}") OVER (ORDER BY {_order("rows", shape.order)} ROWS UNBOUNDED PRECEDING)'
        f' AS "{SIZE_SO_FAR}"'
    )
    return select(_columns("rows", (*names, _SIZE)), so_far).select_from(rows_of_page)


@lru_cache(maxsize=MAX_KEPT_STATEMENTS)
def _long_texts(table: Table, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns of a list with long texts, whose length is limited only by the schema of the body."""
    return tuple(column.name for column in table.columns if column.name in columns and isinstance(column.type, Text))


def _needs_measure(shape: Shape, limit: int | None) -> bool:
    """Return whether `limit` rows may exceed MAX_PAGE_BYTES. Most pages have too few rows for that."""
    number = (limit or 0) * len(_long_texts(shape.table, shape.columns))
    return number * MAX_PROSE_LENGTH * CHARACTER_SIZE > MAX_PAGE_BYTES


def _columns(of: str, names: Iterable[str]) -> sa.TextClause:
    return sa.text(", ".join(f'"{of}"."{name}"' for name in names))


def _only_in_the_order(shape: Shape) -> list[sa.TextClause]:
    """Return the columns that only a cursor needs. Long texts, which are not measured, are shortened."""
    found = []
    for name in shape.selected[len(shape.columns) :]:
        is_long = isinstance(shape.table.c[name].type, Text)
        shown = f'substr("page"."{name}", 1, {cursors.MAX_CURSOR_BYTES})' if is_long else f'"page"."{name}"'
        found.append(sa.text(shown))
    return found


def _order(of: str, order: Order, ids: Column[int] | None = None) -> sa.TextClause:
    # Rows without a value come last on both databases. Every row has an id, whose index NULLS LAST would make useless.
    names = {name: f'"{of}"."{name}"' for name, _ in order} | ({} if ids is None else {"id": str(ids)})
    last = {name: "" if name == "id" else " NULLS LAST" for name in names}
    return sa.text(", ".join(f"{names[name]} {'DESC' if down else 'ASC'}{last[name]}" for name, down in order))


@lru_cache(maxsize=MAX_KEPT_STATEMENTS)
def _plain_text(shape: Shape, dialect: sa.Dialect) -> tuple[str, tuple[str, ...]]:
    """Return the SQL text of a list without conditions, in the driver's form, and the names of its parameters."""
    compiled = _select(shape, sa.true()).compile(dialect=dialect)
    names = compiled.positiontup
    assert names is not None, "both drivers take values by position"
    return str(compiled), tuple(names)


def _values(page: ListRequest) -> dict[str, Any]:
    values: dict[str, Any] = {"owner": page.user_id, "linked": page.linked, "after": page.after}
    values |= {"limit": page.limit, "offset": page.offset}
    if page.cursor is not None:
        values |= cursors.parameters(page.cursor.values)
    return values


def _driver_values(shape: Shape, page: ListRequest, *, is_sqlite: bool) -> dict[str, Any]:
    """Return the values in the form that the driver takes."""
    values = _values(page)
    if page.cursor is not None:
        names = [name for name, _ in shape.order]
        (given,) = rows.driver_values(shape.table, names, [page.cursor.values], is_sqlite=is_sqlite)
        values |= cursors.parameters(given)
    return values


def _end(shape: Shape, page: ListRequest, row: Sequence[Any]) -> Cursor:
    """Return the place of the last row, given by the columns of `shape.selected`."""
    found = dict(zip(shape.selected, row, strict=False))
    shown = {name: rows.shown(shape.table.c[name], found[name]) for name, _ in shape.order}
    return cursors.at(shape.order, shown, page.after, shape.ranking.text if shape.ranking is not None else "")


async def read(
    database: Database, shape: Shape, where: ColumnElement[bool] | None, page: ListRequest, lane: Lane = Lane.LIST
) -> Listed[Sequence[Any]]:
    """Return the rows as tuples, in the form that `rows.from_driver` takes. Raises Unavailable or InvalidInput.

    Without conditions, the most frequent case, the statement bypasses SQLAlchemy, which would cost several times what
    the databases need for a page.
    """
    if _needs_measure(shape, page.limit):
        shape = replace(shape, measure=BYTES_OF[database.is_sqlite])

    async def work(connection: AsyncConnection) -> list[Any]:
        if where is not None:
            return list((await connection.execute(_select(shape, where), _values(page))).all())
        statement_text, names = _plain_text(shape, connection.dialect)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        values = _driver_values(shape, page, is_sqlite=database.is_sqlite)
        given = [values[name] for name in names]
        try:
            if database.is_sqlite:
                return list(await driver.execute_fetchall(statement_text, given))
            return list(await driver.fetch(statement_text, *given))
        except Exception as error:
            # SQLAlchemy has not seen the error, so tell it that the connection may be unusable.
            await connection.invalidate(error)
            raise

    found = await database.reading(work, lane)
    head, (total, first) = head_of(found), found[0][2:4]
    if first is None:
        return Listed([], total, head)
    if shape.measure and found[-1][-1] > MAX_PAGE_BYTES:
        expected = f"Expected at most {len(found) - 1}: the texts of more rows would exceed {MAX_PAGE_BYTES:,} bytes"
        raise InvalidInput([FieldProblem(("query", "limit"), expected, "page_too_large")])
    last = 3 + len(shape.columns)
    return Listed([row[3:last] for row in found], total, head, _end(shape, page, found[-1][3:]))


# --- the lists


def lane_of(shape: Shape, page: ListRequest) -> Lane:
    """Return COSTLY for a request whose search, filter, order or offset takes long on a large table, otherwise LIST."""
    if page.text or page.offset > MAX_LIGHT_OFFSET or filter_sql.is_costly(page.filter):
        return Lane.COSTLY
    if not shape.is_sorted:
        return Lane.LIST
    columns = [shape.table.c[name] for name, _ in shape.order if name != "id"]
    if any(isinstance(column.type, Text) for column in columns):
        return Lane.COSTLY
    sort = SORT_COST + len(columns) - 1 + page.offset // SKIPPED_ROWS_PER_COST
    return Lane.COSTLY if filter_sql.cost(page.filter) + sort > filter_sql.MAX_LIGHT_COST else Lane.LIST


def _where(database: Database, shape: Shape, page: ListRequest) -> ColumnElement[bool] | None:
    clauses = [filter_sql.where(shape.table, page.filter, is_sqlite=database.is_sqlite)] if page.filter else []
    if page.text and shape.ranking is None:
        clauses.append(search.matches(shape.table, page.text, is_sqlite=database.is_sqlite))
    return and_(sa.true(), *clauses) if clauses or shape.ranking is not None else None


def ordering_of(resource: Resource) -> Ordering:
    """Return what decides the order of the lists of a resource."""
    ranked = search.ranked_ordering(resource.table) if resource.searched else None
    return Ordering(resource.table, lambda sort, after: total_order(sort), ranked)


def _shape_of(database: Database, resource: Resource, page: ListRequest, columns: tuple[str, ...]) -> Shape:
    ordering = ordering_of(resource)
    found = ordering.for_search(page.text, page.sort, page.after)
    shape = _shape(found.table, columns, found.order_of(page.sort, page.after), page)
    ranking = Ranking(resource.table, page.text, database.is_sqlite) if found is ordering.ranked else None
    return replace(shape, ranking=ranking)


async def _read(
    database: Database, resource: Resource, page: ListRequest, columns: tuple[str, ...]
) -> Listed[Sequence[Any]]:
    shape = _shape_of(database, resource, page, columns)
    lane = await search.lane_of(database, resource.table, page.text) or lane_of(shape, replace(page, text=""))
    return await read(database, shape, _where(database, shape, page), page, lane)


async def page_of(database: Database, resource: Resource, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return the entities of one page, with the requested columns. Raises Unavailable."""
    wanted = page.columns or resource.columns
    found = await _read(database, resource, page, tuple(dict.fromkeys(("id", *wanted))))
    skipped = 0 if "id" in wanted else 1
    entities = rows.from_driver(resource.table, [row[skipped:] for row in found.rows], wanted)
    return Listed(entities, found.total, found.head, found.end)


async def labels_of(database: Database, resource: Resource, page: ListRequest) -> Listed[tuple[int, str]]:
    """Return the ids and labels of one page. Raises Unavailable."""
    found = await _read(database, resource, page, ("id", resource.label))
    return Listed([(row[0], row[1]) for row in found.rows], found.total, found.head, found.end)


def whole(database: Database, resource: Resource, request: ListRequest) -> sa.Select[Any]:
    """Return a query for `request.columns` (or all columns) of all rows of a list, in its order."""
    shape = _shape_of(database, resource, request, request.columns or resource.columns)
    table, where = shape.table, _where(database, shape, request)
    query = select(_columns(table.name, shape.columns)).select_from(table).order_by(_order(table.name, shape.order))
    query = query if where is None else query.where(where)
    return query if shape.ranking is None else query.add_cte(shape.ranking.content)


async def count_of(database: Database, resource: Resource, page: ListRequest) -> Listed[Any]:
    """Return the total without rows. Raises Unavailable."""
    counted = Shape(resource.table, ("id",), total_order(()))
    return await read(database, counted, _where(database, counted, page), ListRequest(limit=0), Lane.COSTLY)


async def entities_of(
    database: Database,
    ordering: Ordering,
    where: ColumnElement[bool],
    public: Callable[[dict[str, Any]], dict[str, Any]],
    page: ListRequest,
    extend: Extend | None = None,
) -> Listed[dict[str, Any]]:
    """Return a page of the rows of a table that meet a condition, each as `public` returns it. Raises Unavailable."""
    table, order = ordering.table, ordering.order_of(page.sort, page.after)
    shape = replace(_shape(table, tuple(str(column.name) for column in table.columns), order, page), extend=extend)
    found = await read(database, shape, where, page, lane_of(shape, page))
    return Listed([public(row) for row in rows.from_driver(table, found.rows)], found.total, found.head, found.end)


# --- single rows


async def find(database: Database, resource: Resource, name: int | str) -> dict[str, Any] | None:
    """Return the entity with this id or, for a string, with this code, ignoring case; or None. Raises Unavailable."""
    columns = ", ".join(f'"{column}"' for column in resource.columns)
    key = "id" if isinstance(name, int) else resource.key_of_code
    query = statement(f'SELECT {columns} FROM "{resource.table.name}" WHERE "{key}" = $1')  # noqa: S608 (names of our own tables)
    found = await database.fetch(query, name if isinstance(name, int) else unique_key(name))
    return rows.from_driver(resource.table, found)[0] if found else None


async def find_by(database: Database, resource: Resource, column: str, value: int, limit: int) -> list[dict[str, Any]]:
    """Return the first rows, in order of id, whose `column` holds `value`: at most `limit` of them, and no more than
    fit into MAX_PAGE_BYTES. Raises Unavailable.
    """
    shape = Shape(resource.table, resource.columns, (("id", False),), measure=BYTES_OF[database.is_sqlite])
    page = select(_columns(resource.table.name, resource.columns)).where(resource.table.c[column] == value)
    page = page.order_by(resource.table.c.id).limit(limit)
    measured = _measured(page, shape, resource.columns).subquery("page")
    fits = sa.text(f'"page"."{SIZE_SO_FAR}" <= {MAX_PAGE_BYTES}')
    found = select(_columns("page", resource.columns)).select_from(measured).where(fits)
    return rows.from_driver(resource.table, await database.select(found.order_by(sa.text('"page"."id"')), Lane.LIST))
