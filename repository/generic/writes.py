"""Writing rows of a resource, one by one and in bulk, each write with its events.

Every write takes the transaction of `Database.write`; a function that takes an `identity` checks its rights in that
transaction. Rows of one table are locked in the order of their ids. Two transactions can still lock a parent and its
children in opposite orders; PostgreSQL then refuses one of them, and `Database.write` runs it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import orjson
from sqlalchemy import delete

from core.errors import NotFound
from core.identity import Identity
from core.times import utc_now
from repository import search
from repository.accounts import audit
from repository.engine.transaction import Transaction
from repository.generic import conflicts, dependants, linked_rows, links, relations, rows, versions
from repository.generic.conflicts import Refusal
from repository.generic.versions import BOOKKEEPING, IfMatch, Row, editable, require_version
from resources.resource import Resource

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """An entity as it is stored; `body` is its JSON."""

    id: int
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows to insert, as far as they can be prepared before their ids and times are known.

    `values` holds the columns `names`, ready for the driver; `encoded` holds the JSON of the rows as clients see
    them; `indexed` holds their words for the search.
    """

    resource: Resource
    rows: Sequence[dict[str, Any]]
    names: Sequence[str]
    values: Sequence[tuple[Any, ...]]
    encoded: Sequence[bytes]
    indexed: Sequence[search.Indexed]

    def __len__(self) -> int:
        return len(self.rows)


def prepare(resource: Resource, items: Sequence[Row], user_id: int | None, *, is_sqlite: bool) -> Prepared:
    """Prepare rows for insertion. Pure, so a thread can prepare one chunk while another is stored."""
    owner = {"user_id": user_id} if resource.has_owner else {}
    rest = {**owner, **resource.initial, "version": 1}
    return prepare_whole(resource, [{**resource.defaults, **item, **rest} for item in items], is_sqlite=is_sqlite)


def prepare_whole(resource: Resource, made: Sequence[dict[str, Any]], *, is_sqlite: bool) -> Prepared:
    """Prepare rows whose members are `resource.written`, in this order. Pure."""
    names = resource.written
    stored: Iterable[Iterable[Any]] = (row.values() for row in made)
    if resource.keys:
        stored = ((*row.values(), *(rows.key_of(row[source]) for source in resource.keys.values())) for row in made)
        names = (*names, *resource.keys)
    values = rows.driver_values(resource.table, names, stored, is_sqlite=is_sqlite)
    encoded = [orjson.dumps(row) for row in made]
    return Prepared(resource, made, names, values, encoded, search.index_rows(resource, made))


@dataclass(frozen=True, slots=True)
class BulkResult(Generic[T]):
    """The rows that a bulk write found, and the ids that it did not find, both in the order of the request."""

    done: list[T]
    not_found: list[int]


@dataclass(frozen=True, slots=True)
class Added:
    """The stored entities, encoded. `refused` maps the positions of the other items in the request to the reasons."""

    encoded: list[bytes]
    refused: Mapping[int, Sequence[Refusal]]


async def add(tx: Transaction, resource: Resource, identity: Identity, fields: Row) -> Stored:
    """Store one entity and return it. Raises Forbidden, InvalidInput or Conflict."""
    resource.require_may_create(identity)
    resolved = await links.resolve(tx, resource, [fields], add=_adder(tx, resource, identity))
    links.raise_for(resolved.refused, bulk=False)
    await conflicts.require_none(tx, resource, [fields], bulk=False)
    prepared = prepare(resource, resolved.items, identity.user_id, is_sqlite=tx.is_sqlite)
    ((entity_id, payload),) = await insert(tx, prepared)
    tx.emit_encoded(resource.name, "add", str(entity_id), payload, actor_id=identity.user_id)
    await relations.recount(tx, resource, (), prepared.rows, identity.user_id)
    await links.store(tx, resolved, {0: entity_id}, identity.user_id)
    if resource.writers:
        await _audit(tx, "create", resource, identity, [{**prepared.rows[0], "id": entity_id}])
    return Stored(entity_id, prepared.rows[0]["version"], payload)


