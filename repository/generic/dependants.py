"""Dependants: the rows that change, or are deleted, together with a row that is renamed or deleted.

One transaction changes at most MAX_DEPENDANTS of them, because other writes wait meanwhile. A row with more is renamed
or deleted by a job (`repository.cascades`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, func, select

from core.errors import Conflict
from repository.engine.transaction import Transaction
from repository.generic import rows
from repository.generic.versions import Row
from resources.registry import children_of, links_to
from resources.resource import Link, Parent, Resource

MAX_DEPENDANTS = 3_000  # changing them takes up to half a second

Rows = Sequence[dict[str, Any]]


class TooManyDependants(Conflict):
    """One transaction must not change all dependants."""


class Children(NamedTuple):
    """The rows of a resource that refer to rows about to be deleted; `number` counts them up to MAX_DEPENDANTS + 1."""

    resource: Resource
    parent: Parent
    chosen: ColumnElement[bool]
    number: int


async def children(tx: Transaction, resource: Resource, gone: Rows) -> list[Children]:
    """Return the children of rows about to be deleted, except for resources that have none."""
    found = []
    for child, parent in children_of(resource):
        count = parent.count
        ids = [row["id"] for row in gone if count is None or row[count]]
        if not ids:
            continue
        chosen = rows.one_of(tx.is_sqlite, child.table.c[parent.column], ids)
        number = sum(row[count] for row in gone) if count is not None else await _count(tx, child.table, chosen)
        if number:
            found.append(Children(child, parent, chosen, number))
    return found


async def _count(tx: Transaction, table: Table, chosen: ColumnElement[bool]) -> int:
    """Count rows; stop above MAX_DEPENDANTS."""
    some = select(table.c.id).where(chosen).limit(MAX_DEPENDANTS + 1).subquery()
    found: int = (await tx.connection.execute(select(func.count()).select_from(some))).scalar_one()
    return found


async def count(tx: Transaction, resource: Resource, row: dict[str, Any]) -> int:
    """Return the number of dependants of a row about to be deleted, in which `Children.number` may be limited."""
    return sum(each.number for each in await children(tx, resource, [row])) + _number_showing(resource, [row])


def _number_showing(resource: Resource, found: Sequence[Row]) -> int:
    """Return how many times other rows show these rows."""
    return sum(row[link.count] for _, link in links_to(resource) for row in found)


def require_few(resource: Resource, gone: Rows, children: Sequence[Children]) -> None:
    """Raise TooManyDependants if too many rows depend on rows about to be deleted."""
    if sum(each.number for each in children) + _number_showing(resource, gone) <= MAX_DEPENDANTS:
        return
    names = [each.resource.name for each in children] + [owner.name for owner, _ in links_to(resource)]
    has = f"{resource.singular.capitalize()} {gone[0]['id']} has" if len(gone) == 1 else f"These {resource.name} have"
    raise TooManyDependants(
        f"{has} more than {MAX_DEPENDANTS:,} {' and '.join(names)}, expected fewer for one transaction: delete fewer "
        f"{resource.name} at a time. DELETE /{resource.name}/{{id}} accepts {resource.a_singular} with any number of "
        "them"
    )


def require_few_showing(owner: Resource, link: Link, renamed: Sequence[Row]) -> None:
    """Raise TooManyDependants if too many rows of `owner` show rows about to be renamed."""
    if sum(row[link.count] for row in renamed) <= MAX_DEPENDANTS:
        return
    name = link.resource.name
    shows = f"{link.resource.singular.capitalize()} {renamed[0]['id']} is" if len(renamed) == 1 else f"These {name} are"
    raise TooManyDependants(
        f"{shows} shown by more than {MAX_DEPENDANTS:,} {owner.name}, expected fewer for one transaction: rename fewer "
        f"{name} at a time. PATCH /{name}/{{id}} accepts {link.resource.a_singular} with any number of them"
    )
