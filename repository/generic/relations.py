"""Updates the parents and children of a changed row, in the same transaction, with their events.

A parent counts its children in a derived column; a new count does not raise its `version`. A child outlives its parent:
deleting the parent clears the child's column by an ordinary edit, so that no user deletes what another user wrote. The
exceptions are children that are meaningless without their parent (`Parent.takes_children`). If only their owners see
the children, each owner gets an event (or several, if one cannot hold all of them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Table, delete, select, update

from core.times import utc_now
from repository import search
from repository.engine.statement import statement
from repository.engine.transaction import MAX_EVENT_ITEMS, Transaction, former_values
from repository.generic import rows
from repository.generic.dependants import Children
from repository.generic.versions import Row
from resources.resource import Parent, Resource

Items = Sequence[Row]
Rows = Sequence[dict[str, Any]]


async def recount(tx: Transaction, resource: Resource, before: Items, after: Items, actor_id: int | None) -> None:
    """Update the counts of parents whose children were added, removed, or moved from one parent to another."""
    for parent in resource.parents:
        if parent.count is None:
            continue
        changes = Counter(item[parent.column] for item in after if item[parent.column])
        changes.subtract(item[parent.column] for item in before if item[parent.column])
        await add_to_parents(tx, parent, changes, actor_id)


async def release_children(tx: Transaction, children: Sequence[Children], actor_id: int | None) -> None:
    """Clear the columns of children that refer to rows about to be deleted, or delete these children, too. The caller
    has locked the rows, so that they get no further children.
    """
    for child, parent, chosen, _ in children:
        if parent.takes_children:
            await _take(tx, child, chosen, actor_id)
        else:
            await _orphan(tx, child, parent.column, chosen, actor_id)


async def release_some(
    tx: Transaction, child: Resource, parent: Parent, parent_id: int, size: int, actor_id: int | None
) -> list[dict[str, Any]]:
    """Release `size` children of a locked row, which is to be deleted later, and count the others.

    Return these children as they were before. Children that refer to one another must be released in another way.
    """
    table = child.table
    chosen = select(table.c.id).where(table.c[parent.column] == parent_id).order_by(table.c.id).limit(size)
    ids = list((await tx.connection.execute(chosen.with_for_update())).scalars())
    before = await rows.fetch_locked(tx, table, ids)
    after: Rows = ()
    if not before:
        return []
    if parent.takes_children:
        await search.remove(tx, child, ids)
        await emit_deletes(tx, child, before, actor_id)
        await tx.connection.execute(delete(table).where(rows.one_of(tx.is_sqlite, table.c.id, ids)))
    else:
        after = await _orphan_page(tx, child, parent.column, before, actor_id)
    await recount(tx, child, before, after, actor_id)
    return before


async def _locked(tx: Transaction, table: Table, chosen: ColumnElement[bool]) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield the rows in slices, in order of id, because a parent may have more children than one event can hold."""
    last = 0
    while True:
        page = select(table.c.id).where(chosen, table.c.id > last).order_by(table.c.id).limit(MAX_EVENT_ITEMS)
        # This query locks the children, so that a child that has left its parent meanwhile is not among them.
        found = list((await tx.connection.execute(page.with_for_update())).scalars())
        if not found:
            return
        last = found[-1]
        yield await rows.fetch_locked(tx, table, found)


async def _take(tx: Transaction, child: Resource, chosen: ColumnElement[bool], actor_id: int | None) -> None:
    async for gone in _locked(tx, child.table, chosen):
        await search.remove(tx, child, [row["id"] for row in gone])
        await emit_deletes(tx, child, gone, actor_id)
    # One statement deletes them all, because they may refer to one another.
    await tx.connection.execute(delete(child.table).where(chosen))


async def _orphan(
    tx: Transaction, child: Resource, column: str, chosen: ColumnElement[bool], actor_id: int | None
) -> None:
    async for before in _locked(tx, child.table, chosen):
        await _orphan_page(tx, child, column, before, actor_id)


async def _orphan_page(tx: Transaction, child: Resource, column: str, before: Rows, actor_id: int | None) -> Rows:
    """Clear a column of these rows, and return the rows as they are then."""
    table, now = child.table, utc_now()
    after = [{**row, column: None, "version": row["version"] + 1, "updated_at": now} for row in before]
    await tx.connection.execute(
        update(table)
        .where(rows.one_of(tx.is_sqlite, table.c.id, [row["id"] for row in before]))
        .values({column: None, "version": table.c.version + 1, "updated_at": now})
    )
    await emit_updates(tx, child, before, after, [column], actor_id)
    return after


async def add_to_parents(tx: Transaction, parent: Parent, changes: Counter[int], actor_id: int | None) -> None:
    """Add `changes` to the counts of the parents, and emit the events."""
    assert parent.count is not None, "expected a relation with a count"
    ids = sorted(parent_id for parent_id, change in changes.items() if change)
    if ids:
        found = {row["id"]: row for row in await rows.fetch_locked(tx, parent.resource.table, ids)}
        await add_to_counts(tx, parent.resource, parent.count, found, changes, actor_id)


async def add_to_counts(
    tx: Transaction,
    resource: Resource,
    count: str,
    locked: Mapping[int, dict[str, Any]],
    changes: Counter[int],
    actor_id: int | None,
) -> None:
    """Add `changes` to the column `count` of locked rows, given by id, and emit the events."""
    before = [locked[id_] for id_ in sorted(changes) if changes[id_] and id_ in locked]
    if not before:
        return
    after = [{**row, count: row[count] + changes[row["id"]]} for row in before]
    one = statement(f'UPDATE "{resource.table.name}" SET "{count}" = $1 WHERE id = $2')  # noqa: S608 (names of our own tables)
    await tx.execute_many(one, [(row[count], row["id"]) for row in after])
    await emit_updates(tx, resource, before, after, [count], actor_id)


async def emit_deletes(tx: Transaction, resource: Resource, gone: Rows, actor_id: int | None) -> None:
    """Emit, to each audience, a `delete` for one row, or a `delete_bulk` for several."""
    by_audience: dict[str, list[dict[str, Any]]] = {}
    for row in gone:
        by_audience.setdefault(resource.audience_of(row), []).append(row)
    for audience, listed in by_audience.items():
        if len(listed) == 1:
            tx.emit(resource.name, "delete", listed[0], actor_id=actor_id, before=listed[0], audience=audience)
            continue
        tx.emit_bulk(
            resource.name,
            "delete_bulk",
            [str(row["id"]).encode() for row in listed],
            actor_id=actor_id,
            before=await rows.off_the_loop(len(listed), lambda each: [orjson.dumps(row) for row in each], listed),
            audience=audience,
        )


async def emit_updates(
    tx: Transaction, resource: Resource, before: Rows, after: Rows, changed: list[str], actor_id: int | None
) -> None:
    """Emit an `update` for one row, or an `update_bulk` for several."""
    if len(after) == 1:
        tx.emit(resource.name, "update", after[0], actor_id=actor_id, before=before[0], changed=changed)
        return
    encoded, former = await rows.off_the_loop(len(after), _encoded, before, after)
    tx.emit_bulk(resource.name, "update_bulk", encoded, actor_id=actor_id, before=former, changed=changed)


def _encoded(before: Rows, after: Rows) -> tuple[list[bytes], list[bytes]]:
    former = [orjson.dumps(former_values(old, new)) for old, new in zip(before, after, strict=True)]
    return [orjson.dumps(row) for row in after], former
