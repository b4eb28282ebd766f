"""Changes the rows that show a linked row, when the linked row is renamed or deleted, in the same transaction.

The rows are read and written in slices, so that the event loop is not blocked, however many rows there are. Their
events stay in memory until COMMIT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import select

from core.errors import Conflict
from core.times import utc_now
from repository import search
from repository.engine.transaction import MAX_EVENT_ITEMS, Transaction
from repository.generic import link_tables, relations, rows
from repository.generic.versions import BOOKKEEPING, Row
from resources.registry import links_to
from resources.resource import Link, Resource

# A frequent genre may be shown by many movies. On SQLite, other writes wait for a few seconds while they are changed.
MAX_CHANGED_ROWS = 100_000
MAX_CHANGED_BYTES = 128 * 1024 * 1024

Rows = Sequence[dict[str, Any]]


def require_few(resource: Resource, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Raise Conflict when an edit would change a code that rows show, or the names of rows that too many rows show."""
    for owner, link in links_to(resource):
        renamed = [old for old, new in zip(before, after, strict=True) if old[link.shown] != new[link.shown]]
        if link.table is not None:
            _require_few(resource, renamed, owner, link)
        elif used := next((row["id"] for row in renamed if row[link.count]), None):
            raise Conflict(
                f"{owner.name.capitalize()} show the {link.shown} of {resource.singular} {used}, so it cannot change: "
                f"first set another {link.column} with PATCH /{owner.name}/bulk"
            )


def _require_few(resource: Resource, found: Sequence[Row], owner: Resource, link: Link) -> None:
    number = sum(row[link.count] for row in found)
    if number > MAX_CHANGED_ROWS:
        one, many = f"{resource.singular.capitalize()} {found[0]['id']} has", f"These {resource.name} have"
        raise Conflict(
            f"{one if len(found) == 1 else many} {number} {owner.name}, expected at most {MAX_CHANGED_ROWS}: first "
            f"delete {owner.name} with DELETE /{owner.name}/bulk, or change their {link.column} with "
            f"PATCH /{owner.name}/bulk"
        )


async def rename(tx: Transaction, resource: Resource, before: Rows, after: Rows, actor_id: int | None) -> None:
    """Change the rows that show these linked rows by name. Call `require_few` first."""
    for owner, link in links_to(resource):
        names = {
            new["id"]: new[link.shown]
            for old, new in zip(before, after, strict=True)
            if old[link.shown] != new[link.shown] and old[link.count]
        }
        if names:
            await _show(tx, owner, link, names, actor_id)


async def release(tx: Transaction, resource: Resource, gone: Rows, actor_id: int | None) -> None:
    """Remove linked rows, which are about to be deleted, from the rows that show them. Raises Conflict."""
    for owner, link in links_to(resource):
        shown = [row for row in gone if row[link.count]]
        if not shown:
            continue
        _require_few(resource, shown, owner, link)
        if link.table is None:
            await _clear(tx, owner, link, [row[link.shown] for row in shown], actor_id)
        else:
            ids = [row["id"] for row in shown]
            await _show(tx, owner, link, dict.fromkeys(ids), actor_id)
            await link_tables.delete(tx, link, ids, of_linked=True)


async def _show(
    tx: Transaction, owner: Resource, link: Link, names: Mapping[int, str | None], actor_id: int | None
) -> None:
    """Write new names of linked rows, given by their ids, into the rows that show them; None removes a name."""
    assert link.table is not None
    linked, owner_id = (link.table.c[name] for name in link.ids)
    chosen = rows.one_of(tx.is_sqlite, linked, list(names))
    last = 0
    while True:
        page = select(owner_id).where(chosen, owner_id > last).distinct().order_by(owner_id).limit(MAX_EVENT_ITEMS)
        ids = list((await tx.connection.execute(page)).scalars())
        if not ids:
            return
        last = ids[-1]
        before = await rows.fetch_locked(tx, owner.table, ids)
        shown = await link_tables.linked_ids(tx, link, ids)
        values: dict[int, list[str]] = {}
        for row in before:
            pairs = zip(row[link.column], shown[row["id"]], strict=True)
            now_shown = (names.get(id_, former) for former, id_ in pairs)
            values[row["id"]] = [name for name in now_shown if name is not None]
        await _write(tx, owner, link, before, values, actor_id)


async def _clear(tx: Transaction, owner: Resource, link: Link, codes: Sequence[str], actor_id: int | None) -> None:
    """Clear the column of the rows that show these codes."""
    table = owner.table
    chosen = rows.one_of(tx.is_sqlite, table.c[link.column], codes)
    last = 0
    while True:
        page = select(table.c.id).where(chosen, table.c.id > last).order_by(table.c.id).limit(MAX_EVENT_ITEMS)
        ids = list((await tx.connection.execute(page)).scalars())
        if not ids:
            return
        last = ids[-1]
        before = await rows.fetch_locked(tx, table, ids)
        await _write(tx, owner, link, before, dict.fromkeys(ids), actor_id)


async def _write(
    tx: Transaction, owner: Resource, link: Link, before: Rows, values: Mapping[int, Any], actor_id: int | None
) -> None:
    tx.max_size = MAX_CHANGED_BYTES
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
