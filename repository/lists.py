"""Reading lists: filters, search, sorting and paging, the same for every resource."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, select

from filters import Filter
from repository import filter_sql, rows
from repository.database import Database
from repository.resources import Resource
from repository.statement import statement


@dataclass(frozen=True, slots=True)
class Page:
    """What part of a list is wanted. `sort` holds (column, descending); `after` is the id before the page."""

    filter: Filter = Filter()
    text: str = ""
    sort: tuple[tuple[str, bool], ...] = ()
    offset: int = 0
    limit: int = 50
    after: int | None = None
    user_id: int | None = None


def _where(database: Database, resource: Resource, page: Page) -> ColumnElement[bool]:
    table = resource.table
    clauses = [filter_sql.where(table, page.filter, is_sqlite=database.is_sqlite)]
    if page.text:
        clauses.append(filter_sql.search(table, resource.searched, page.text, is_sqlite=database.is_sqlite))
    if page.user_id is not None:
        clauses.append(table.c.user_id == page.user_id)
    return and_(*clauses)


def _ordered(resource: Resource, page: Page, query: Any) -> Any:
    order = []
    for name, descending in page.sort:
        column = resource.table.c[name]
        # Rows without a value come last either way; the databases disagree by default.
        order.append(column.desc().nulls_last() if descending else column.asc().nulls_last())
    if not any(name == "id" for name, _ in page.sort):
        order.append(resource.table.c.id.asc())
    query = query.order_by(*order).limit(page.limit).offset(page.offset)
    return query.where(resource.table.c.id > page.after) if page.after is not None else query


def entity(row: Row[Any]) -> dict[str, Any]:
    # Names that SQL reserves are a subclass of str, which the JSON encoder refuses as keys.
    return {str(name): value for name, value in row._mapping.items()}


async def page_of(database: Database, resource: Resource, page: Page) -> tuple[list[dict[str, Any]], int]:
    """The entities of one page, and how many the whole list has."""
    async with database.read() as connection:
        where = _where(database, resource, page)
        total = (await connection.execute(select(func.count()).select_from(resource.table).where(where))).scalar_one()
        if page.limit == 0:
            return [], total
        found = await connection.execute(_ordered(resource, page, select(resource.table).where(where)))
        return [entity(row) for row in found], total


async def labels_of(database: Database, resource: Resource, page: Page) -> tuple[list[tuple[int, str]], int]:
    """The ids and the titles or names of one page, and how many the whole list has."""
    table = resource.table
    async with database.read() as connection:
        where = _where(database, resource, page)
        total = (await connection.execute(select(func.count()).select_from(resource.table).where(where))).scalar_one()
        if page.limit == 0:
            return [], total
        found = await connection.execute(
            _ordered(resource, page, select(table.c.id, table.c[resource.label]).where(where))
        )
        return [(row[0], row[1]) for row in found], total


async def count_of(database: Database, resource: Resource, page: Page) -> int:
    async with database.read() as connection:
        query = select(func.count()).select_from(resource.table).where(_where(database, resource, page))
        return int((await connection.execute(query)).scalar_one())


async def find(database: Database, resource: Resource, entity_id: int) -> dict[str, Any] | None:
    columns = ", ".join(f'"{name}"' for name in resource.columns)
    found = await database.fetch(statement(f'SELECT {columns} FROM "{resource.table.name}" WHERE id = $1'), entity_id)  # noqa: S608 (names of our own tables)
    return rows.from_driver(resource.table, found)[0] if found else None


async def find_by(database: Database, resource: Resource, column: str, value: int, limit: int) -> list[dict[str, Any]]:
    """The first rows by id whose `column` holds `value`."""
    table = resource.table
    async with database.read() as connection:
        found = await connection.execute(
            select(table).where(table.c[column] == value).order_by(table.c.id).limit(limit)
        )
        return [entity(row) for row in found]