async def add_bulk(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    items: Sequence[Row],
    *,
    skip_conflicts: bool,
    job_id: str | None = None,
    prepared: Prepared | None = None,
) -> Added:
    """Store all entities or none; with `skip_conflicts`, those without conflicts and with known linked rows.

    `prepared` is what `prepare` made of the items; it is used if all items are stored as they are. Raises Forbidden,
    InvalidInput or Conflict.
    """
    resource.require_may_create(identity)
    resolved = await links.resolve(tx, resource, items, add=_adder(tx, resource, identity), skips=skip_conflicts)
    if not skip_conflicts:
        links.raise_for(resolved.refused, bulk=True)
    conflicting = await conflicts.find(tx, resource, resolved.items)
    if not skip_conflicts:
        conflicts.raise_for(conflicting, bulk=True)
    refused = {**{index: [found] for index, found in conflicting.items()}, **resolved.refused}
    good = {index: item for index, item in enumerate(resolved.items) if index not in refused}
    made = [*good.values()]
    if prepared is None or made != items:
        make = partial(prepare, resource, made, identity.user_id, is_sqlite=tx.is_sqlite)
        prepared = await rows.off_the_loop(len(made), make)
    stored = await store_prepared(tx, prepared, identity.user_id, job_id)
    ids = {index: id_ for index, (id_, _) in zip(good, stored, strict=True)}
    await links.store(tx, resolved, ids, identity.user_id)
    encoded = [payload for _, payload in stored]
    if resource.writers:
        await _audit(tx, "create", resource, identity, [orjson.loads(payload) for payload in encoded])
    return Added(encoded, refused)


async def store(
    tx: Transaction, resource: Resource, items: Sequence[Row], user_id: int | None, job_id: str | None = None
) -> list[bytes]:
    """Insert rows that have neither conflicts nor links, with their events, and return the entities, encoded."""
    make = partial(prepare, resource, items, user_id, is_sqlite=tx.is_sqlite)
    prepared = await rows.off_the_loop(len(items), make)
    return [payload for _, payload in await store_prepared(tx, prepared, user_id, job_id)]


async def store_prepared(
    tx: Transaction, prepared: Prepared, user_id: int | None, job_id: str | None = None
) -> list[tuple[int, bytes]]:
    """Insert prepared rows with their events, except for their links, and return their ids with their JSON."""
    if not prepared.rows:
        return []
    stored = await insert(tx, prepared)
    encoded = [payload for _, payload in stored]
    tx.emit_bulk(prepared.resource.name, "add_bulk", encoded, actor_id=user_id, job_id=job_id)
    await relations.recount(tx, prepared.resource, (), prepared.rows, user_id)
    return stored


def _adder(tx: Transaction, resource: Resource, identity: Identity) -> links.Add | None:
    """Return a function that adds linked rows with new names, or None if the identity may not add them."""
    if not all(link.resource.has_all_rights(identity) for link in resource.links if link.adds):
        return None

    async def add(linked: Resource, items: Sequence[Row]) -> None:
        make = partial(prepare, linked, items, identity.user_id, is_sqlite=tx.is_sqlite)
        prepared = await rows.off_the_loop(len(items), make)
        if len(items) == 1:
            stored = await insert(tx, prepared)
            tx.emit_encoded(linked.name, "add", str(stored[0][0]), stored[0][1], actor_id=identity.user_id)
        else:
            stored = await store_prepared(tx, prepared, identity.user_id)
        made = [{**row, "id": id_} for row, (id_, _) in zip(prepared.rows, stored, strict=True)]
        await _audit(tx, "create", linked, identity, made)

    return add


async def insert(tx: Transaction, prepared: Prepared, ids: Sequence[int] | None = None) -> list[tuple[int, bytes]]:
    """Insert the rows without events, and return their ids with their JSON. `ids` are reserved, or None."""
    now = utc_now()
    table = prepared.resource.table
    if ids is None:
        ids = await rows.reserve_ids(tx, table, len(prepared.rows))
    await rows.insert(tx, table, prepared.names, ids, prepared.values, now)
    await search.insert(tx, prepared.resource, ids, prepared.indexed)
    tail = orjson.dumps({"created_at": now, "updated_at": now})[1:]
    return [
        (entity_id, b'{"id":%d,%s,%s' % (entity_id, middle[1:-1], tail))
        for entity_id, middle in zip(ids, prepared.encoded, strict=True)
    ]


