"""Writing movies and characters: one by one and in bulk, each write with its events.

Every function takes the transaction of `Database.write`. Rows of one table are locked in the order of their ids. A
movie and its characters can still be locked from both ends at once; then PostgreSQL refuses one of the two, and
`Database.write` runs it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from sqlalchemy import delete

from core.errors import Forbidden, NotFound, PreconditionFailed
from core.identity import Identity
from core.times import utc_now
from repository.engine.transaction import Transaction
from repository.generic import relations, rows
from repository.generic.versions import IfMatch
from resources.resource import Resource

# What a no-op edit leaves alone, and `changed` does not name.
_BOOKKEEPING = frozenset({"version", "updated_at"})


@dataclass(frozen=True, slots=True)
class Stored:
    """An entity as it is stored; `body` is its JSON."""

    id: int
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows to insert, as far as they can be made ready before their ids and times are known.

    `values` holds the columns between `id` and `created_at`, ready for the driver; `encoded` the JSON of the same.
    """

    resource: Resource
    rows: Sequence[dict[str, Any]]
    values: Sequence[tuple[Any, ...]]
    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.rows)


def prepare(
    resource: Resource, items: Sequence[Mapping[str, Any]], user_id: int | None, *, is_sqlite: bool
) -> Prepared:
    """The part of a bulk insert that is pure computation: a thread may do it while another chunk is stored."""
    names = resource.columns
    assert (names[0], *names[-2:]) == ("id", "created_at", "updated_at")
    middle = names[1:-2]
    rest = {"user_id": user_id, **resource.derived, "version": 1}
    made = [{**resource.defaults, **item, **rest} for item in items]
    assert all(tuple(row) == middle for row in made[:1]), "the columns of a row are in the order of the table"
    values = rows.driver_values(resource.table, middle, (row.values() for row in made), is_sqlite=is_sqlite)
    return Prepared(resource, made, values, [orjson.dumps(row) for row in made])


async def add(tx: Transaction, resource: Resource, identity: Identity, fields: Mapping[str, Any]) -> Stored:
    """Store one entity and return it. Raises Conflict when it names a movie that does not exist."""
    await relations.require(tx, resource, [fields], bulk=False)
    prepared = prepare(resource, [fields], identity.user_id, is_sqlite=tx.is_sqlite)
    ((entity_id, payload),) = await _insert(tx, prepared)
    tx.emit_encoded(resource.name, "add", str(entity_id), payload, actor_id=identity.user_id)
    await relations.added(tx, resource, prepared.rows, identity.user_id)
    return Stored(entity_id, prepared.rows[0]["version"], payload)


async def add_bulk(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    items: Sequence[Mapping[str, Any]],
    *,
    skip_unknown: bool,
) -> tuple[list[bytes], list[int]]:
    """Store many: the entities, encoded, and the positions of those left out because their movie does not exist.

    Without `skip_unknown` none is left out: Conflict names the rows, and nothing is stored.
    """
    if not skip_unknown:
        await relations.require(tx, resource, items, bulk=True)
        return await store(tx, resource, items, identity.user_id), []
    unknown = await relations.missing_links(tx, resource, items)
    left_out = set(unknown)
    good = [item for index, item in enumerate(items) if index not in left_out]
    return await store(tx, resource, good, identity.user_id), unknown


async def store(
    tx: Transaction,
    resource: Resource,
    items: Sequence[Mapping[str, Any]],
    user_id: int | None,
    job_id: str | None = None,
) -> list[bytes]:
    """Insert rows whose links are known to be good, with their event. Answers the entities, encoded."""
    make = partial(prepare, resource, items, user_id, is_sqlite=tx.is_sqlite)
    prepared = await rows.off_the_loop(len(items), make)
    return await store_prepared(tx, prepared, user_id, job_id)


async def store_prepared(
    tx: Transaction, prepared: Prepared, user_id: int | None, job_id: str | None = None
) -> list[bytes]:
    if not prepared.rows:
        return []
    encoded = [payload for _, payload in await _insert(tx, prepared)]
    tx.emit_bulk(prepared.resource.name, "add_bulk", encoded, actor_id=user_id, job_id=job_id)
    await relations.added(tx, prepared.resource, prepared.rows, user_id)
    return encoded


async def _insert(tx: Transaction, prepared: Prepared) -> list[tuple[int, bytes]]:
    """Insert the rows; answers their ids and their JSON."""
    now = utc_now()
    table = prepared.resource.table
    ids = await rows.reserve_ids(tx, table, len(prepared.rows))
    await rows.insert(tx, table, ids, prepared.values, now)
    tail = orjson.dumps({"created_at": now, "updated_at": now})[1:]
    return [
        (entity_id, b'{"id":%d,%s,%s' % (entity_id, middle[1:-1], tail))
        for entity_id, middle in zip(ids, prepared.encoded, strict=True)
    ]


async def _one(
    tx: Transaction, resource: Resource, identity: Identity, entity_id: int, if_match: IfMatch
) -> dict[str, Any]:
    found = await rows.fetch_locked(tx, resource.table, [entity_id])
    if not found:
        raise NotFound(f"There is no {resource.singular} {entity_id}")
    row = found[0]
    if not identity.may_change(row["user_id"]):
        raise Forbidden(f"Only its owner, moderators and admins may change {resource.singular} {entity_id}")
    if if_match is not None and row["version"] not in if_match:
        raise PreconditionFailed(f"{resource.singular.capitalize()} {entity_id} is at version {row['version']} now")
    return row


