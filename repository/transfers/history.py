"""The history of an entity: its changes in the event log, newest first.

Events about one entity are found by an index. A bulk event holds up to a thousand entities and is stored with the
lowest and the highest of their ids. Bulk events whose range includes the id are candidates: the database searches them
for the entity, at most MAX_CANDIDATES for each page. If there may be more of them, the page ends at the last candidate,
possibly without a single change, and the next page continues there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import ColumnElement, LargeBinary, and_, case, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head, head_of
from repository.generic import rows
from repository.generic.versions import BOOKKEEPING
from resources.resource import Resource
from schemas import MAX_ID

MAX_CANDIDATES = 100  # up to 75 MiB, which PostgreSQL searches in half a second
# The events of a page are in memory together. A bulk event may have 768 KiB, an entity in it much less.
MAX_PAGE_BYTES = 8 * 1024 * 1024

EVENTS, SPANS = models.events.c, models.event_spans.c
_SIZE = func.length(EVENTS.payload) + func.coalesce(func.length(EVENTS.before), 0)
_READ = (
    EVENTS.seq, EVENTS.operation, EVENTS.payload, EVENTS.before, EVENTS.changed, EVENTS.actor_id, EVENTS.created_at,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class History:
    """A page of changes. `next_before` is the number before which the next page begins, or None at the end.

    `exists` is whether the entity exists now. `head` is the head of the log before the page was read.
    """

    head: Head
    changes: list[dict[str, Any]]
    next_before: int | None
    exists: bool


async def page_of(
    database: Database,
    resource: Resource,
    entity_id: int,
    audiences: Collection[str],
    *,
    before: int | None,
    limit: int,
) -> History:
    """Return up to `limit` changes with numbers below `before` that these audiences may see. Raises Unavailable."""

    async def work(connection: AsyncConnection) -> tuple[Head, bool, list[Any], int | None]:
        head = models.event_head.c
        position = head_of((await connection.execute(select(head.epoch, head.seq))).all())
        id_ = resource.table.c.id
        exists = (await connection.execute(select(id_).where(id_ == entity_id))).first() is not None
        below = min(before or MAX_ID, position.seq + 1)
        visible = EVENTS.audience.in_(sorted(audiences))
        chosen, next_before = await _choose(connection, resource.name, entity_id, visible, below, limit)
        query = select(*_READ).where(EVENTS.seq.in_(chosen)).order_by(EVENTS.seq.desc())
        return position, exists, list((await connection.execute(query)).all()), next_before

    head, exists, found, next_before = await database.reading(work, Lane.COSTLY)
    size = sum(len(event.payload) for event in found)
    changes = await rows.off_the_loop(size // 100, _changes, found, entity_id)
    return History(head, changes, next_before, exists)


async def _choose(
    connection: AsyncConnection, topic: str, entity_id: int, visible: ColumnElement[bool], below: int, limit: int
) -> tuple[Sequence[int], int | None]:
    """Return the numbers of the page's events, and the number before which the next page begins."""
    is_single = and_(EVENTS.topic == topic, EVENTS.entity_id == str(entity_id), EVENTS.seq < below, visible)
    single = select(EVENTS.seq, _SIZE.label("size")).where(is_single)
    newest_first = single.order_by(EVENTS.seq.desc()).limit(limit + 1)
    sizes = {event.seq: event.size for event in await connection.execute(newest_first)}
    in_range = and_(SPANS.topic == topic, SPANS.seq < below, SPANS.first_id <= entity_id, SPANS.last_id >= entity_id)
    candidates = select(SPANS.seq).where(in_range).order_by(SPANS.seq.desc()).limit(MAX_CANDIDATES).scalar_subquery()
    holds = _holds(entity_id, is_sqlite=connection.dialect.name == "sqlite")
    query = select(EVENTS.seq, _SIZE, and_(visible, holds)).where(EVENTS.seq.in_(candidates))
    searched = (await connection.execute(query.order_by(EVENTS.seq.desc()))).all()
    sizes |= {seq: size for seq, size, is_held in searched if is_held}
    is_cut = len(searched) == MAX_CANDIDATES
    end = searched[-1][0] if is_cut else 0
    found = sorted((seq for seq in sizes if seq >= end), reverse=True)
    chosen: list[int] = []
    total = 0
    for seq in found:
        total += sizes[seq]
        if len(chosen) == limit or (chosen and total > MAX_PAGE_BYTES):
            return chosen, chosen[-1]
        chosen.append(seq)
    return chosen, end if is_cut else None


def _holds(entity_id: int, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the SQL condition that a bulk event holds the entity. Encoded entities begin with their id."""
    entities = case((EVENTS.operation == "delete_bulk", EVENTS.before), else_=EVENTS.payload)
    wanted = literal(b'{"id":%d,' % entity_id, LargeBinary)
    place: ColumnElement[int] = func.instr(entities, wanted) if is_sqlite else func.position(wanted.op("IN")(entities))
    return place > 0


def _changes(found: Sequence[Any], entity_id: int) -> list[dict[str, Any]]:
    """Return the changes of the entity in the events. Pure."""
    return [change for event in found if (change := _change(event, entity_id)) is not None]


def _change(event: Any, entity_id: int) -> dict[str, Any] | None:
    payload = orjson.loads(event.payload)
    former = orjson.loads(event.before) if event.before is not None else None
    operation = event.operation.removesuffix("_bulk")
    if event.operation.endswith("_bulk"):
        ids = payload["ids"] if "ids" in payload else [item["id"] for item in payload["items"]]
        if entity_id not in ids:
            return None
        place = ids.index(entity_id)
        payload = payload["items"][place] if "items" in payload else None
        former = former[place] if former is not None else None
    if operation == "update" and former is not None:
        changed = [name for name in former if name not in BOOKKEEPING]
        former = {**payload, **former}
    else:
        changed = orjson.loads(event.changed) if event.changed else []
    return {
        "seq": event.seq,
        "operation": operation,
        "at": event.created_at,
        "actor_id": event.actor_id,
        "changed": changed,
        "before": former,
        "after": None if operation == "delete" else payload,
    }