async def _audit(
    tx: Transaction,
    action: str,
    resource: Resource,
    identity: Identity,
    written: Iterable[Row],
    changed: Sequence[str] = (),
) -> None:
    """Record the action in the audit trail for those of the `written` rows that only staff may write."""
    foreign = [row for row in written if not resource.is_own(identity, row)]
    if foreign:
        await audit.record_for_rows(tx, action, resource.name, identity, foreign, changed)


async def locked(
    tx: Transaction, resource: Resource, identity: Identity, entity_id: int, if_match: IfMatch
) -> dict[str, Any]:
    """Return an entity that the identity may change, locked until COMMIT.

    Raises NotFound, Forbidden or PreconditionFailed.
    """
    found = await rows.fetch_locked(tx, resource.table, [entity_id])
    if not found:
        raise NotFound(f"There is no {resource.singular} {entity_id}")
    row = found[0]
    resource.require_may_change(identity, found)
    require_version(resource.singular.capitalize(), row, if_match)
    return row


async def edit(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    entity_id: int,
    fields: Row,
    if_match: IfMatch,
    defer: linked_rows.Defer | None = None,
) -> Stored:
    """Set `fields` and return the whole entity. An edit that changes nothing emits no event. With `defer`, the rows
    that show a renamed row do not change yet.

    Raises NotFound, Forbidden, PreconditionFailed, InvalidInput or Conflict.
    """
    before = await locked(tx, resource, identity, entity_id, if_match)
    (fields,) = editable(resource.defaults, [fields], [before])
    resolved = await links.resolve(tx, resource, [fields], edits=[before], add=_adder(tx, resource, identity))
    links.raise_for(resolved.refused, bulk=False)
    await conflicts.require_none(tx, resource, [fields], edits=[before], bulk=False)
    after, changed = versions.edited(before, resolved.items[0], resolved.relinked(0), utc_now())
    if not changed:
        return Stored(entity_id, before["version"], orjson.dumps(before))
    linked_rows.require_unshown_codes(resource, [before], [after])
    await rows.write_back(tx, resource.table, [after], (*changed, *BOOKKEEPING))
    await search.update(tx, resource, [before], [after])
    payload = tx.emit(resource.name, "update", after, actor_id=identity.user_id, before=before, changed=changed)
    await relations.recount(tx, resource, [before], [after], identity.user_id)
    await links.store(tx, resolved, {0: entity_id}, identity.user_id)
    await linked_rows.rename(tx, resource, [before], [after], identity.user_id, defer)
    await _audit(tx, "update", resource, identity, [before], changed)
    return Stored(entity_id, after["version"], payload)


