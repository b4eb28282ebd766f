"""Changes the rows that show a linked row, when the linked row is renamed or deleted.

If they are few, they change in the same transaction. Otherwise, a job changes them in several transactions
(`repository.cascades`), which lock the linked row first, so that neither its name nor its links change meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import ColumnElement, select

from core.errors import Conflict
from core.times import utc_now
from repository import search
from repository.engine.transaction import MAX_EVENT_ITEMS, Transaction
from repository.generic import dependants, link_tables, relations, rows
from repository.generic.versions import BOOKKEEPING, Row
from resources.registry import links_to
from resources.resource import Link, Resource

Rows = Sequence[dict[str, Any]]
# Queues a job that changes the rows that show a renamed row, given their number.
Defer = Callable[[int], Awaitable[None]]


def require_unshown_codes(resource: Resource, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Raise Conflict when an edit would change a code that rows show."""
    for owner, link in links_to(resource):
        if link.table is not None:
            continue
        recoded = [old for old, new in zip(before, after, strict=True) if old[link.shown] != new[link.shown]]
        if used := next((row["id"] for row in recoded if row[link.count]), None):
            raise Conflict(
                f"{owner.name.capitalize()} show the {link.shown} of {resource.singular} {used}, so it cannot change: "
                f"first set another {link.column} with PATCH /{owner.name}/bulk"
            )


async def rename(
    tx: Transaction, resource: Resource, before: Rows, after: Rows, actor_id: int | None, defer: Defer | None = None
) -> None:
    """Change the rows that show these linked rows by name or, if `defer` is given, leave this to a job.

    Raises TooManyDependants.
    """
    for owner, link in links_to(resource):
        if link.table is None:
            continue
        pairs = zip(before, after, strict=True)
        renamed = [new for old, new in pairs if old[link.shown] != new[link.shown] and new[link.count]]
        if not renamed:
            continue
        if defer is not None:
            await defer(sum(row[link.count] for row in renamed))
            continue
        dependants.require_few_showing(owner, link, renamed)
        await _show(tx, owner, link, {row["id"]: row[link.shown] for row in renamed}, actor_id)


async def show_next(
    tx: Transaction, owner: Resource, link: Link, linked: Row, *, after: int, size: int, actor_id: int | None
) -> list[int]:
    """Show the current name of a locked row in the next `size` rows that link to it, in order of id.

    Return the ids of these rows, including those that show the name already.
    """
    assert link.table is not None
    linked_id, owner_id = (link.table.c[name] for name in link.ids)
    ids = await _page(tx, owner_id, linked_id == linked["id"], after, size)
    await _show_page(tx, owner, link, ids, {linked["id"]: linked[link.shown]}, actor_id)
    return ids


async def release(tx: Transaction, resource: Resource, gone: Rows, actor_id: int | None) -> None:
    """Remove linked rows, which are about to be deleted, from the rows that show them."""
    for owner, link in links_to(resource):
        shown = [row for row in gone if row[link.count]]
        if not shown:
            continue
        if link.table is None:
            await _clear(tx, owner, link, [row[link.shown] for row in shown], actor_id)
        else:
            ids = [row["id"] for row in shown]
            await _show(tx, owner, link, dict.fromkeys(ids), actor_id)
            await link_tables.delete(tx, link, ids, of_linked=True)


async def release_some(
    tx: Transaction, owner: Resource, link: Link, linked: dict[str, Any], size: int, actor_id: int | None
) -> int:
    """Remove a locked row, which is to be deleted later, from `size` rows that show it, and lower its count.

    Return the number of rows that showed it.
    """
    if link.table is None:
        column = owner.table.c[link.column]
        ids = await _page(tx, owner.table.c.id, column == linked[link.shown], 0, size)
        await _clear_page(tx, owner, link, ids, actor_id)
    else:
        linked_id, owner_id = (link.table.c[name] for name in link.ids)
        is_linked = linked_id == linked["id"]
        ids = await _page(tx, owner_id, is_linked, 0, size)
        await _show_page(tx, owner, link, ids, {linked["id"]: None}, actor_id)
        await tx.connection.execute(link.table.delete().where(is_linked, rows.one_of(tx.is_sqlite, owner_id, ids)))
    fewer = Counter({linked["id"]: -len(ids)})
    await relations.add_to_counts(tx, link.resource, link.count, {linked["id"]: linked}, fewer, actor_id)
    return len(ids)