def _edited(row: dict[str, Any], fields: Mapping[str, Any], now: str) -> tuple[dict[str, Any], list[str]]:
    changed = [name for name, value in fields.items() if row[name] != value]
    if not changed:
        return row, []
    return {**row, **fields, "version": row["version"] + 1, "updated_at": now}, changed


async def edit(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    entity_id: int,
    fields: Mapping[str, Any],
    if_match: IfMatch,
) -> Stored:
    """Set `fields` and return the whole entity. An edit that changes nothing is no edit: no event.

    Raises NotFound, Forbidden, PreconditionFailed and Conflict.
    """
    before = await _one(tx, resource, identity, entity_id, if_match)
    await relations.require(tx, resource, [fields], bulk=False)
    after, changed = _edited(before, fields, utc_now())
    if not changed:
        return Stored(entity_id, before["version"], orjson.dumps(before))
    await rows.write_back(tx, resource.table, [after], (*changed, *_BOOKKEEPING))
    payload = tx.emit(resource.name, "update", after, actor_id=identity.user_id, before=before, changed=changed)
    await relations.edited(tx, resource, [before], [after], identity.user_id)
    return Stored(entity_id, after["version"], payload)


async def edit_bulk(
    tx: Transaction, resource: Resource, identity: Identity, edits: Sequence[tuple[int, Mapping[str, Any]]]
) -> tuple[list[bytes], list[int]]:
    """Edit many in one transaction: the entities, encoded, in the order of the request, and the ids not found.

    An id that is named twice gets both edits, the later one last. Raises Forbidden, with nothing changed, when any
    row is not the caller's.
    """
    merged: dict[int, dict[str, Any]] = {}
    for entity_id, fields in edits:
        merged.setdefault(entity_id, {}).update(fields)
    if not merged:
        return [], []
    found = {row["id"]: row for row in await rows.fetch_locked(tx, resource.table, sorted(merged))}
    _require_all_own(resource, identity, found)
    await relations.require(tx, resource, [fields for _, fields in edits], bulk=True)
    done = await rows.off_the_loop(len(found), _edit_all, found, merged, utc_now())
    if done.after:
        await rows.write_back(tx, resource.table, done.after, (*done.changed, *_BOOKKEEPING))
        tx.emit_bulk(
            resource.name,
            "update_bulk",
            done.encoded_after,
            actor_id=identity.user_id,
            before=done.encoded_before,
            changed=done.changed,
        )
        await relations.edited(tx, resource, done.before, done.after, identity.user_id)
    return done.encoded, [entity_id for entity_id in merged if entity_id not in found]


@dataclass(frozen=True, slots=True)
class _Edited:
    """The rows that an edit changes, before and after; `encoded` are all it names, in the order of the request."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    encoded_before: list[bytes]
    encoded_after: list[bytes]
    changed: list[str]
    encoded: list[bytes]


def _edit_all(found: Mapping[int, dict[str, Any]], edits: Mapping[int, Mapping[str, Any]], now: str) -> _Edited:
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    changed: dict[str, None] = {}
    encoded: dict[int, bytes] = {}
    for entity_id, row in found.items():
        edited, names = _edited(row, edits[entity_id], now)
        encoded[entity_id] = orjson.dumps(edited)
        if names:
            before.append(row)
            after.append(edited)
            changed.update(dict.fromkeys(names))
    return _Edited(
        before,
        after,
        [orjson.dumps(row) for row in before],
        [encoded[row["id"]] for row in after],
        list(changed),
        [encoded[entity_id] for entity_id in edits if entity_id in encoded],
    )


def _require_all_own(resource: Resource, identity: Identity, found: Mapping[int, dict[str, Any]]) -> None:
    foreign = [entity_id for entity_id, row in found.items() if not identity.may_change(row["user_id"])]
    if foreign:
        shown = ", ".join(str(entity_id) for entity_id in foreign[:10]) + (", …" if len(foreign) > 10 else "")
        raise Forbidden(f"Only their owners, moderators and admins may change {resource.name} {shown}")


async def remove(tx: Transaction, resource: Resource, identity: Identity, entity_id: int, if_match: IfMatch) -> None:
    """Raises NotFound, Forbidden and PreconditionFailed."""
    row = await _one(tx, resource, identity, entity_id, if_match)
    await relations.removing(tx, resource, [row], identity.user_id)
    await tx.connection.execute(delete(resource.table).where(resource.table.c.id == entity_id))
    tx.emit(resource.name, "delete", row, actor_id=identity.user_id, before=row)
    await relations.removed(tx, resource, [row], identity.user_id)


async def remove_bulk(
    tx: Transaction, resource: Resource, identity: Identity, ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Delete many in one transaction: the ids deleted and those not found, in the order of the request."""
    wanted = list(dict.fromkeys(ids))
    found = {row["id"]: row for row in await rows.fetch_locked(tx, resource.table, sorted(wanted))}
    if not found:
        return [], wanted
    _require_all_own(resource, identity, found)
    gone = list(found.values())
    await relations.removing(tx, resource, gone, identity.user_id)
    await tx.connection.execute(
        delete(resource.table).where(rows.one_of(tx.is_sqlite, resource.table.c.id, list(found)))
    )
    tx.emit_bulk(
        resource.name,
        "delete_bulk",
        [str(row["id"]).encode() for row in gone],
        actor_id=identity.user_id,
        before=await rows.off_the_loop(len(gone), lambda: [orjson.dumps(row) for row in gone]),
    )
    await relations.removed(tx, resource, gone, identity.user_id)
    return [each for each in wanted if each in found], [each for each in wanted if each not in found]