async def edit_bulk(
    tx: Transaction, resource: Resource, identity: Identity, edits: Sequence[tuple[int, Row]]
) -> BulkResult[bytes]:
    """Edit many entities and return them, encoded. Raises Forbidden, InvalidInput or Conflict.

    If an id appears more than once, its edits are merged; where they set the same field, the later one wins.
    """
    if not edits:
        resource.require_may_change(identity, ())
        return BulkResult([], [])
    found = {row["id"]: row for row in await rows.fetch_locked(tx, resource.table, sorted({id_ for id_, _ in edits}))}
    resource.require_may_change(identity, found.values())
    sent, rows_before = [fields for _, fields in edits], [found.get(id_) for id_, _ in edits]
    named = await rows.off_the_loop(len(edits), partial(editable, resource.defaults, sent, rows_before, bulk=True))
    resolved = await links.resolve(tx, resource, named, edits=rows_before, add=_adder(tx, resource, identity))
    links.raise_for(resolved.refused, bulk=True)
    await conflicts.require_none(tx, resource, named, edits=rows_before, bulk=True)
    merged: dict[int, dict[str, Any]] = {}
    relinked: dict[int, list[str]] = {}
    for position, (entity_id, _) in enumerate(edits):
        merged.setdefault(entity_id, {}).update(resolved.items[position])
        relinked.setdefault(entity_id, []).extend(resolved.relinked(position))
    done = await rows.off_the_loop(len(found), versions.edit_all, found, merged, relinked, utc_now())
    if done.after:
        linked_rows.require_unshown_codes(resource, done.before, done.after)
        await rows.write_back(tx, resource.table, done.after, (*done.changed, *BOOKKEEPING))
        await search.update(tx, resource, done.before, done.after)
        tx.emit_bulk(
            resource.name,
            "update_bulk",
            done.encoded_after,
            actor_id=identity.user_id,
            before=done.encoded_before,
            changed=done.changed,
        )
        await relations.recount(tx, resource, done.before, done.after, identity.user_id)
        await links.store(tx, resolved, {place: id_ for place, (id_, _) in enumerate(edits)}, identity.user_id)
        await linked_rows.rename(tx, resource, done.before, done.after, identity.user_id)
        await _audit(tx, "update", resource, identity, done.before, done.changed)
    return BulkResult(done.encoded, [entity_id for entity_id in merged if entity_id not in found])


async def unlinkable(
    tx: Transaction, resource: Resource, identity: Identity, edits: Sequence[Row], rows_before: Sequence[Row]
) -> Mapping[int, Sequence[Refusal]]:
    """Return why `edit_bulk` would refuse edits because of the linked rows that they name, by their positions."""
    adder = _adder(tx, resource, identity)
    return (await links.resolve(tx, resource, edits, edits=rows_before, add=adder)).refused


async def remove(tx: Transaction, resource: Resource, identity: Identity, entity_id: int, if_match: IfMatch) -> None:
    """Delete one entity. Raises NotFound, Forbidden, PreconditionFailed or Conflict."""
    row = await locked(tx, resource, identity, entity_id, if_match)
    await _release(tx, resource, [row], identity.user_id)
    await tx.connection.execute(delete(resource.table).where(resource.table.c.id == entity_id))
    await search.remove(tx, resource, [entity_id])
    tx.emit(resource.name, "delete", row, actor_id=identity.user_id, before=row)
    await relations.recount(tx, resource, [row], (), identity.user_id)
    await _audit(tx, "delete", resource, identity, [row])


async def _release(tx: Transaction, resource: Resource, gone: Sequence[dict[str, Any]], actor_id: int | None) -> None:
    """Change or delete what depends on locked rows, which are about to be deleted. Raises TooManyDependants."""
    children = await dependants.children(tx, resource, gone)
    dependants.require_few(resource, gone, children)
    await relations.release_children(tx, children, actor_id)
    await linked_rows.release(tx, resource, gone, actor_id)
    await links.remove(tx, resource, gone, actor_id)


async def remove_bulk(tx: Transaction, resource: Resource, identity: Identity, ids: Sequence[int]) -> BulkResult[int]:
    """Delete many entities and return their ids. Raises Forbidden or Conflict."""
    wanted = list(dict.fromkeys(ids))
    found = {row["id"]: row for row in await rows.fetch_locked(tx, resource.table, sorted(wanted))}
    resource.require_may_change(identity, found.values())
    if not found:
        return BulkResult([], wanted)
    gone = list(found.values())
    await _release(tx, resource, gone, identity.user_id)
    named = rows.one_of(tx.is_sqlite, resource.table.c.id, list(found))
    await tx.connection.execute(delete(resource.table).where(named))
    await search.remove(tx, resource, list(found))
    tx.emit_bulk(
        resource.name,
        "delete_bulk",
        [str(row["id"]).encode() for row in gone],
        actor_id=identity.user_id,
        before=await rows.off_the_loop(len(gone), lambda: [orjson.dumps(row) for row in gone]),
    )
    await relations.recount(tx, resource, gone, (), identity.user_id)
    await _audit(tx, "delete", resource, identity, gone)
    return BulkResult([each for each in wanted if each in found], [each for each in wanted if each not in found])