async def _page(
    tx: Transaction, column: ColumnElement[Any], chosen: ColumnElement[bool], after: int, size: int
) -> list[int]:
    """Return the next ids in `column` after an id, in ascending order."""
    page = select(column).where(chosen, column > after).distinct().order_by(column).limit(size)
    return list((await tx.connection.execute(page)).scalars())


async def _show(
    tx: Transaction, owner: Resource, link: Link, names: Mapping[int, str | None], actor_id: int | None
) -> None:
    """Write new names of linked rows, given by their ids, into the rows that show them; None removes a name."""
    assert link.table is not None
    linked_id, owner_id = (link.table.c[name] for name in link.ids)
    chosen = rows.one_of(tx.is_sqlite, linked_id, list(names))
    last = 0
    while ids := await _page(tx, owner_id, chosen, last, MAX_EVENT_ITEMS):
        last = ids[-1]
        await _show_page(tx, owner, link, ids, names, actor_id)


async def _show_page(
    tx: Transaction,
    owner: Resource,
    link: Link,
    ids: Sequence[int],
    names: Mapping[int, str | None],
    actor_id: int | None,
) -> None:
    before = await rows.fetch_locked(tx, owner.table, ids)
    shown = await link_tables.linked_ids(tx, link, ids)
    values: dict[int, list[str]] = {}
    for row in before:
        pairs = zip(row[link.column], shown[row["id"]], strict=True)
        now_shown = (names.get(id_, former) for former, id_ in pairs)
        values[row["id"]] = [name for name in now_shown if name is not None]
    changed = [row for row in before if row[link.column] != values[row["id"]]]
    await _write(tx, owner, link, changed, values, actor_id)


async def _clear(tx: Transaction, owner: Resource, link: Link, codes: Sequence[str], actor_id: int | None) -> None:
    """Clear the column of the rows that show these codes."""
    chosen = rows.one_of(tx.is_sqlite, owner.table.c[link.column], codes)
    last = 0
    while ids := await _page(tx, owner.table.c.id, chosen, last, MAX_EVENT_ITEMS):
        last = ids[-1]
        await _clear_page(tx, owner, link, ids, actor_id)


async def _clear_page(tx: Transaction, owner: Resource, link: Link, ids: Sequence[int], actor_id: int | None) -> None:
    before = await rows.fetch_locked(tx, owner.table, ids)
    await _write(tx, owner, link, before, dict.fromkeys(ids), actor_id)


async def _write(
    tx: Transaction, owner: Resource, link: Link, before: Rows, values: Mapping[int, Any], actor_id: int | None
) -> None:
    if not before:
        return
    now = utc_now()
    after = [
        {**row, link.column: values[row["id"]], "version": row["version"] + 1, "updated_at": now} for row in before
    ]
    if tx.is_sqlite:
        await rows.write_back(tx, owner.table, after, (link.column, *BOOKKEEPING))
    else:
        await _write_at_once(tx, owner, link, after, now)
    await search.update(tx, owner, before, after)
    await relations.emit_updates(tx, owner, before, after, [link.column], actor_id)


async def _write_at_once(tx: Transaction, owner: Resource, link: Link, after: Rows, now: str) -> None:
    """Write all rows with one statement. On PostgreSQL, one statement for each row would take several times as long."""
    kind = "text" if link.table is None else "jsonb"
    write = (
        f'UPDATE "{owner.table.name}" AS changed SET "{link.column}" = made.value::{kind}, version = made.version,'  # noqa: S608 (names of our own tables)
        " updated_at = $4 FROM unnest($1::bigint[], $2::text[], $3::integer[]) AS made (id, value, version)"
        " WHERE changed.id = made.id"
    )
    values = [row[link.column] if link.table is None else orjson.dumps(row[link.column]).decode() for row in after]
    ids, versions = [row["id"] for row in after], [row["version"] for row in after]
    await (await tx.driver()).execute(write, ids, values, versions, datetime.fromisoformat(now))
