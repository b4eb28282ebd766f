"""Conflicts that keep rows from being stored: a parent that does not exist, or a unique value that is taken.

Existing parents are locked until COMMIT. Writers of unique values are serialised per table, so that a value found free
is still free when it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Table, select, text

from core.errors import Conflict, FieldProblem
from core.identity import unique_key
from repository.engine.transaction import Transaction
from repository.generic import rows
from repository.generic.versions import Row
from resources.resource import Parent, Resource

Items = Sequence[Row]
Edited = Sequence[Row | None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why a row cannot be stored."""

    column: str
    message: str
    type: str
    place: int | None = None  # the position in the list of the column

    def problem(self, index: int | None = None) -> FieldProblem:
        """Return the problem as clients see it; `index` is the position in a bulk request."""
        row = () if index is None else (index,)
        place = () if self.place is None else (self.place,)
        return FieldProblem(("body", *row, self.column, *place), self.message, self.type)


async def require_none(tx: Transaction, resource: Resource, items: Items, *, edits: Edited = (), bulk: bool) -> None:
    """Raise Conflict naming every item that cannot be stored. The arguments are those of `find`."""
    raise_for(await find(tx, resource, items, edits=edits), bulk=bulk)


def raise_for(refused: Mapping[int, Refusal], *, bulk: bool) -> None:
    """Raise Conflict when any item is refused."""
    if refused:
        raise Conflict([refused[index].problem(index if bulk else None) for index in sorted(refused)])


async def find(tx: Transaction, resource: Resource, items: Items, *, edits: Edited = ()) -> dict[int, Refusal]:
    """Return why items cannot be stored, by the position of the item.

    If several items have the same unique value, only the first can be stored. `edits` is empty if the items are new
    rows. Otherwise, it holds for each item the stored row that the item edits, or None if there is no such row; an item
    without a row does not compete for its unique value. If several items edit the same row, only the last one counts.
    """
    refused: dict[int, Refusal] = {}
    for parent in resource.parents:
        refused |= await _without_parent(tx, parent, items)
    for key, column in resource.keys.items():
        if not resource.table.c[key].unique:
            continue
        # An item that is refused for another reason leaves its unique value to the other items.
        stored = {
            index: item for index, item in enumerate(items) if index not in refused and item.get(column) is not None
        }
        refused |= await _taken(tx, resource, key, column, stored, edits)
    return refused


async def _without_parent(tx: Transaction, parent: Parent, items: Items) -> dict[int, Refusal]:
    named = sorted({item[parent.column] for item in items if item.get(parent.column) is not None})
    if not named:
        return {}
    table, singular = parent.resource.table, parent.resource.singular
    known = await tx.connection.execute(
        select(table.c.id).where(rows.one_of(tx.is_sqlite, table.c.id, named)).order_by(table.c.id).with_for_update()
    )
    found = set(known.scalars())
    return {
        index: Refusal(parent.column, f"There is no {singular} {item[parent.column]}", f"unknown_{singular}")
        for index, item in enumerate(items)
        if item.get(parent.column) is not None and item[parent.column] not in found
    }


async def lock_table(tx: Transaction, table: Table) -> None:
    """Keep all other transactions from writing the table until COMMIT."""
    if not tx.is_sqlite:  # SQLite has one writer at a time
        await tx.connection.execute(text(f'LOCK TABLE "{table.name}" IN SHARE ROW EXCLUSIVE MODE'))


async def _taken(
    tx: Transaction, resource: Resource, key: str, column: str, items: Mapping[int, Row], edits: Edited
) -> dict[int, Refusal]:
    edited = {index: edits[index] for index in items} if edits else {}
    # When several items edit the same row, only the last one counts.
    last = {row["id"]: index for index, row in edited.items() if row is not None}
    wanted = {index: unique_key(items[index][column]) for index in (sorted(last.values()) if edits else items)}
    if not wanted:
        return {}
    table = resource.table
    await lock_table(tx, table)
    named = rows.one_of(tx.is_sqlite, table.c[key], sorted(set(wanted.values())))
    found = await tx.connection.execute(select(table.c.id, table.c[key], table.c[column]).where(named))
    # Values of rows that this request edits do not count as taken: the edits replace them.
    taken = {
        value: f"There is already {resource.a_singular} with the {column} {shown}"
        for id_, value, shown in found
        if id_ not in last
    }
    refused = {}
    for index, value in wanted.items():
        if value in taken:
            refused[index] = Refusal(column, taken[value], "taken")
        taken.setdefault(value, f"Another row of this request has the same {column}")
    return refused
